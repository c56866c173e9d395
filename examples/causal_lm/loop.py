"""The training of the adapter: its step, the loop around it, and the loss on held-out samples."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import processes
from batches import Batches, Bucket, in_order
from common import Log, Stopped, UserError
from decoder import AnswerLoss, Decoder
from mindspore import nn
from options import Settings
from tqdm import tqdm

from mindpet_lite import GradientAccumulation, Interrupts, TrainingState
from mindpet_lite.train import Ranks


@dataclass
class Run:
    """What a run has in hand while it trains.

    Args:
        ranks: This process, of all.
        share: This process, of those that share the data.
        state: What saves checkpoints; None where none can be saved.
    """

    settings: Settings
    net: Decoder
    ranks: Ranks
    share: Ranks
    batches: Batches
    step: GradientAccumulation
    state: TrainingState | None
    rates: list[float]


def say(ranks: Ranks, text: str) -> None:
    """Prints, in the first process only."""
    if ranks.is_first:
        print(text, flush=True)


def learning_rates(peak: float, last: float, warmup: int, updates: int) -> list[float]:
    """Linear warm-up to ``peak``, then half a cosine down to ``last``; one value for each update."""
    rising = [peak * (i + 1) / warmup for i in range(min(warmup, updates))]
    rest = updates - len(rising)
    return rising + [last + (peak - last) * 0.5 * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def make_step(net: Decoder, settings: Settings, steps: int) -> tuple[GradientAccumulation, list[float]]:
    """The training step: loss, gradients, clipping, AdamW; and the rate of each update."""
    updates = -(-steps // settings.gradient_accumulation)
    warmup = max(1, round(settings.warmup_ratio * updates))
    rates = learning_rates(settings.learning_rate, settings.final_learning_rate, warmup, updates)
    optimizer = nn.AdamWeightDecay(net.trainable_params(), rates, weight_decay=settings.weight_decay)
    return GradientAccumulation(AnswerLoss(net), optimizer, settings.gradient_accumulation,
                                settings.clip_norm or None), rates


class Evaluation:
    """The mean loss of a token of the answers of some samples; compiled once, for before and after.

    Args:
        net: The model.
        buckets: The samples.
        batch_size: Samples at a time.
    """

    def __init__(self, net: Decoder, buckets: Sequence[Bucket], batch_size: int) -> None:
        self.loss, self.buckets, self.batch_size = AnswerLoss(net), buckets, batch_size

    def __call__(self) -> float:
        """The loss now."""
        self.loss.set_train(False)
        sums, tokens = 0.0, 0.0
        for *inputs, total in in_order(self.buckets, self.batch_size):
            sums += float(self.loss(*map(ms.Tensor, (*inputs, total))).asnumpy()) * float(total)
            tokens += float(total)
        return sums / tokens


def train(run: Run) -> list[float]:
    """Trains the adapter from the step that its sampler is at; returns the loss of every step.

    Raises:
        Stopped: A signal came; a checkpoint was saved.
        UserError: The loss is not finite.
    """
    settings, sampler, steps = run.settings, run.batches.sampler, run.batches.steps
    log = Log(settings.out, sampler.step) if run.ranks.is_first else None
    run.net.set_train(True)
    say(run.ranks, f"{steps} steps; the first of each length compiles its graph, a minute for thirty layers"
        if settings.mode == "graph" else f"{steps} steps")
    bar = tqdm(total=steps, initial=sampler.step, unit="step", desc="fine-tuning", mininterval=5,
               disable=not run.ranks.is_first)
    with Interrupts() as interrupts, bar:
        for *inputs, real, total in run.batches:
            started, number, tokens = time.monotonic(), sampler.step, float(real.sum())
            loss = float(run.step(*map(ms.Tensor, (*inputs, real, total))).asnumpy()) * float(total)
            loss, tokens = processes.total(run.share, loss, tokens)
            loss /= tokens
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {number}: lower learning_rate")
            bar.update()
            stopped = interrupts.number
            if stopped and run.state is None:
                raise Stopped(f"stopped after step {number}; no checkpoint was saved", interrupts.exit_code)
            if log is not None:
                seconds = time.monotonic() - started
                rate = run.rates[(number - 1) // settings.gradient_accumulation]
                log.add(step=number, loss=loss, rate=rate, norm=run.step.norm, seconds=round(seconds, 4),
                        tokens=int(tokens), length=inputs[0].shape[1])
                bar.set_postfix(loss=f"{np.mean(log.losses(20)):.4f}", lr=f"{rate:.1e}", refresh=False)
                if run.state is not None and (settings.save_every and number % settings.save_every == 0 or stopped):
                    run.state.save()
            if run.state is not None and stopped and number < steps:
                raise Stopped(f"stopped after step {number}, which is saved in {run.state.directory}: --resume goes on "
                              f"from it", interrupts.exit_code)
    run.step.flush()
    run.net.set_train(False)
    if log is None:
        return []
    log.close()
    return log.losses()
