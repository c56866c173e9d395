"""Draws pictures from prompts with a Wukong-style base, with or without a LoRA adapter.

    python txt2img.py 狐狸，扁平 熊猫，立体                                        # the base
    python txt2img.py 狐狸，黑白 --adapter out/finetune/adapter                   # the adapter
    python txt2img.py 狐狸，黑白 --adapter out/finetune/adapter --scale 0.5       # half of it
    python txt2img.py --prompts prompts.txt --adapter out/finetune/adapter --merge --out /tmp/pictures
    python txt2img.py 狐狸 --config configs/wukong_full_lora.yaml --base wukong-huahua-ms.ckpt --adapter adapter

Writes 00.png, 01.png, ... and grid.png into --out; --overwrite deletes the pictures of an earlier call. The same seed
gives the same noise for the same place in the list of prompts, whatever the adapter. A file of prompts holds one a
line. --config names the file of the fine-tuning.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import extras  # noqa: F401  # isort: skip  # first, to say which packages are missing
import pipeline
from base import Base, BaseError
from errors import Parser, UserError, explained, run_script
from pictures import save_grid, save_image
from samplers import SOLVERS, GuidedStep, sampling_times
from settings import HERE, Settings, add_flags, read
from tokenizer import remarks

from mindpet_lite import load_adapter, merge, set_lora_scale

FLAGS = ["base", "allow_missing", "image_size", "prediction", "fp16", "seed", "device", "mode"]
PICTURE = re.compile(r"\d+\.png|grid\.png")


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        UserError: There are none, or the file cannot be read.
    """
    prompts = list(arguments.prompt)
    if arguments.prompts:
        with explained(f"{arguments.prompts} cannot be read as UTF-8 text", OSError, UnicodeDecodeError):
            prompts += arguments.prompts.read_text(encoding="utf-8-sig").splitlines()
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError("no prompt: give some, such as 狐狸，扁平 熊猫，立体, or --prompts FILE with one a line")
    return prompts


def put_adapter(base: Base, arguments: argparse.Namespace) -> str:
    """Loads, scales and merges the adapter as the arguments say; returns a label for the pictures.

    Raises:
        UserError: The adapter is missing, damaged or does not fit the base.
    """
    if arguments.adapter is None:
        return "base"
    with explained("the adapter cannot be used", OSError, ValueError, TypeError):
        for net, adapter in ((base.unet, arguments.adapter), (base.text_encoder, arguments.text_encoder_adapter)):
            if adapter is not None:
                load_adapter(net, adapter)
                set_lora_scale(net, arguments.scale)
                if arguments.merge:
                    merge(net)
    return ("merged" if arguments.merge else "adapter") + (f" x {arguments.scale:g}" if arguments.scale != 1 else "")


def check_folder(out: Path, overwrite: bool) -> None:
    """Refuses a folder with something in it, or with `overwrite` with anything but pictures of this script.

    Raises:
        UserError: With what to do.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a folder")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if found and not overwrite:
        raise UserError(f"{out} holds {found[0]} already: give --overwrite to delete the pictures there, or another "
                        "--out")
    others = [name for name in found if not PICTURE.fullmatch(name)]
    if others:
        raise UserError(f"--overwrite deletes pictures of this script, and {out} holds {others[0]}, which is none: "
                        "give another --out")


def draw(settings: Settings, arguments: argparse.Namespace) -> None:
    """The whole run."""
    prompts, out = read_prompts(arguments), arguments.out
    check_folder(out, arguments.overwrite)
    pipeline.use_device(settings)
    base = pipeline.load_models(settings)
    with explained("--steps", ValueError):
        sampling_times(base.schedule, arguments.steps)
    shape = pipeline.latent_shape(base, settings.image_size)
    label = put_adapter(base, arguments)
    noise = pipeline.start_noise(shape, len(prompts), settings.seed)
    for remark in remarks(base.tokenizer, prompts):
        print(f"txt2img.py: warning: {remark}", file=sys.stderr)
    images = pipeline.generate(base, GuidedStep(base.unet, base.schedule.prediction), prompts, noise,
                               solver=arguments.sampler, steps=arguments.steps, guidance=arguments.guidance)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    for i, image in enumerate(images):
        save_image(image, out / f"{i:02d}.png")
    save_grid({label: images}, prompts, out / "grid.png")
    print(f"written to {out}: {len(prompts)} images and grid.png; saturation {pipeline.saturation(images):.3f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = Parser(__doc__)
    parser.add_argument("prompt", nargs="*", help="what to draw, in Chinese")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="file with one prompt a line")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapter that finetune.py wrote")
    parser.add_argument("--text-encoder-adapter", type=Path, metavar="FOLDER",
                        help="that of the text encoder, where it was trained too")
    parser.add_argument("--scale", type=float, default=None, help="strength of the adapter; 0 is the base (default: 1)")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the weights before drawing")
    parser.add_argument("--sampler", choices=SOLVERS, default="dpm++", help="solver (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="calls of the U-Net (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=5.0, help="1 is the plain model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "pictures", help="folder to write (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="delete the pictures that are in --out")
    add_flags(parser, FLAGS)
    arguments = parser.parse_args(argv)
    if arguments.adapter is None and (arguments.scale is not None or arguments.merge):
        parser.error("--scale and --merge need --adapter FOLDER")
    if not math.isfinite(arguments.guidance):
        parser.error(f"--guidance must be a finite number, got {arguments.guidance}")
    arguments.scale = 1.0 if arguments.scale is None else arguments.scale
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parse(argv)
    return run_script("txt2img.py", lambda: draw(read(arguments), arguments), BaseError)


if __name__ == "__main__":
    sys.exit(main())
