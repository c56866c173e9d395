"""Draws what BASE.md shows: a grid of samples of a base and the loss curve of its training; measures what it draws.

    python report_base.py --base base --log work/base/unet/log.jsonl --data work/data/flat --style 扁平
    python report_base.py --base base --data work/data/noto --measure data/heldout --out /tmp/noto
"""

import argparse
import json
import sys
from pathlib import Path

import extras  # noqa: F401  # isort: skip  # first, to say which packages are missing
import mindspore as ms
import numpy as np
from base import Base, BaseError, load_base
from data import DataError, load_folder, load_image, read_captions
from PIL import Image
from recognition import found
from samplers import GuidedStep, sample

PROMPTS = ("狐狸", "熊猫", "猫脸", "青蛙", "红苹果", "披萨", "向日葵", "蘑菇",
           "西瓜", "柠檬", "嘿嘿", "甜甜圈", "玉米", "玫瑰", "猫头鹰", "章鱼",
           "小鸡", "兔子头", "梨", "心碎", "狗脸", "老虎头", "樱桃", "机器人",
           "大笑", "生日蛋糕", "汉堡", "葡萄", "胡萝卜", "香蕉", "企鹅", "蝴蝶")


def draw(base: Base, prompts: list[str], seed: int, guidance: float, steps: int) -> np.ndarray:
    """One picture for each prompt, (n, 3, S, S) in [-1, 1]."""
    side, channels = base.config["unet"]["image_size"], base.config["unet"]["in_channels"]
    noise = np.random.default_rng(seed).standard_normal((len(prompts), channels, side, side), dtype=np.float32)
    ids = np.array([base.tokenizer(text) for text in ("", *prompts)], np.int32)
    context = base.text_encoder(ms.Tensor(ids)).asnumpy()
    latents = sample(GuidedStep(base.unet, base.schedule.prediction), noise, context[1:], context[:1], base.schedule,
                     steps=steps, guidance=guidance)
    return base.autoencoder.decode(ms.Tensor(latents / np.float32(base.scale_factor))).asnumpy()


def grid(pictures: np.ndarray, columns: int, zoom: int) -> Image.Image:
    """Lays pictures (n, 3, S, S) in [-1, 1] out in rows, on white."""
    size, rows = pictures.shape[-1], -(-len(pictures) // columns)
    sheet = np.full((rows * (size + 2), columns * (size + 2), 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (size + 2) + 1, (i % columns) * (size + 2) + 1
        sheet[top:top + size, left:left + size] = np.clip(picture.transpose(1, 2, 0) * 127.5 + 127.5, 0, 255).round()
    return Image.fromarray(sheet).resize((zoom * sheet.shape[1], zoom * sheet.shape[0]), Image.Resampling.NEAREST)


def with_originals(pictures: np.ndarray, prompts: list[str], folder: Path, columns: int) -> np.ndarray:
    """Puts below each row of samples the row of the training pictures with these captions."""
    images, texts, _ = load_folder(folder, pictures.shape[-1])
    originals = [images[texts.index(p)] if p in texts else np.ones_like(images[0]) for p in prompts]
    rows = []
    for start in range(0, len(prompts), columns):
        rows += [*pictures[start:start + columns], *originals[start:start + columns]]
    return np.stack(rows)


def measure(base: Base, folder: Path, files: Path, args: argparse.Namespace) -> str:
    """Says of how many captions the own picture is the nearest; the pictures of `folder` that `files` has too."""
    wanted = {sample.path.name for sample in read_captions(files)[0]}
    samples = [sample for sample in read_captions(folder)[0] if sample.path.name in wanted]
    drawn = draw(base, [sample.text for sample in samples], args.seed, args.guidance, args.steps)
    images = np.stack([load_image(sample.path, drawn.shape[-1], drawn.shape[-1]) for sample in samples])
    return f"the nearest, or one of the five nearest, is the own picture: {found(drawn, images)}"


def curve(log: Path, path: Path) -> None:
    """Draws the training loss of a log of pretrain.py."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.semilogy([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss (mean of 20 steps)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--out", type=Path, help="folder for samples.png and loss.png (default: the base's)")
    parser.add_argument("--log", type=Path, help="log.jsonl of the U-Net's training: draws loss.png")
    parser.add_argument("--data", type=Path, help="training pictures: shows them below the samples")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="data folder: counts for how many of its files, "
                        "drawn from the captions that they have in --data, the picture in --data is the nearest")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), help="what to draw")
    parser.add_argument("--style", help="word for the style, put behind each prompt after a comma")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.measure and not args.data:
        parser.error("--measure compares with the pictures of --data: give it too")
    prompts = [f"{prompt}，{args.style}" for prompt in args.prompts] if args.style else args.prompts
    ms.set_context(mode=ms.GRAPH_MODE)
    out = args.out or args.base
    try:
        out.mkdir(parents=True, exist_ok=True)
        base = load_base(args.base)
        pictures = draw(base, prompts, args.seed, args.guidance, args.steps)
        if args.data:
            pictures = with_originals(pictures, prompts, args.data, 8)
        grid(pictures, 8, 3).save(out / "samples.png")
        if args.measure:
            print(measure(base, args.data, args.measure, args))
        if args.log:
            curve(args.log, out / "loss.png")
    except (BaseError, DataError, ValueError, OSError) as error:
        print(f"report_base.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
