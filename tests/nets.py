"""Small nets and helpers that several test files use."""
from __future__ import annotations

import contextlib
from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet_lite import LoraConfig

TOLERANCE = {ms.float32: {"rtol": 1e-5, "atol": 1e-6}, ms.float16: {"rtol": 5e-3, "atol": 5e-3}}
MERGED = {ms.float32: {"rtol": 1e-5, "atol": 1e-5}, ms.float16: {"rtol": 1e-2, "atol": 1e-2}}


class Attention(nn.Cell):
    """The places a layer can stand in: plain children, a SequentialCell, a CellList, nested ones."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.to_q = nn.Dense(width, width, has_bias=False)
        self.to_k = nn.Dense(width, width)
        self.to_out = nn.SequentialCell(nn.Dense(width, width, activation="tanh"), nn.Dropout(p=0.5))
        self.blocks = nn.CellList([nn.Dense(width, width), nn.SequentialCell(nn.Dense(width, width))])
        self.norm = nn.LayerNorm((width,))

    def construct(self, x):
        x = self.norm(x)
        x = self.to_q(x) + self.to_k(x)
        x = self.to_out(x)
        for block in self.blocks:
            x = block(x)
        return x


LINEAR_PATHS = ("to_q", "to_k", "to_out.0", "blocks.0", "blocks.1.0")


def config(target_modules, **fields) -> LoraConfig:
    return LoraConfig(**{"lora_rank": 2, "lora_alpha": 3, "target_modules": target_modules, **fields})


def inputs(*shape: int, dtype=ms.float32, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def base_parameters(net: nn.Cell) -> list[Parameter]:
    """Return what a net with LoRA has from its base."""
    return [item for item in net.get_parameters()
            if "lora" not in item.name and item.name.rpartition(".")[2] not in ("scaling", "strength_factor")]


def randomise(cell: nn.Cell, seed: int = 0) -> None:
    """Give every delta of a net random values that are not zero."""
    rng = np.random.default_rng(seed)
    for parameter in cell.get_parameters():
        if "mindpet_delta" in parameter.name:
            value = 0.3 * rng.standard_normal(parameter.shape).astype(np.float32)
            parameter.set_data(Tensor(value).astype(parameter.dtype))


def numbers(value) -> np.ndarray:
    """Return a Tensor or Parameter as float64."""
    return value.astype(ms.float32).asnumpy().astype(np.float64)


def load_values(target: nn.Cell, source: nn.Cell) -> None:
    """Copy every Parameter that both nets have, by name, in memory of its own."""
    values = {item.name: item for item in source.get_parameters()}
    for parameter in target.get_parameters():
        if parameter.name in values:
            parameter.set_data(Tensor(values[parameter.name].asnumpy().copy()))


def state(net: nn.Cell) -> dict:
    """Return all that a refused call must not change."""
    return {
        "cells": {path: id(cell) for path, cell in net.cells_and_names()},
        "values": {path: (id(item), item.name, item.requires_grad, str(item.dtype), item.asnumpy().tobytes())
                   for path, item in net.parameters_and_names()},
    }


@contextlib.contextmanager
def unchanged(net: nn.Cell):
    before = state(net)
    yield
    assert state(net) == before


@contextlib.contextmanager
def compile_count():
    """Count the graphs that cells compile inside the block; yields a list with the number so far as its length."""
    executor = nn.Cell.compile.__globals__["_cell_graph_executor"]
    original = type(executor).compile
    compiled: list[str] = []

    def counting(self, obj, *args, **kwargs):
        phase, is_new = original(self, obj, *args, **kwargs)
        if is_new:
            compiled.append(phase)
        return phase, is_new

    type(executor).compile = counting
    try:
        yield compiled
    finally:
        type(executor).compile = original


def gradients_of(net: nn.Cell, parameters: list[Parameter], x: Tensor, weights: np.ndarray) -> tuple:
    """Return the output and the gradients of sum(y · weights) by x (None for ids) and the parameters."""
    return gradient_function(net, parameters, x, weights)()


def gradient_function(net: nn.Cell, parameters: list[Parameter], x: Tensor, weights: np.ndarray) -> Callable:
    """Return a function for what `gradients_of` returns, compiled once, for the values at each call.

    In graph mode it sees what an optimizer or `put` writes after its first call, but not `set_data`.
    """
    factor = Tensor(weights.astype(np.float32))

    def loss(value):
        y = net(value)
        return (y.astype(ms.float32) * factor).sum(), y

    ids = x.dtype == ms.int32
    function = ms.value_and_grad(loss, None if ids else 0, parameters, has_aux=True)

    def compute() -> tuple:
        (_, y), found = function(x)
        return (y, None, found) if ids else (y, *found)

    return compute


def shape_of(cell: nn.Cell, x: Tensor) -> tuple[int, ...]:
    """Return the shape of the output, from PyNative mode: that compiles nothing."""
    with pynative():
        return cell(x).shape


@contextlib.contextmanager
def pynative():
    """Compute in PyNative mode what a test needs beside what it tests."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=before)
