"""Draws pictures from prompts with a Wukong-style base, with or without a LoRA adapter.

    python txt2img.py 狐狸 熊猫                                                # the base
    python txt2img.py 狐狸 熊猫 --adapter out/finetune/adapter                 # the adapter
    python txt2img.py 狐狸 熊猫 --adapter out/finetune/adapter --scale 0.5     # half of it
    python txt2img.py --prompts prompts.txt --adapter out/finetune/adapter --merge --out /tmp/pictures
    python txt2img.py 狐狸 --config configs/wukong_full_lora.yaml --base wukong-huahua-ms.ckpt --adapter adapter

Writes 00.png, 01.png, ... and grid.png into --out. The same seed gives the same noise for the same place in the list of
prompts, whatever the adapter. A file of prompts holds one a line. --config names the file of the fine-tuning.
"""

import argparse
import math
import sys
from pathlib import Path

import pipeline
from base import Base, BaseError
from errors import Parser, UserError, explained, run
from finetune import all_or_nothing
from pictures import save_grid, save_image
from samplers import SOLVERS, GuidedStep, sampling_times
from settings import HERE, Settings, add_flags, read
from tokenizer import remarks

from mindpet_lite import load_adapter, merge, set_lora_scale

FLAGS = ["base", "image_size", "fp16", "seed", "device", "mode"]


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
        raise UserError("no prompt: give some, such as 狐狸 熊猫, or --prompts FILE with one a line")
    return prompts


def put_adapter(base: Base, arguments: argparse.Namespace) -> str:
    """Loads, scales and merges the adapter as the arguments say; returns a label for the pictures.

    Raises:
        UserError: The adapter is missing, damaged or does not fit the base.
    """
    if arguments.adapter is None:
        return "base"
    with explained("the adapter cannot be used", OSError, ValueError, TypeError):
        load_adapter(base.unet, arguments.adapter)
        set_lora_scale(base.unet, arguments.scale)
        if arguments.merge:
            merge(base.unet)
    return ("merged" if arguments.merge else "adapter") + (f" x {arguments.scale:g}" if arguments.scale != 1 else "")


def draw(settings: Settings, arguments: argparse.Namespace) -> None:
    """The whole run."""
    prompts = read_prompts(arguments)
    pipeline.use_device(settings)
    base = pipeline.load_models(settings)
    with explained("--steps", ValueError):
        sampling_times(base.schedule, arguments.steps)
    shape = pipeline.latent_shape(base, settings.image_size)
    label = put_adapter(base, arguments)
    noise = pipeline.start_noise(shape, len(prompts), settings.seed)
    for remark in remarks(base.tokenizer, prompts):
        print(f"txt2img.py: warning: {remark}", file=sys.stderr)
    with all_or_nothing(arguments.out) as out:
        images = pipeline.generate(base, GuidedStep(base.unet), prompts, noise, solver=arguments.sampler,
                                   steps=arguments.steps, guidance=arguments.guidance)
        for i, image in enumerate(images):
            save_image(image, out / f"{i:02d}.png")
        save_grid({label: images}, prompts, out / "grid.png")
    print(f"written to {arguments.out}: {len(prompts)} images and grid.png; "
          f"saturation {pipeline.saturation(images):.3f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = Parser(__doc__)
    parser.add_argument("prompt", nargs="*", help="what to draw, in Chinese")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="file with one prompt a line")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapter that finetune.py wrote")
    parser.add_argument("--scale", type=float, default=None, help="strength of the adapter; 0 is the base (default: 1)")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the weights before drawing")
    parser.add_argument("--sampler", choices=SOLVERS, default="dpm++", help="solver (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="calls of the U-Net (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=5.0, help="1 is the plain model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "pictures", help="folder to write (%(default)s)")
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
    return run("txt2img.py", lambda: draw(read(arguments), arguments), BaseError)


if __name__ == "__main__":
    sys.exit(main())
