"""The demo: teaches the small base a black-and-white style with LoRA and shows it on prompts it was not trained on.

    python demo.py
    python demo.py --out /tmp/demo --steps 100

Fine-tunes as configs/wukong_tiny.yaml says, then draws eight held-out prompts with the base and with the adapter from
the same noise. Writes grid.png (base above, adapter below), loss.png, adapter/ and results.json into --out.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pipeline
from base import BaseError
from data import DataError
from errors import Parser, UserError, run
from finetune import all_or_nothing, finetune
from pictures import NAMES, save_grid
from prepare_data import DEMO
from samplers import GuidedStep
from settings import HERE, Settings, add_flags, read

from mindpet_lite import merge, set_lora_scale

FLAGS = ["base", "data", "out", "steps", "seed", "device", "mode"]
DRAWING = {"solver": "dpm++", "steps": 25, "guidance": 3.0}


def read_prompts() -> list[str]:
    """The Chinese names of the eight emoji that are held out whatever the draw says."""
    try:
        names = json.loads(NAMES.read_text(encoding="utf-8"))
        return [names[f"{hexcode.lower()}.png"]["zh"] for hexcode in DEMO]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{NAMES} is missing or damaged ({type(error).__name__}): restore it from the repository"
                        ) from None


def demonstrate(settings: Settings) -> None:
    """The whole demo."""
    started = time.monotonic()
    prompts = read_prompts()
    pipeline.use_device(settings)
    base = pipeline.load_models(settings)
    noise = pipeline.start_noise(pipeline.latent_shape(base, settings.image_size), len(prompts), settings.seed)

    def draw(step: GuidedStep) -> np.ndarray:
        return pipeline.generate(base, step, prompts, noise, **DRAWING)

    with all_or_nothing(settings.out) as out:
        print(f"drawing {' '.join(prompts)} with the base")
        before = draw(GuidedStep(base.unet))
        measured = finetune(settings, base, out)
        print("drawing the same with the adapter, with scale 0, and merged")
        step = GuidedStep(base.unet)
        after = draw(step)
        set_lora_scale(base.unet, 0)
        off = draw(step)
        set_lora_scale(base.unet, 1)
        merge(base.unet)
        merged = draw(GuidedStep(base.unet))
        save_grid({"base": before, "adapter": after}, prompts, out / "grid.png")
        results = {
            **measured,
            "saturation_base": pipeline.saturation(before), "saturation_adapter": pipeline.saturation(after),
            "scale_0_equals_base": bool(np.array_equal(off, before)),
            "merged_difference": float(np.abs(merged - after).max()),
            "seconds": time.monotonic() - started,
        }
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report(results, settings.out)


def report(results: dict, out: Path) -> None:
    """Prints what was measured and where the results are."""
    def fall(name: str) -> str:
        before, after = results[f"{name}_base"], results[f"{name}_adapter"]
        return f"{before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f}%)"

    print(f"""
colour saturation            {fall("saturation")}
held-out denoising loss      {fall("heldout_loss")}
scale 0 gives base's images  {"bit for bit" if results["scale_0_equals_base"] else "NO"}
merged against adapter       {results["merged_difference"]:.1e} at most
adapter file against base    {100 * results["adapter_bytes"] / results["base_bytes"]:.2f}%
trainable                    {results["trainable"]:,} of {results["parameters"]:,}
time                         {results["seconds"]:.0f} s

{out / "grid.png"}       base above, adapter below
{out / "loss.png"}
{out / "adapter"}
{out / "results.json"}""")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    add_flags(parser, FLAGS)
    parser.set_defaults(config=HERE / "configs" / "wukong_tiny.yaml", out=HERE / "out" / "demo")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parse(argv)
    return run("demo.py", lambda: demonstrate(read(arguments)), BaseError, DataError)


if __name__ == "__main__":
    sys.exit(main())
