"""Checkpoints that a training run goes on from: the adapter, the optimizer, and all else that a step changes."""
from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet_lite.arguments import check_int, some_of, warn_user
from mindpet_lite.delta.parts import put
from mindpet_lite.delta.values import to_numpy
from mindpet_lite.formats.files import open_tensors, to_bytes
from mindpet_lite.formats.folder import new_directory
from mindpet_lite.graph.adapters import deltas
from mindpet_lite.graph.save import save_adapter
from mindpet_lite.graph.tree import cells_by_path, paths_of_parameters, require_cell
from mindpet_lite.train.sampler import BatchSampler

_FILE = "training_state.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


class TrainingState:
    """All that a training run needs to go on as if it had never stopped, in folders ``checkpoint-<step>``.

    A checkpoint holds what trains in the net, all Parameters of the training step (moments, rates and counts of the
    optimizer, accumulated gradients, averages, the loss scale), the place in the data, and the states of Python's,
    NumPy's and MindSpore's random generators. The frozen base is not in it. It is an adapter too: `load_adapter` reads
    the folder. A checkpoint is there whole or not at all, whenever the process is killed.

    Not in it are the masks of the next dropouts: the operator of a compiled graph keeps its generator to itself. A
    run with dropout goes on with other masks; `resume` says so.

    Args:
        directory: where the checkpoints stand; made at the first save.
        net: the net, adapted and frozen as it is to be trained.
        step: the training step, or the optimizer: a cell whose Parameters are the rest of the state.
        sampler: the place in the data; its step is the number of the checkpoint.
        keep: the number of checkpoints to keep; positive; older ones are deleted after a save. Default: 2.
        settings: what must be the same when the run goes on, as JSON holds it. It is written into the checkpoint.
            Default: None.

    Raises:
        TypeError: `net` or `step` is no Cell, or `keep` no int.
        ValueError: `keep` is below 1, or nothing in the net trains.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> optimizer = nn.Adam(net.trainable_params(), 1e-3)
        >>> step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer)
        >>> sampler = mp.BatchSampler(count=10, batch_size=3)
        >>> state = mp.TrainingState("run", net, step, sampler)
        >>> state.resume()                         # 0: there is no checkpoint yet
        0
        >>> for rows in sampler:
        ...     loss = step(x, Tensor(np.zeros((3, 2), np.float32)))
        ...     if sampler.step == 2:
        ...         break
        >>> state.save().name
        'checkpoint-2'
    """

    def __init__(self, directory: str | os.PathLike[str], net: nn.Cell, step: nn.Cell, sampler: BatchSampler,
                 keep: int = 2, settings: Mapping[str, Any] | None = None) -> None:
        check_int("keep", keep)
        self.directory, self.net, self.step = Path(directory), require_cell(net), require_cell(step)
        self.sampler, self.keep = sampler, keep
        self.settings = json.loads(json.dumps(dict(settings or {})))
        if not any(parameter.requires_grad for parameter in net.get_parameters()):
            raise ValueError("Nothing in the net trains, so there is nothing to save: call freeze_delta() or "
                             "get_pet_model() first.")

    def checkpoints(self) -> list[Path]:
        """Return the folders of the checkpoints, the newest first."""
        if not self.directory.is_dir():
            return []
        steps = {int(found[1]): path for path in self.directory.iterdir()
                 if (found := _NAME.fullmatch(path.name)) and (path / _FILE).is_file()}
        return [steps[number] for number in sorted(steps, reverse=True)]

    def save(self) -> Path:
        """Write the checkpoint of the sampler's step, and delete those that are too many.

        Returns:
            Its folder. One that is there already is left as it is.

        Raises:
            OSError: the disk is full, or the folder cannot be written; nothing is left behind.
        """
        target = self.directory / f"checkpoint-{self.sampler.step}"
        if target in self.checkpoints():
            return target
        tensors = {name: to_numpy(parameter) for name, parameter in self._parameters().items()}
        generators, about = _random_state()
        about |= {"step": self.sampler.step, "settings": self.settings}
        data = to_bytes({**tensors, **generators}, {"mindpet_lite": json.dumps(about)})
        with new_directory(target) as folder:
            if deltas(self.net):
                save_adapter(self.net, folder)
            with open(folder / _FILE, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for old in self.checkpoints()[self.keep:]:
            shutil.rmtree(old)
        return target

    def resume(self) -> int:
        """Go on from the newest checkpoint; do nothing where there is none.

        Everything is checked before anything is set.

        Returns:
            The number of steps that are done.

        Raises:
            ValueError: the checkpoint is damaged, belongs to another net or optimizer, or was made with other
                settings; the message says which.
            OSError: it cannot be read.
        """
        found = self.checkpoints()
        if not found:
            return 0
        path = found[0] / _FILE
        parameters, (generators, _) = self._parameters(), _random_state()
        with open_tensors(path) as file:
            about = _about(file.metadata, path)
            problems = _differences(self.settings, about["settings"])
            expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
            expected |= {name: value.shape for name, value in generators.items()}
            problems += [f"{name} is missing in it" for name in expected if name not in file.keys()]
            problems += [f"{name} is not known here" for name in file.keys() if name not in expected]
            problems += [f"{name} has shape {file.shape(name)} in it, and {expected[name]} here"
                         for name in file.keys() if name in expected and file.shape(name) != expected[name]]
            if problems:
                raise ValueError(f"{found[0]} is of another run: {some_of(problems, 5)}. Give the settings that the "
                                 f"run began with, or another directory.")
            values = {name: file.read(name) for name in expected}
        # First what can still be refused.
        _set_random_state({name: values[name] for name in generators}, about)
        for name, parameter in parameters.items():
            put(parameter, Tensor(values[name]).astype(parameter.dtype))
        self.sampler.step = about["step"]
        self._warn_of_dropout()
        return self.sampler.step

    def _parameters(self) -> dict[str, Parameter]:
        """Return the Parameters of the state by name: those of the net that train, and the step's own."""
        of_net = {id(parameter) for parameter, _ in paths_of_parameters(self.net)}
        found = {f"net.{paths[0]}": parameter for parameter, paths in paths_of_parameters(self.net)
                 if parameter.requires_grad}
        found |= {f"step.{paths[0]}": parameter for parameter, paths in paths_of_parameters(self.step)
                  if id(parameter) not in of_net}
        scalers = {id(value): value for cell in cells_by_path(self.step).values() for value in vars(cell).values()
                   if isinstance(value, mindspore.amp.DynamicLossScaler)}
        for number, scaler in enumerate(scalers.values()):
            found |= {f"loss_scaler.{number}.{item.name}": item for item in (scaler.scale_value, scaler.counter)}
        return found

    def _warn_of_dropout(self) -> None:
        rates = [path for path, cell in cells_by_path(self.net).items() if isinstance(cell, nn.Dropout) and cell.p > 0]
        if rates:
            warn_user(f"The run goes on with other dropout masks than it would have had ({some_of(rates, 3)}): the "
                      f"operator keeps its generator to itself. Set the dropout to 0 where runs must be equal.")


def _random_state() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the states of the random generators: arrays by name, and what JSON holds."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, python_gauss = random.getstate()
    arrays = {"random.numpy": np.asarray(keys), "random.python": np.array(numbers, np.int64),
              "random.mindspore": mindspore.get_rng_state().asnumpy()}
    return arrays, {"numpy": [position, has_gauss, gauss], "python": [version, python_gauss]}


def _set_random_state(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    np.random.set_state(("MT19937", arrays["random.numpy"], *about["numpy"]))
    version, gauss = about["python"]
    random.setstate((version, tuple(map(int, arrays["random.python"])), gauss))
    mindspore.set_rng_state(Tensor(arrays["random.mindspore"]))


def _about(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Raises:
        ValueError: it is no checkpoint of ours.
    """
    try:
        about = json.loads(metadata["mindpet_lite"])
        if {"step", "settings", "numpy", "python"} <= about.keys() and isinstance(about["step"], int):
            return about
    except (KeyError, ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is not a checkpoint that TrainingState wrote: delete {path.parent} to go on from the one "
                     f"before.")


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ."""
    return [f"{name} was {there.get(name)!r} and is {here.get(name)!r}" for name in sorted({*here, *there})
            if here.get(name) != there.get(name)]
