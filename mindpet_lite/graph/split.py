"""Split a net's linear layers over the processes of a job, and its adapters' files between parts and the whole."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, get_group_size, get_rank

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.hosts import SplitDense
from mindpet_lite.delta.hosts.split import ColumnDense, RowDense, part_of, whole_of
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.graph.match import named_by
from mindpet_lite.graph.tree import cells_by_path, replace, require_cell, without_inner


def split_linear(net: nn.Cell, column: str | Sequence[str], row: str | Sequence[str]) -> list[str]:
    r"""Split linear layers over all processes of a job, in place (tensor parallelism with explicit communication).

    $$
    \text{column: } y_i = x W_i^T + b_i \qquad \text{row: } y = \sum_i x_i W_i^T + b
    $$

    Each process keeps its part of the weight: a column-split layer has some of the outputs, a row-split one some of
    the inputs (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053, section 3). What lies between, such as an
    attention's heads, works on this process's outputs alone, so a model must take the number of heads from what
    arrives, not from its config. A row-split layer sums its outputs over the processes (`AllReduce`); a column-split
    one sums the gradient of its input. LoRA is put on them as on any layer, by `get_pet_model` afterwards: of a
    column-split layer B is split, of a row-split one A. `save_adapter`, called by every process, writes one ordinary
    adapter, and `load_adapter` reads one.

    All processes see the same batch. Do not use data-parallel mode: the gradients are whole already.

    Args:
        net: any Cell with plain `nn.Dense` layers that are not adapted yet; every process has the same.
        column: a regular expression that must match a layer's whole path, or a list of names (each equal to a path or
            to its last parts): those whose outputs are split.
        row: likewise those whose inputs are split.

    Returns:
        The paths of the layers that were split, in the order of the net.

    Raises:
        TypeError: `net` is no Cell, or a pattern neither text nor a list of texts.
        RuntimeError: this process is not one of several of a job that was begun with
            `mindspore.communication.init()`.
        ValueError: a pattern is empty or hits nothing, a layer is hit by both, is no plain Dense, has an activation,
            or cannot be shared evenly. All problems stand in one message, and the net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> import mindspore.communication as job
        >>> from mindspore import nn
        >>> job.init()  # by msrun --worker_num=2 train.py  # doctest: +SKIP
        >>> net = nn.SequentialCell(nn.Dense(8, 32), nn.ReLU(), nn.Dense(32, 8))  # doctest: +SKIP
        >>> mp.split_linear(net, column=["0"], row=["2"])  # doctest: +SKIP
        ['0', '2']
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0", "2"]))  # doctest: +SKIP
    """
    cells = without_inner(cells_by_path(require_cell(net)))
    if not GlobalComm.INITED or get_group_size() < 2:
        raise RuntimeError("split_linear() needs the processes of one job: start the script with msrun, such as msrun "
                           "--worker_num=2 --local_worker_num=2 --join=True script.py, and call "
                           "mindspore.communication.init() first.")
    dense = {path: cell for path, cell in cells.items() if isinstance(cell, nn.Dense)}
    problems: list[str] = []
    kinds: dict[str, type[SplitDense]] = {}
    for field, pattern, kind in (("column", column, ColumnDense), ("row", row, RowDense)):
        for path in named_by(field, pattern, dense, next(iter(dense), "q_proj"), problems):
            if path in kinds:
                problems.append(f"{path}: both column and row name it.")
            kinds[path] = kind
    swaps: dict[nn.Cell, nn.Cell] = {}
    for path, kind in kinds.items():
        try:
            swaps[dense[path]] = kind.of(dense[path])
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ValueError("The net cannot be split so, and is unchanged:\n  " + listed(problems))
    replace(net, swaps)
    return [path for path in cells if path in kinds]


def is_split(cell: nn.Cell) -> bool:
    """Tell whether each process has a part of this layer."""
    return isinstance(cell, SplitDense)


def parts_of(state: AdapterState, cells: Mapping[str, nn.Cell]) -> AdapterState:
    """Return an adapter as this process takes it: of layers that are split over processes its parts.

    Args:
        state: whole, under the net's paths.
        cells: of the net, by path.
    """
    def part(name: str, value: np.ndarray, axes: Mapping[str, int]) -> np.ndarray:
        fits = name in axes and value.ndim > axes[name] and value.shape[axes[name]] % get_group_size() == 0
        # What does not fit is said where shapes are compared.
        return part_of(value, axes[name], get_group_size(), get_rank()) if fits else value

    return _changed(state, cells, part)


def whole(state: AdapterState, cells: Mapping[str, nn.Cell]) -> AdapterState:
    """Return an adapter with the parts of all processes put together; every process must call it."""
    return _changed(state, cells, lambda name, value, axes: whole_of(value, axes[name]) if name in axes else value)


def _changed(state: AdapterState, cells: Mapping[str, nn.Cell],
             change: Callable[[str, np.ndarray, Mapping[str, int]], np.ndarray]) -> AdapterState:
    layers = dict(state.layers)
    for path, layer in state.layers.items():
        kind = METHODS.get(layer.method or state.method)
        if kind is not None and path in cells and is_split(cells[path]):
            axes = kind.split_axes(cells[path])
            layers[path] = dataclasses.replace(layer, tensors={
                name: change(name, value, axes) for name, value in layer.tensors.items()})
    return dataclasses.replace(state, layers=layers)


def wait_for_all() -> None:
    """Return when every process has called this."""
    ops.AllReduce()(Tensor(np.zeros(1, np.float32))).asnumpy()
