"""Adapter files: only the deltas, with what is needed to use them."""
from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype
from mindspore.train import Callback, CheckpointConfig

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import Delta
from mindpet_lite.formats import peft
from mindpet_lite.formats.files import atomic_file
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.graph.inject import settle_names
from mindpet_lite.graph.live import deltas
from mindpet_lite.graph.tree import cells_by_path, replace, require_cell


def adapter_state(net: nn.Cell) -> AdapterState:
    """Return the deltas of `net` as numpy arrays, by layer path.

    Raises:
        ValueError: the net has no adapted layer, or layers of several methods.
    """
    found = deltas(net)
    methods = sorted({cell.method for cell in found.values()})
    if len(methods) > 1:
        raise ValueError(f"One adapter file holds one method, but the net has {' and '.join(methods)}.")
    return AdapterState(methods[0], {path: LayerState(
        {name: _to_numpy(parameter) for name, parameter in cell.delta_parameters().items()}, cell.settings())
        for path, cell in found.items()})


def save_adapter(net: nn.Cell, directory: str | os.PathLike[str]) -> Path:
    """Write the deltas of `net` as a PEFT adapter directory; the base is not in it.

    ``adapter_config.json`` and ``adapter_model.safetensors`` with keys ``base_model.model.<path>.lora_A.weight`` are
    written whole or not at all. The strength of :func:`mindpet_lite.set_lora_scale` is a state of the running net and
    is not written.

    Args:
        net: a net with adapted layers.
        directory: made if missing; files of an earlier save are replaced.

    Returns:
        The directory.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no adapted layer, or the net itself is one (a layer needs a path).
        OSError: the directory cannot be written, or the disk is full; what was there is unchanged.
    """
    state = adapter_state(require_cell(net))
    if "" in state.layers:
        raise ValueError("The net itself is the adapted layer, so it has no path to be saved under: put it in a cell.")
    peft.save(state, Path(directory))
    return Path(directory)


def load_adapter(net: nn.Cell, directory: str | os.PathLike[str]) -> nn.Cell:
    """Load an adapter directory into `net`, all of it or nothing, in place.

    Layers that the file names and that are still plain are adapted first, with the file's rank and alpha. Where the
    net has another alpha than the file, the file's is taken. Parameters that were trainable or frozen stay so.

    Args:
        net: the base, adapted or not.
        directory: as `save_adapter` or PEFT wrote it.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell.
        FileNotFoundError: the directory or a file in it is missing.
        ValueError: a file is damaged, or does not fit the net: missing, unexpected and misshapen keys stand in one
            message. The net is unchanged.
    """
    cells = cells_by_path(net)
    state = peft.load(Path(directory))
    problems: list[str] = []
    adapted: dict[str, nn.Cell] = {}
    for path, layer in state.layers.items():
        cell = cells.get(path)
        if cell is None:
            problems.append(f"unexpected: the net has no layer {path}.")
        elif isinstance(cell, Delta):
            problems.extend(_mismatches(path, cell, layer))
        else:
            problem, new = _adapt(state.method, path, cell, layer)
            if new is None:
                problems.append(problem)
            else:
                adapted[path] = new
                problems.extend(_mismatches(path, new, layer))
    shared = {id(cells[path]) for path in state.layers if path in cells}
    problems.extend(f"missing: the net's adapted layer {path} is not in the file." for path, cell in cells.items()
                    if isinstance(cell, Delta) and path not in state.layers and id(cell) not in shared)
    if problems:
        raise ValueError(f"The adapter in {directory} does not fit the net, which is unchanged:\n  "
                         + "\n  ".join(problems))
    settle_names(net, adapted)
    for path, layer in state.layers.items():
        _fill(adapted.get(path, cells[path]), layer)
    if adapted:
        replace(net, {cells[path]: cell for path, cell in adapted.items()})
    return net


def _adapt(method: str, path: str, cell: nn.Cell, layer: LayerState) -> tuple[str, nn.Cell | None]:
    """Return the problem, or the adapted cell for a plain layer that the file adapts."""
    try:
        config = METHODS[method](**layer.settings)
        reason = config.refusal(cell)
        return (f"{path}: {reason}", None) if reason else ("", config.adapt(cell))
    except (TypeError, ValueError) as error:
        return f"{path}: {error}", None


def _mismatches(path: str, cell: nn.Cell, layer: LayerState) -> list[str]:
    assert isinstance(cell, Delta)
    own = cell.delta_parameters()
    problems = [f"missing: {path}.{name}." for name in own if name not in layer.tensors]
    problems += [f"unexpected: {path}.{name}." for name in layer.tensors if name not in own]
    problems += [f"misshapen: {path}.{name} is {tuple(own[name].shape)} in the net, {value.shape} in the file."
                 for name, value in layer.tensors.items() if name in own and tuple(own[name].shape) != value.shape]
    problems += [f"not finite: {path}.{name} holds NaN or infinite values." for name, value in layer.tensors.items()
                 if not np.isfinite(value).all()]
    return problems


def _fill(cell: nn.Cell, layer: LayerState) -> None:
    assert isinstance(cell, Delta)
    for name, parameter in cell.delta_parameters().items():
        parameter.set_data(Tensor(layer.tensors[name]).astype(parameter.dtype))
    cell.adopt_settings(layer.settings)


