"""Fine-tunes a Wukong-style text-to-image model with LoRA, on a folder of captioned images.

    python finetune.py --config configs/wukong_tiny.yaml                       # the demo's run, on CPU
    python finetune.py --config configs/wukong_tiny.yaml --rank 8 --steps 200 --out /tmp/more
    python finetune.py --data my/images --base base --lr 5e-4 --steps 1000 --save-every 100
    python finetune.py --data my/images --base base --lr 5e-4 --steps 1000 --save-every 100 --resume
    python finetune.py --data my/dog --instance-prompt 一只小狗 --class-prompt 狗脸      # DreamBooth
    python finetune.py --config configs/wukong_full_lora.yaml --base wukong-huahua-ms.ckpt --data my/images
    msrun --worker_num=2 --local_worker_num=2 --join=True finetune.py --parallel data --data my/images

A folder of data holds images and a CSV file with the columns dir,text, or metadata.jsonl. The run writes into --out:
adapter/ (PEFT's layout), report.html, log.jsonl, settings.yaml, results.json, loss.png, and with --save-every
checkpoints/. Relative paths count from the working directory. Ctrl-C and SIGTERM save a checkpoint first; --resume goes
on from it.
"""

import argparse
import json
import sys
from pathlib import Path

import extras  # noqa: F401  # isort: skip  # first, to say which packages are missing
import latents
import numpy as np
import pipeline
import run_folder
from base import Base, BaseError
from data import DataError, Pictures, bucket_shapes, load_buckets, load_image
from errors import Parser, UserError, explained, run_script
from latents import Batches, Examples
from layers import use_plain_operators
from pictures import save_image, save_loss_curve
from report import write_report
from samplers import GuidedStep
from settings import FIELDS, Settings, add_flags, read
from training import DRAWING, Run, Trained, denoising_loss, make_step, say, train

from mindpet_lite import (
    LoraConfig,
    TrainingState,
    freeze_delta,
    freeze_modules,
    get_pet_model,
    init_data_parallel,
    net_recompute,
)
from mindpet_lite.graph import TrainableReport
from mindpet_lite.train import Ranks, gradient_bytes

FLAGS = [name for name in FIELDS if name != "model"]


def read_data(folder: Path, base: Base, settings: Settings, ranks: Ranks) -> list[Pictures]:
    """Images and captions of a folder, by shape; says how many rows were skipped, and why."""
    multiple = pipeline.side_multiple(base)
    if settings.image_size % multiple:
        raise UserError(f"image_size must be a multiple of {multiple} for this base, got {settings.image_size}")
    buckets, skipped = load_buckets(folder, bucket_shapes(settings.image_size, settings.buckets, multiple))
    count = sum(len(one.texts) for one in buckets)
    say(ranks, f"{folder}: {count} images" + (f", {len(skipped)} rows skipped" if skipped else ""))
    for message in skipped[:10]:
        say(ranks, f"  skipped: {message}")
    if settings.buckets > 1:
        for one in buckets:
            say(ranks, f"  {one.images.shape[3]} x {one.images.shape[2]}: {len(one.texts)} images")
    return buckets


def adapt(base: Base, settings: Settings) -> TrainableReport:
    """Puts LoRA into the models that train, and freezes the rest.

    Raises:
        UserError: The target modules hit nothing, or something that LoRA cannot adapt.
    """
    targets = [(base.unet, settings.target_modules)]
    if settings.train_text_encoder:
        targets.append((base.text_encoder, settings.text_target_modules))
    else:
        freeze_modules(base.text_encoder, include=["*"])
    freeze_modules(base.autoencoder, include=["*"])
    for net, names in targets:
        with explained("LoRA cannot be put into the model", ValueError, TypeError):
            get_pet_model(net, LoraConfig(lora_rank=settings.lora_rank, lora_alpha=settings.lora_alpha,
                                          lora_dropout=settings.lora_dropout, target_modules=names))
    if settings.recompute:
        net_recompute(base.unet, r"(input_blocks|output_blocks)\.\d+|middle_block")
        use_plain_operators(base.unet)
    return freeze_delta(base.unet, "lora")


def open_folder(settings: Settings, trained: Trained) -> None:
    """Makes the folder of a run, or clears it, and writes what can be written before the training.

    A disk that is full, or an adapter that cannot be saved, shows now and not at the end.
    """
    out = settings.out
    if settings.overwrite:
        run_folder.clear(out)
    out.mkdir(parents=True, exist_ok=True)
    run_folder.save_settings(settings)
    if not settings.resume:
        trained.save(out)


def class_pictures(base: Base, settings: Settings) -> Pictures:
    """DreamBooth's class images: what the base draws of the class prompt before it is trained, kept in the folder."""
    prompts = [str(settings.class_prompt)] * settings.class_images
    files = [settings.out / "class_images" / f"{i:03d}.png" for i in range(settings.class_images)]
    if not all(file.is_file() for file in files):
        shape = pipeline.latent_shape(base, settings.image_size)
        noise = pipeline.start_noise(shape, len(prompts), settings.seed + 1)
        images = pipeline.generate(base, GuidedStep(base.unet, base.schedule.prediction), prompts, noise, **DRAWING)
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for image, file in zip(images, files):
            save_image(image, file)
    return Pictures(np.stack([load_image(file, settings.image_size, settings.image_size) for file in files]), prompts)


