"""The loop of pretrain.py: moving averages, a log, a state that is continued."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm
from whole_files import write_atomically

from mindpet_lite import GradientAccumulation

LOG_EVERY = 20
EMA_EVERY = 10


class TrainingError(Exception):
    """Something the user can mend; the text is one sentence."""


def decayed_step(loss: nn.Cell, rates: list[float], weight_decay: float) -> GradientAccumulation:
    """A training step of all that trains in a loss, with AdamW and the norm of all gradients clipped at 1.

    Args:
        loss: A cell that gives a scalar.
        rates: Learning rate of each step.
        weight_decay: Decay of matrices and kernels; norms and biases have none.
    """
    parameters = loss.trainable_params()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = nn.AdamWeightDecay([group for group in groups if group["params"]], rates, beta2=0.99, eps=1e-8)
    return GradientAccumulation(loss, optimizer, steps=1, max_norm=1.0)


class Trainer:
    """Trains the cells of one stage and keeps their weights, optimizer state and moving averages in one file.

    Args:
        cells: The trained cells by name; together they hold the loss's parameters.
        loss: The loss cell.
        folder: Where ``state.safetensors`` and ``log.jsonl`` stand; what is there is continued.
        rates: Learning rate of each step; their number is the number of steps.
        weight_decay: See :func:`decayed_step`.
        settings: What must not change between runs that continue each other.
        ema: Decay of the moving average of the weights, per step.

    Raises:
        TrainingError: The state in ``folder`` is broken or belongs to other settings.
    """

    def __init__(self, cells: dict[str, nn.Cell], loss: nn.Cell, folder: Path, rates: list[float],
                 weight_decay: float, settings: dict, ema: float) -> None:
        self.step_cell = decayed_step(loss, rates, weight_decay)
        self.cells, self.folder, self.settings = cells, folder, json.dumps(settings, sort_keys=True)
        self.state_file, self.log_file = folder / "state.safetensors", folder / "log.jsonl"
        self.weights = {f"{name}/{path}": p for name, cell in cells.items() for path, p in cell.parameters_and_names()}
        optimizer = self.step_cell.optimizer
        self.optimizer_state = {"optimizer/step": optimizer.global_step}
        paths = {id(p): path for path, p in self.weights.items()}
        for parameter, first, second in zip(optimizer.parameters, optimizer.moments1, optimizer.moments2, strict=True):
            path = paths[id(parameter)]
            self.optimizer_state |= {f"optimizer/1/{path}": first, f"optimizer/2/{path}": second}
        self.averages = {path: p.asnumpy().copy() for path, p in self.weights.items()}
        self.steps, self.ema, self.step = len(rates), ema, 0
        if self.state_file.exists():
            self.resume()

    def resume(self) -> None:
        """Reads the state file, all of it before anything is set."""
        live = self.weights | self.optimizer_state
        shapes = {path: p.shape for path, p in live.items()} | {f"ema/{k}": v.shape for k, v in self.averages.items()}
        try:
            with safe_open(self.state_file, "numpy") as file:
                about = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{self.state_file} cannot be read ({error}): delete it to start anew") from None
        if about.get("settings") != self.settings or {k: v.shape for k, v in arrays.items()} != shapes:
            raise TrainingError(f"{self.state_file} was written with other settings ({about.get('settings')}): "
                                "give the same ones, or another --work folder")
        for key, parameter in live.items():
            parameter.set_data(ms.Tensor(arrays[key], parameter.dtype))
        self.averages = {path: arrays[f"ema/{path}"] for path in self.averages}
        self.step = int(about["step"])

    def save(self) -> None:
        """Writes the state file."""
        arrays = {key: p.asnumpy() for key, p in (self.weights | self.optimizer_state).items()}
        arrays |= {f"ema/{path}": value for path, value in self.averages.items()}
        about = {"settings": self.settings, "step": str(self.step)}
        write_atomically(self.state_file, lambda path: save_file(arrays, path, about))

    def average(self) -> None:
        """Moves the averages towards the weights, faster at the start, where there is little history."""
        decay = min(self.ema, (1 + self.step) / (10 + self.step)) ** EMA_EVERY
        for path, parameter in self.weights.items():
            self.averages[path] += (1 - decay) * (parameter.asnumpy() - self.averages[path])

    def averaged(self, name: str) -> dict[str, np.ndarray]:
        """The averaged weights of one cell by path."""
        return {path[len(name) + 1:]: value for path, value in self.averages.items() if path.startswith(f"{name}/")}

    def run(self, batch: Callable[[int], tuple[np.ndarray, ...]], save_every: float,
            on_save: Callable[[], None]) -> None:
        """Trains to the last step. ``batch(step)`` gives a step's inputs; a save every ``save_every`` seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved, started, losses = time.monotonic(), time.monotonic(), []
        with tqdm(total=self.steps, initial=self.step, unit="step", mininterval=5) as bar:
            while self.step < self.steps:
                loss = self.step_cell(*(ms.Tensor(array) for array in batch(self.step)))
                losses.append(float(loss.asnumpy()))
                if not np.isfinite(losses[-1]):
                    raise TrainingError(f"the loss became {losses[-1]} at step {self.step}: lower the learning rate")
                self.step += 1
                bar.update()
                if self.step % EMA_EVERY == 0:
                    self.average()
                if self.step % LOG_EVERY == 0 or self.step == self.steps:
                    bar.set_postfix(loss=f"{np.mean(losses):.4f}")
                    row = {"step": self.step, "loss": float(np.mean(losses)), "seconds": time.monotonic() - started}
                    with self.log_file.open("a", encoding="utf-8") as log:
                        log.write(json.dumps(row) + "\n")
                    losses = []
                if time.monotonic() - saved > save_every or self.step == self.steps:
                    self.save()
                    on_save()
                    saved = time.monotonic()
