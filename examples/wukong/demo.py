"""The demo: teaches the small base to draw in ink with LoRA and shows it on prompts it was not trained on.

    python demo.py
    python demo.py --out /tmp/demo --steps 100 --overwrite

Fine-tunes as configs/wukong_tiny.yaml says, then draws with the base and with the adapter from the same noise: four
prompts of the training and eight that are held out. Measures on all held-out names whether the picture of a name is the
one that looks most like it. Writes grid.png, report.html, loss.png, adapter/ and results.json into --out.
"""

import argparse
import sys
import time
from pathlib import Path

import extras  # noqa: F401  # isort: skip  # first, to say which packages are missing
import numpy as np
import pipeline
from base import Base, BaseError
from data import DataError, load_folder, read_captions
from errors import Parser, UserError, run_script
from finetune import finetune, save_figures
from pictures import save_grid
from prepare_data import DEMO
from recognition import Found, found
from samplers import GuidedStep
from settings import HERE, Settings, add_flags, read
from training import DRAWING

from mindpet_lite import merge, set_lora_scale

FLAGS = ["base", "data", "out", "overwrite", "steps", "seed", "device", "mode"]
# Of the training's pictures, four that anybody recognises.
TRAINED = ("1F436", "1F352", "1F981", "1F96A")
MEASURED = 100


def prompts_of(folder: Path, hexcodes: tuple[str, ...]) -> list[str]:
    """The captions of some emoji of a data folder.

    Raises:
        UserError: The folder does not hold them.
    """
    texts = {sample.path.stem.upper(): sample.text for sample in read_captions(folder)[0]}
    missing = [code for code in hexcodes if code not in texts]
    if missing:
        raise UserError(f"the demo draws {len(hexcodes)} emoji of {folder}, and {missing[0].lower()}.png is not in it: "
                        "leave --data out, or use finetune.py for data of your own")
    return [texts[code] for code in hexcodes]


class Drawing:
    """Draws prompts with a base, always from the same noise; a net that was changed is compiled anew."""

    def __init__(self, base: Base, settings: Settings) -> None:
        self.base, self.settings = base, settings
        self.step = GuidedStep(base.unet, base.schedule.prediction)

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Pictures (n, 3, s, s), the noise of each prompt from its place in the list."""
        noise = pipeline.start_noise(pipeline.latent_shape(self.base, self.settings.image_size), len(prompts),
                                     self.settings.seed)
        return pipeline.generate(self.base, self.step, prompts, noise, **DRAWING)


def grey(images: np.ndarray) -> np.ndarray:
    """The same pictures without colour."""
    return np.repeat(images.mean(axis=1, keepdims=True), 3, axis=1)


def demonstrate(settings: Settings) -> None:
    """The whole demo."""
    started = time.monotonic()
    heldout = settings.heldout_folder()
    if heldout is None:
        raise UserError(f"no folder heldout beside {settings.data}: the demo measures on it")
    prompts = prompts_of(settings.data, TRAINED) + prompts_of(heldout, DEMO)
    pipeline.use_device(settings)
    base = pipeline.load_models(settings)
    targets, names, _ = load_folder(heldout, settings.image_size)
    trained, trained_names, _ = (part[:MEASURED] for part in load_folder(settings.data, settings.image_size))
    print(f"drawing {len(prompts)} prompts and {len(names)} held-out names with the base")
    draw = Drawing(base, settings)
    before, before_all = draw(prompts), draw(names)
    through = pipeline.decode_latents(base, pipeline.encode_images(base, targets))
    measured = finetune(settings, base)
    print("drawing the same with the adapter, at half its strength, with scale 0, and merged")
    draw = Drawing(base, settings)
    after, after_all, after_trained = draw(prompts), draw(names), draw(trained_names)
    set_lora_scale(base.unet, 0.5)
    half = draw(prompts)
    set_lora_scale(base.unet, 0)
    off = draw(prompts)
    set_lora_scale(base.unet, 1)
    merge(base.unet)
    merged = Drawing(base, settings)(prompts)
    save_grid({"base": before, "adapter x 0.5": half, "adapter": after}, prompts, settings.out / "grid.png")
    recognised = {"adapter, held-out names": found(after_all, targets),
                  "adapter, names of the training": found(after_trained, trained),
                  "base in grey, held-out names": found(grey(before_all), targets),
                  "the targets through the autoencoder": found(through, targets)}
    results = {
        **measured,
        "saturation_base": pipeline.saturation(before_all), "saturation_adapter": pipeline.saturation(after_all),
        "recognised": {name: one._asdict() for name, one in recognised.items()},
        "scale_0_equals_base": bool(np.array_equal(off, before)),
        "merged_difference": float(np.abs(merged - after).max()),
        "seconds": time.monotonic() - started,
    }
    save_figures(settings, results)
    report(results, recognised, settings.out)


def report(results: dict, recognised: dict[str, Found], out: Path) -> None:
    """Prints what was measured and where the results are."""
    def fall(name: str) -> str:
        before, after = results[f"{name}_base"], results[f"{name}_adapter"]
        return f"{before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f}%)"

    rows = "\n".join(f"  {name:36} {one}" for name, one in recognised.items())
    print(f"""
the name's own picture is the nearest, or one of the five nearest
{rows}
colour saturation            {fall("saturation")}
held-out denoising loss      {fall("heldout_loss")}
scale 0 gives base's images  {"bit for bit" if results["scale_0_equals_base"] else "NO"}
merged against adapter       {results["merged_difference"]:.1e} at most
adapter file against base    {100 * results["adapter_bytes"] / results["base_bytes"]:.2f}%
trainable                    {results["trainable"]:,} of {results["parameters"]:,}
time                         {results["seconds"]:.0f} s

{out / "grid.png"}       four names of the training and eight held out: base, adapter at strength 0.5 and 1
{out / "report.html"}
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
    return run_script("demo.py", lambda: demonstrate(read(arguments)), BaseError, DataError)


if __name__ == "__main__":
    sys.exit(main())