def _to_numpy(parameter: Parameter) -> np.ndarray:
    """Return the value as numpy; bfloat16, which numpy lacks, as float32 (the same numbers)."""
    if parameter.dtype == mstype.bfloat16:
        return parameter.astype(mstype.float32).asnumpy()
    return parameter.asnumpy().copy()


class TrainableParamsCheckPoint(Callback):
    """Callback for `Model.train` that saves only the trainable parameters of the network, as MindPet's.

    Writes ``<prefix>-<epoch>_<step>.ckpt`` with the parameters of the network that train, by `Parameter.name`: no
    frozen weight, no optimizer state. Under the key ``mindpet_lite`` the file holds a JSON text with the method and
    for each adapted layer its rank, alpha and dropout. Load it with ``mindspore.load_checkpoint`` and
    ``load_param_into_net``.

    Args:
        directory: where to write; absolute or relative to the working directory; made if missing.
        prefix: start of the file names.
        config: mindspore.train.CheckpointConfig; `save_checkpoint_steps`, `save_checkpoint_seconds`,
            `keep_checkpoint_max` and `saved_network` are honoured. Default: at the end of every epoch, the last 5.

    Raises:
        TypeError: `prefix` is no string, `config` no CheckpointConfig.
        ValueError: `directory` or `prefix` is empty, or `prefix` holds a path separator.
    """

    def __init__(self, directory: str | os.PathLike[str], prefix: str = "DELTA_CKP",
                 config: CheckpointConfig | None = None) -> None:
        super().__init__()
        if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
            raise ValueError(f"directory must be a path to write checkpoints to, but got {directory!r}.")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string, but got {prefix!r}.")
        if not prefix or os.path.basename(prefix) != prefix:
            raise ValueError(f"prefix must be the start of a file name, but got {prefix!r}.")
        if config is not None and not isinstance(config, CheckpointConfig):
            raise TypeError(f"config must be a mindspore.train.CheckpointConfig, but got {type(config).__name__}.")
        self.directory, self.prefix, self.config = Path(directory), prefix, config
        self._written: deque[Path] = deque()
        self._last_step, self._last_time = 0, time.monotonic()

    def on_train_begin(self, run_context: Any) -> None:
        """Check that there is something to save and somewhere to save it, before the first step."""
        trainable_parameters(self._network(run_context.original_args()))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._last_time = time.monotonic()

    def on_train_step_end(self, run_context: Any) -> None:
        """Save when the config's steps or seconds have gone by; without a config at the end of each epoch."""
        params = run_context.original_args()
        if self._due(params):
            self._save(params)

    def on_train_end(self, run_context: Any) -> None:
        """Save the last state if it is not saved yet."""
        params = run_context.original_args()
        if params.cur_step_num > self._last_step:
            self._save(params)

    def _due(self, params: Any) -> bool:
        steps = self.config.save_checkpoint_steps if self.config else None
        seconds = self.config.save_checkpoint_seconds if self.config else None
        if steps:
            return params.cur_step_num >= self._last_step + steps
        if seconds:
            return time.monotonic() >= self._last_time + seconds
        return params.cur_step_num % params.batch_num == 0

    def _network(self, params: Any) -> nn.Cell:
        return (self.config.saved_network if self.config else None) or params.network or params.train_network

    def _save(self, params: Any) -> None:
        network = self._network(params)
        epoch_step = (params.cur_step_num - 1) % params.batch_num + 1
        path = self.directory / f"{self.prefix}-{params.cur_epoch_num}_{epoch_step}.ckpt"
        save_trainable(network, path)
        self._last_step, self._last_time = params.cur_step_num, time.monotonic()
        if path in self._written:
            self._written.remove(path)
        self._written.append(path)
        keep = self.config.keep_checkpoint_max if self.config else 5
        while keep and len(self._written) > keep:
            self._written.popleft().unlink(missing_ok=True)


def save_trainable(network: nn.Cell, path: Path) -> None:
    """Write the trainable parameters of `network` and the settings of its deltas to a ``.ckpt`` file, atomically."""
    chosen = trainable_parameters(network)
    settings = {path_: {"method": cell.method, **cell.settings()} for path_, cell in cells_by_path(network).items()
                if isinstance(cell, Delta)}
    with atomic_file(path) as temporary:
        mindspore.save_checkpoint([{"name": parameter.name, "data": parameter} for parameter in chosen],
                                  str(temporary), append_dict={"mindpet_lite": json.dumps(settings)})


def trainable_parameters(network: nn.Cell) -> list[Parameter]:
    """Return the trainable Parameters of the network that is trained, without those of optimizers and training steps.

    Raises:
        ValueError: there is none.
    """
    chosen: dict[int, Parameter] = {}
    skipped: set[int] = set()
    for cell in cells_by_path(network).values():
        own = list(cell.parameters_and_names(expand=False))
        if isinstance(cell, (nn.Optimizer, nn.TrainOneStepCell)):
            skipped.update(id(parameter) for _, parameter in own)
        chosen.update({id(parameter): parameter for _, parameter in own})
    found = [parameter for key, parameter in chosen.items() if key not in skipped and parameter.requires_grad]
    if not found:
        raise ValueError("The network has no trainable parameter to save: call freeze_delta() or get_pet_model() "
                         "before training.")
    return found
