"""The nets whose training steps are compared: this package's, their limits, and the libraries beside it.

    python benchmarks/peers.py                        # which of them can be measured here, and why the others cannot

MindPet and mindone are measured as installed (`pip install mindpet==1.0.4`, `pip install --no-deps mindone==0.5.0`).
Both import packages that their LoRA does not need: empty modules stand in for these.
mindformers 2.1.0 needs another MindSpore than the one measured. On a plain Dense its LoRA is MindPet's cell in the type
of the weight; what it has for its own layers is written by hand here, by its formula.
"""
from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable

import mindspore as ms
from mindspore import Parameter, mint, nn, ops
from mindspore.common.initializer import initializer
from models import SHAPES, Dense, Stack, UNet

import mindpet_lite


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes packages of which every name is a class that does nothing."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        wanted = any(name == package or name.startswith(package + ".") for package in self.packages)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec):
        return EmptyModule(spec.name)

    def exec_module(self, module) -> None:
        pass


class EmptyModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Nothing,), {})


class Nothing:
    """Takes what it is given; as a decorator it changes nothing."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __call__(self, decorated):
        return decorated


class HandWritten(nn.Dense):
    """The paper's formula as one writes it: y = x Wᵀ + b + (x Aᵀ) Bᵀ s."""

    def __init__(self, width: int, out: int, rank: int, has_bias: bool) -> None:
        super().__init__(width, out, has_bias=has_bias)
        self.lora_a = Parameter(initializer("normal", (rank, width), ms.float32))
        self.lora_b = Parameter(initializer("zeros", (out, rank), ms.float32))
        self.product = ops.MatMul(transpose_b=True)
        self.scale = 2.0

    def construct(self, x):
        rows = x.reshape(-1, x.shape[-1])
        y = self.product(rows, self.weight)
        if self.has_bias:
            y = self.bias_add(y, self.bias)
        y = y + self.product(self.product(rows, self.lora_a), self.lora_b) * self.scale
        return y.reshape(*x.shape[:-1], -1)


class AsMindformers(HandWritten):
    """mindformers' formula for its own layers: transposed factors, broadcasting products, scaled as (..., out)."""

    def construct(self, x):
        y = mint.matmul(x, self.weight.T)
        if self.has_bias:
            y = y + self.bias
        return y + mint.matmul(mint.matmul(x, self.lora_a.T), self.lora_b.T) * self.scale


def imported(name: str):
    """Import a library, with empty modules in the place of what its LoRA does not need."""
    finder = StandIns("mindformers", "mindone.models", "mindone.transformers", "transformers", "huggingface_hub")
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)


def hand_written(rank: int) -> Dense:
    return lambda width, out, has_bias: HandWritten(width, out, rank, has_bias)


def as_mindformers(rank: int) -> Dense:
    return lambda width, out, has_bias: AsMindformers(width, out, rank, has_bias)


def mindpet(rank: int) -> Dense:
    layer = imported("mindpet.delta.lora").LoRADense
    return lambda width, out, has_bias: layer(width, out, rank, 2 * rank, has_bias=has_bias, compute_dtype=ms.float32)


def mindpet_default(rank: int) -> Dense:
    layer = imported("mindpet.delta.lora").LoRADense
    return lambda width, out, has_bias: layer(width, out, rank, 2 * rank, has_bias=has_bias)


def mindone(rank: int) -> Dense:
    layer = imported("mindone.peft.tuners.lora.layer").Linear
    return lambda width, out, has_bias: layer(nn.Dense(width, out, has_bias=has_bias), "default", rank, 2 * rank)


# The layers of each library for a rank; the factors' names have "lora" in them.
LIBRARIES: dict[str, Callable[[int], Dense]] = {
    "MindPet": mindpet,
    "MindPet, default (fp16)": mindpet_default,
    "mindone": mindone,
    "as mindformers": as_mindformers,
    "hand-written": hand_written,
}


def floor(shape: Stack | UNet) -> nn.Cell:
    """Build what any tuning of a frozen base must pay: backward to the bottom, one bias trainable there."""
    net = shape.net(nn.Dense)
    bottom = next(name for name, cell in net.cells_and_names() if isinstance(cell, (nn.LayerNorm, nn.Dense)))
    for parameter in net.get_parameters():
        parameter.requires_grad = parameter.name in (f"{bottom}.beta", f"{bottom}.bias")
    return net


def full(shape: Stack | UNet) -> nn.Cell:
    """Build the net with everything trainable."""
    return shape.net(nn.Dense)


def lora(shape: Stack | UNet) -> nn.Cell:
    """Build the net with this package's LoRA."""
    return mindpet_lite.get_pet_model(shape.net(nn.Dense), mindpet_lite.LoraConfig(
        shape.rank, 2 * shape.rank, target_modules=shape.targets))


def build(name: str, shape: Stack | UNet) -> nn.Cell:
    """Build the net of that name, to be trained.

    Raises:
        ImportError: its library is not installed.
    """
    own = {"floor": floor, "floor again": floor, "LoRA": lora, "full": full}
    if name in own:
        return own[name](shape)
    net = shape.net(LIBRARIES[name](shape.rank))
    for parameter in net.get_parameters():
        parameter.requires_grad = "lora" in parameter.name.lower()
    return net


def missing(name: str) -> str:
    """Return why a library cannot be measured here, or an empty string."""
    try:
        LIBRARIES[name](1)
    except ImportError as error:
        return str(error)
    return ""


def main() -> None:
    for name in LIBRARIES:
        print(f"{name:24} {missing(name) or 'measured'}")
    for name in ("LoRA", *(name for name in LIBRARIES if not missing(name))):
        for shape in (SHAPES["tiny"], SHAPES["unet-tiny"]):
            trainable = build(name, shape).trainable_params()
            assert len(trainable) == 2 * shape.layers, (name, len(trainable), shape)


if __name__ == "__main__":
    main()
