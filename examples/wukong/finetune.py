"""Fine-tunes the U-Net of a Wukong-style text-to-image model with LoRA, on a folder of captioned images.

    python finetune.py --config configs/wukong_tiny.yaml                       # the demo's run, on CPU
    python finetune.py --config configs/wukong_tiny.yaml --rank 8 --steps 200 --out /tmp/more
    python finetune.py --data my/images --base base --lr 5e-4 --steps 1000
    python finetune.py --config configs/wukong_full_lora.yaml --base wukong-huahua-ms.ckpt --data my/images

A folder of data holds images and a CSV file with the columns dir,text. The run writes adapter/ (PEFT's layout),
loss.png and results.json into --out, all of them when it is through, or none. Relative paths count from the working
directory.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import pipeline
from base import Base, BaseError
from data import DataError, epochs, load_folder
from diffusion import DiffusionLoss, draw_noise
from errors import Parser, UserError, explained, run, sentence
from mindspore import nn, ops
from pictures import save_loss_curve
from settings import FIELDS, Settings, add_flags, read
from tqdm import tqdm
from training import learning_rates

from mindpet_lite import LoraConfig, freeze_delta, get_pet_model, lora_plus_groups, save_adapter
from mindpet_lite.graph import TrainableReport

FLAGS = [name for name in FIELDS if name != "model"]


@dataclass(frozen=True)
class Examples:
    """Images and captions as the U-Net reads them: latents (n, C, h, w) and text vectors (n, L, D)."""

    latents: np.ndarray
    context: np.ndarray


class TrainStep(nn.Cell):
    """Loss, gradients, clipping and AdamW in one graph; in float16 with a dynamic loss scale.

    A step whose scaled gradients overflow changes no weight and halves the scale; 1000 good ones in a row double it.

    Args:
        loss: A cell that gives a scalar.
        optimizer: Its parameters are trained.
        clip_norm: Largest norm of all gradients together.
        loss_scale: First loss scale; None for none.
    """

    def __init__(self, loss: nn.Cell, optimizer: nn.Optimizer, clip_norm: float, loss_scale: float | None) -> None:
        super().__init__(auto_prefix=False)
        self.loss, self.optimizer, self.clip_norm = loss, optimizer, clip_norm
        self.scaler = ms.amp.DynamicLossScaler(loss_scale, 2, 1000) if loss_scale else None
        self.gradients = ms.value_and_grad(self.scaled_loss, None, optimizer.parameters)

    def scaled_loss(self, *batch: ms.Tensor) -> ms.Tensor:
        loss = self.loss(*batch)
        return loss if self.scaler is None else self.scaler.scale(loss)

    def construct(self, *batch: ms.Tensor) -> ms.Tensor:
        loss, gradients = self.gradients(*batch)
        if self.scaler is None:
            return ops.depend(loss, self.optimizer(ops.clip_by_global_norm(gradients, self.clip_norm)))
        finite = ms.amp.all_finite(gradients)
        loss, gradients = self.scaler.unscale(loss), self.scaler.unscale(gradients)
        loss = ops.depend(loss, self.scaler.adjust(finite))
        if finite:
            loss = ops.depend(loss, self.optimizer(ops.clip_by_global_norm(gradients, self.clip_norm)))
        return loss


def read_folder(folder: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """Images and captions of a folder; says how many rows were skipped, and why."""
    images, texts, skipped = load_folder(folder, size)
    print(f"{folder}: {len(texts)} images" + (f", {len(skipped)} rows skipped" if skipped else ""))
    for message in skipped[:10]:
        print(f"  skipped: {message}")
    return images, texts


def encode(base: Base, images: np.ndarray, texts: list[str]) -> Examples:
    """Runs the frozen autoencoder and text encoder once for all steps to come."""
    return Examples(pipeline.encode_images(base, images), pipeline.embed_texts(base, texts))


def adapt(base: Base, settings: Settings) -> TrainableReport:
    """Puts LoRA into the U-Net, freezes the rest, and prints how much trains.

    Raises:
        UserError: The target modules hit nothing, or something that LoRA cannot adapt.
    """
    with explained("LoRA cannot be put into the U-Net", ValueError, TypeError):
        get_pet_model(base.unet, LoraConfig(lora_rank=settings.lora_rank, lora_alpha=settings.lora_alpha,
                                            lora_dropout=settings.lora_dropout, target_modules=settings.target_modules))
    for net in (base.text_encoder, base.autoencoder):
        for parameter in net.get_parameters():
            parameter.requires_grad = False
    report = freeze_delta(base.unet, "lora")
    print(report)
    return report


def denoising_loss(loss: DiffusionLoss, base: Base, examples: Examples, settings: Settings) -> float:
    """Mean loss over all images and `heldout_draws` noises and times each, always the same ones."""
    rng = np.random.default_rng([settings.seed, 1])
    count, size = len(examples.latents) * settings.heldout_draws, settings.batch_size
    order = np.resize(np.arange(len(examples.latents)), math.ceil(count / size) * size)
    losses = []
    for rows in order.reshape(-1, size):
        timesteps, noise = draw_noise(rng, examples.latents[rows].shape, base.schedule)
        inputs = (examples.latents[rows], examples.context[rows], timesteps, noise)
        losses.append(float(loss(*map(ms.Tensor, inputs)).asnumpy()))
    return float(np.mean(losses))


def batches(base: Base, examples: Examples, settings: Settings) -> Iterator[tuple[np.ndarray, ...]]:
    """Endless training batches: latents, context, timesteps and noise; some captions give way to the empty one."""
    rng, empty = np.random.default_rng([settings.seed, 2]), pipeline.embed_texts(base, [""])
    for rows in epochs(len(examples.latents), settings.batch_size, settings.seed):
        latents = examples.latents[rows]
        dropped = rng.random((len(rows), 1, 1)) < settings.caption_dropout
        yield latents, np.where(dropped, empty, examples.context[rows]), *draw_noise(rng, latents.shape, base.schedule)


def train(base: Base, examples: Examples, settings: Settings) -> list[float]:
    """Trains the adapter; returns the loss of every step.

    Raises:
        UserError: The loss is not finite.
    """
    rates = learning_rates(settings.learning_rate, settings.final_learning_rate, settings.warmup_steps, settings.steps)
    trained = base.unet.trainable_params() if settings.lora_plus_ratio == 1 else \
        lora_plus_groups(base.unet, rates, settings.lora_plus_ratio)
    optimizer = nn.AdamWeightDecay(trained, rates, weight_decay=settings.weight_decay)
    loss = DiffusionLoss(base.unet, base.schedule, settings.min_snr_gamma)
    step = TrainStep(loss, optimizer, settings.clip_norm, settings.loss_scale if settings.fp16 else None)
    base.unet.set_train(True)
    losses: list[float] = []
    with tqdm(total=settings.steps, unit="step", desc="fine-tuning", mininterval=1) as bar:
        for batch in batches(base, examples, settings):
            losses.append(float(step(*map(ms.Tensor, batch)).asnumpy()))
            if not settings.fp16 and not math.isfinite(losses[-1]):
                raise UserError(f"the loss became {losses[-1]} at step {len(losses)}: lower learning_rate")
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.4f}", lr=f"{rates[len(losses) - 1]:.1e}", refresh=False)
            bar.update()
            if len(losses) == settings.steps:
                break
    base.unet.set_train(False)
    return losses


@contextlib.contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """Gives a folder beside `out`; when the block ends well, what is in it takes its place in `out`.

    Raises:
        UserError: A folder cannot be made or written, or the disk is full; nothing is left behind.
    """
    out = out.resolve()
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file: give --out a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            yield Path(work)
            for new in [path for path in sorted(Path(work).rglob("*")) if path.is_file()]:
                target = out / new.relative_to(work)
                target.parent.mkdir(parents=True, exist_ok=True)
                new.replace(target)
    except BaseException as error:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or sentence(error)
            raise UserError(f"nothing was written to {out}, because writing failed ({reason}): make room on the disk, "
                            "or give --out a folder that can be written to") from error
        raise


def size_of(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def finetune(settings: Settings, base: Base, out: Path) -> dict[str, float]:
    """Adapts the base in place, trains the adapter, and writes adapter/ and loss.png into a folder that exists.

    Returns:
        What was measured, by the name it has in results.json.

    Raises:
        UserError: The settings do not fit the base, or the loss is not finite.
        DataError: There is no usable image.
        OSError: The folder cannot be written, or the disk is full.
    """
    images, texts = read_folder(settings.data, settings.image_size)
    heldout_folder = settings.heldout_folder()
    heldout = read_folder(heldout_folder, settings.image_size) if heldout_folder else None
    pipeline.latent_shape(base, settings.image_size)
    report = adapt(base, settings)
    # Written before the training too, so that a full disk shows now and not at the end.
    save_adapter(base.unet, out / "adapter")
    adapter_bytes, base_bytes = size_of(out / "adapter"), size_of(settings.base)
    share = 100 * adapter_bytes / base_bytes
    print(f"adapter file: {adapter_bytes:,} bytes, {share:.2f}% of the base's {base_bytes:,}")
    measured: dict[str, float] = {"trainable": report.trainable, "parameters": report.total,
                                  "adapter_bytes": adapter_bytes, "base_bytes": base_bytes}
    loss = DiffusionLoss(base.unet, base.schedule)
    examples = encode(base, images, texts)
    unseen = encode(base, *heldout) if heldout else None
    if unseen:
        measured["heldout_loss_base"] = denoising_loss(loss, base, unseen, settings)
    losses = train(base, examples, settings)
    if unseen:
        measured["heldout_loss_adapter"] = denoising_loss(loss, base, unseen, settings)
        before, after = measured["heldout_loss_base"], measured["heldout_loss_adapter"]
        change = 100 * (after / before - 1)
        print(f"held-out denoising loss: {before:.4f} base, {after:.4f} adapter ({change:+.1f}%)")
    save_adapter(base.unet, out / "adapter")
    save_loss_curve(losses, out / "loss.png")
    return measured


def whole_run(settings: Settings) -> None:
    """Loads the base, fine-tunes it, and puts all results in their place when they are there."""
    pipeline.use_device(settings)
    base = pipeline.load_models(settings)
    with all_or_nothing(settings.out) as out:
        measured = finetune(settings, base, out)
        (out / "results.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(f"written to {settings.out}: adapter/, loss.png, results.json")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    add_flags(parser, FLAGS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parse(argv)
    return run("finetune.py", lambda: whole_run(read(arguments)), BaseError, DataError)


if __name__ == "__main__":
    sys.exit(main())