def prepare(settings: Settings, ranks: Ranks, base: Base) -> tuple[Run, list[Examples], dict[str, float]]:
    """Reads the data, adapts the base and makes the step. Whatever can be wrong shows before the folder changes.

    Returns:
        The run, the held-out examples, and what is known before the training.
    """
    run_folder.check(settings)
    buckets = read_data(settings.data, base, settings, ranks)
    if settings.instance_prompt:
        buckets = [one._replace(texts=[settings.instance_prompt] * len(one.texts)) for one in buckets]
    heldout_folder = settings.heldout_folder()
    heldout = read_data(heldout_folder, base, settings, ranks) if heldout_folder else []
    report = adapt(base, settings)
    say(ranks, str(report))
    trained = Trained(base, settings)
    step, rates = make_step(base, settings, trained)
    if ranks.is_first:
        open_folder(settings, trained)
    say(ranks, f"each of {ranks.size} processes sends {gradient_bytes(step.optimizer.parameters):,} bytes of gradients "
               f"for an update" if ranks.size > 1 else "computing latents and text vectors")
    examples = [latents.encode(base, one, settings, settings.random_flip) for one in buckets]
    prior = latents.encode(base, class_pictures(base, settings), settings, settings.random_flip) \
        if settings.class_prompt else None
    batches = Batches(base, examples, prior, settings, ranks.rank, ranks.size)
    state = TrainingState(settings.out / run_folder.CHECKPOINTS, trained if settings.train_text_encoder else base.unet,
                          step, batches.sampler, settings.keep, run_folder.lasting(settings))
    unseen = [latents.encode(base, one, settings, flip=False) for one in heldout]
    measured = {"trainable": report.trainable, "parameters": report.total,
                "images": sum(len(one.texts) for one in buckets)}
    return Run(settings, base, ranks, trained, batches, step, state, rates), unseen, measured


def finetune(settings: Settings, base: Base, ranks: Ranks | None = None) -> dict[str, float]:
    """Adapts the base in place, trains the adapter, and writes all that a run leaves into its folder.

    Returns:
        What was measured, by the name it has in results.json.

    Raises:
        UserError: The settings do not fit the base, or the loss is not finite.
        DataError: There is no usable image.
        Stopped: A signal came; a checkpoint was saved.
        OSError: The folder cannot be written, or the disk is full.
    """
    ranks = ranks or Ranks()
    run, unseen, measured = prepare(settings, ranks, base)
    if unseen:
        measured["heldout_loss_base"] = denoising_loss(base, unseen, settings)
    if settings.resume:
        with explained("--resume", ValueError):
            say(ranks, f"going on after step {run.state.resume()}")
    losses = train(run)
    if unseen:
        measured["heldout_loss_adapter"] = denoising_loss(base, unseen, settings)
        before, after = measured["heldout_loss_base"], measured["heldout_loss_adapter"]
        say(ranks, f"held-out denoising loss: {before:.4f} base, {after:.4f} adapter "
                   f"({100 * (after / before - 1):+.1f}%)")
    if ranks.is_first:
        save_results(run, losses, measured)
    return measured


def save_results(run: Run, losses: list[float], measured: dict[str, float]) -> None:
    """Writes the adapter, its averages, the curve and the figures."""
    out = run.settings.out
    adapter = run.trained.save(out)
    if run.step.ema is not None:
        with run.step.ema.applied():
            run.trained.save(out / "ema")
    measured |= {"adapter_bytes": size_of(adapter), "base_bytes": size_of(run.settings.base)}
    save_loss_curve(losses, out / "loss.png")
    save_figures(run.settings, measured)


def save_figures(settings: Settings, measured: dict[str, float]) -> None:
    """Writes results.json and report.html."""
    (settings.out / "results.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    write_report(settings.out, run_folder.plain(settings), measured)


def size_of(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def whole_run(settings: Settings) -> None:
    """Loads the base, fine-tunes it, and says where the results are."""
    pipeline.use_device(settings)
    with explained("--parallel data", RuntimeError):
        ranks = init_data_parallel() if settings.parallel == "data" else Ranks()
    measured = finetune(settings, pipeline.load_models(settings), ranks)
    if ranks.is_first:
        share = 100 * measured["adapter_bytes"] / measured["base_bytes"]
        print(f"written to {settings.out}: adapter/ ({measured['adapter_bytes']:,} bytes, {share:.2f}% of the base), "
              f"report.html, log.jsonl, settings.yaml, results.json, loss.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    add_flags(parser, FLAGS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parse(argv)
    return run_script("finetune.py", lambda: whole_run(read(arguments)), BaseError, DataError)


if __name__ == "__main__":
    sys.exit(main())
