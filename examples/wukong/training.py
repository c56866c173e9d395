"""The training of the adapter: its loss, its step, and the loop around it."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import pipeline
import run_folder
from base import Base
from diffusion import DiffusionLoss, TextToImageLoss, draw_noise
from errors import Stopped, UserError
from latents import Batches, Examples
from mindspore import nn
from pictures import save_grid
from samplers import GuidedStep
from settings import Settings
from tqdm import tqdm

from mindpet_lite import DeltaEMA, GradientAccumulation, Interrupts, TrainingState, lora_plus_groups, save_adapter
from mindpet_lite.train import Ranks

# How pictures are drawn while training and in the demo.
DRAWING = {"solver": "dpm++", "steps": 25, "guidance": 3.0}


def learning_rates(peak: float, last: float, warmup: int, steps: int) -> list[float]:
    """Linear warm-up to ``peak``, then half a cosine down to ``last``; one value per step."""
    rising = [peak * (i + 1) / warmup for i in range(min(warmup, steps))]
    rest = steps - len(rising)
    return rising + [last + (peak - last) * 0.5 * (1 + float(np.cos(np.pi * i / rest))) for i in range(rest)]


class Trained(nn.Cell):
    """The models that train, as one net; the names of their parameters stay as they are."""

    def __init__(self, base: Base, settings: Settings) -> None:
        super().__init__(auto_prefix=False)
        self.unet = base.unet
        self.text_encoder = base.text_encoder if settings.train_text_encoder else None

    def save(self, folder: Path) -> Path:
        """Writes the adapter of each model; returns that of the U-Net."""
        if self.text_encoder is not None:
            save_adapter(self.text_encoder, folder / "text_encoder_adapter")
        return save_adapter(self.unet, folder / "adapter")


@dataclass
class Run:
    """What a run has in hand while it trains."""

    settings: Settings
    base: Base
    ranks: Ranks
    trained: Trained
    batches: Batches
    step: GradientAccumulation
    state: TrainingState
    rates: list[float]


def say(ranks: Ranks, text: str) -> None:
    """Prints, in the first process only."""
    if ranks.is_first:
        print(text, flush=True)


def loss_of(base: Base, settings: Settings) -> nn.Cell:
    """The loss of a batch of `Batches`."""
    prior = settings.prior_loss_weight if settings.class_prompt else None
    loss = DiffusionLoss(base.unet, base.schedule, settings.min_snr_gamma, prior)
    return TextToImageLoss(loss, base.text_encoder) if settings.train_text_encoder else loss


def denoising_loss(base: Base, examples: list[Examples], settings: Settings) -> float:
    """Mean loss over all images and `heldout_draws` noises and times each, always the same ones."""
    rng = np.random.default_rng([settings.seed, 1])
    loss: nn.Cell = DiffusionLoss(base.unet, base.schedule)
    loss = TextToImageLoss(loss, base.text_encoder) if settings.train_text_encoder else loss
    size, losses = settings.batch_size, []
    for one in examples:
        count = len(one.text) * settings.heldout_draws
        order = np.resize(np.arange(len(one.text)), math.ceil(count / size) * size)
        for rows in order.reshape(-1, size):
            values = one.latents[0, rows]
            timesteps, noise = draw_noise(rng, values.shape, base.schedule)
            losses.append(float(loss(*map(ms.Tensor, (values, one.text[rows], timesteps, noise))).asnumpy()))
    return float(np.mean(losses))


def make_step(base: Base, settings: Settings, trained: Trained) -> tuple[GradientAccumulation, list[float]]:
    """The training step: loss, gradients, clipping, AdamW, averages; and the rate of each update."""
    updates = -(-settings.steps // settings.gradient_accumulation)
    rates = learning_rates(settings.learning_rate, settings.final_learning_rate, settings.warmup_steps, updates)
    parameters = trained.trainable_params() if settings.lora_plus_ratio == 1 else \
        lora_plus_groups(trained, rates, settings.lora_plus_ratio)
    optimizer = nn.AdamWeightDecay(parameters, rates, weight_decay=settings.weight_decay)
    scaler = ms.amp.DynamicLossScaler(settings.loss_scale, 2, 1000) if settings.fp16 else None
    ema = DeltaEMA(trained, settings.ema_decay, warm_up=True) if settings.ema_decay else None
    return GradientAccumulation(loss_of(base, settings), optimizer, settings.gradient_accumulation,
                                settings.clip_norm, scaler, ema), rates


def until(batches: Batches, last: int) -> Iterator[tuple[np.ndarray, ...]]:
    """The batches up to a step."""
    stream = iter(batches)
    while batches.sampler.step < last:
        yield next(stream)


def train(run: Run) -> list[float]:
    """Trains the adapter from the step that its sampler is at; returns the loss of every step.

    Raises:
        Stopped: A signal came; a checkpoint was saved.
        UserError: The loss is not finite.
    """
    settings, sampler = run.settings, run.batches.sampler
    log = run_folder.Log(settings.out, sampler.step) if run.ranks.is_first else None
    drawing = GuidedStep(run.base.unet, run.base.schedule.prediction)
    run.trained.set_train(True)
    with Interrupts() as interrupts, progress(run) as bar:
        for batch in until(run.batches, settings.steps):
            started, number = time.monotonic(), sampler.step
            loss = float(run.step(*map(ms.Tensor, batch)).asnumpy())
            if not settings.fp16 and not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {number}: lower learning_rate")
            bar.update()
            stopped = interrupts.number
            if log is not None:
                seconds = time.monotonic() - started
                rate = run.rates[(number - 1) // settings.gradient_accumulation]
                log.add(step=number, loss=loss, rate=rate, norm=run.step.norm, seconds=round(seconds, 4),
                        images_per_second=round(len(batch[0]) * run.ranks.size / seconds, 2))
                bar.set_postfix(loss=f"{np.mean(log.losses(20)):.4f}", lr=f"{rate:.1e}", refresh=False)
                if is_due(settings.save_every, number) or stopped:
                    run.state.save()
                if is_due(settings.validation_every, number):
                    validate(run, drawing)
            if stopped and number < settings.steps:
                raise Stopped(f"stopped after step {number}, which is saved in {run.state.directory}: --resume goes on "
                              f"from it", interrupts.exit_code)
    run.step.flush()
    run.trained.set_train(False)
    return log.losses() if log is not None else []


def is_due(every: int, number: int) -> bool:
    """Whether something that is done every so many steps is done after this one; 0 is never."""
    return every > 0 and number % every == 0


def validate(run: Run, drawing: GuidedStep) -> None:
    """Draws the validation prompts with the adapter as it is now."""
    settings, prompts = run.settings, run.settings.validation_prompts
    number, folder = run.batches.sampler.step, settings.out / "validation"
    noise = pipeline.start_noise(pipeline.latent_shape(run.base, settings.image_size), len(prompts), settings.seed)
    run.trained.set_train(False)
    images = pipeline.generate(run.base, drawing, prompts, noise, **DRAWING)
    run.trained.set_train(True)
    folder.mkdir(exist_ok=True)
    save_grid({f"step {number}": images}, prompts, folder / f"step-{number:06d}.png")


def progress(run: Run) -> tqdm:
    """The bar of the training. The line before it says how long the compiler may take."""
    if run.settings.mode == "graph":
        say(run.ranks, "compiling the training step: half a minute for the small base, several minutes at full size")
    return tqdm(total=run.settings.steps, initial=run.batches.sampler.step, unit="step", desc="fine-tuning",
                mininterval=1, disable=not run.ranks.is_first)
