"""What layers with a weight in few bits share: act(x Wᵀ + b) where W is made anew for each product.

A weight in its full type lives only while one product needs it. For that three things must hold: the operators that
make it wait for the product's input (`ops.depend`), else a runtime makes those of all layers at once; the gradient
makes it again (a `bprop` of its own), else it is kept from the forward; and no operator has inputs of two shapes, for
which CPU's kernels keep 16 bytes for each number (the `Tile` primitive gives equal shapes).

W is not made in parts of its rows: that takes less for W, but MindSpore keeps more for the further operators of each
layer (benchmarks/NOTES.md).
"""
from __future__ import annotations

import functools
from typing import Any, ClassVar, TypeVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.hosts.base import Host, as_running, take_types
from mindpet_lite.delta.hosts.dense import ActiveRowsHost, DenseHost
from mindpet_lite.delta.hosts.linear import LinearHost
from mindpet_lite.delta.parts import as_type, prefix_of
from mindpet_lite.delta.values import frozen_parameter, to_numpy
from mindpet_lite.formats.quantised import dequantise, parts_of, quantise

Self = TypeVar("Self", bound="Quantised")


class Product(nn.Cell):
    """h Wᵀ for the tensors of a quantised weight, with W made again for the gradient of h.

    Args:
        shape: of W: (outputs, inputs).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.matmul, self.turned = ops.MatMul(transpose_b=True), ops.MatMul()
        self.tile, self.depend = ops.Tile(), ops.Depend()


@functools.cache
def _product(kind: Any, shape: tuple[int, int]) -> Product:
    """Return the cell that multiplies with a weight of this shape: one for all layers.

    The compiler reads it once then, which saves a few MB for each layer.
    """
    product: Product = kind.make_product(shape)
    return product


class Quantised(ActiveRowsHost):
    """A frozen linear layer, of nn.Dense or mint.nn.Linear, whose weight is held in few bits.

    It stands where the plain layer stood, with its bias, activation and `to_float`. `weight` keeps its name and holds
    codes; what else the numbers need is beside it, see `mindpet_lite.formats.quantised.parts_of`. None of these
    trains. The rule for types is that of `mindpet_lite.LoRADense`, where the type of the weight is the one that
    it had. Made by `mindpet_lite.quantize_base`.

    A subclass gives `quantised_kind`, `base_names`, `make_product`, `product_of` and `weight_of`.
    """

    quantised_kind: ClassVar[str]
    is_quantised: ClassVar[bool] = True
    parts = tuple(dict.fromkeys((*DenseHost.parts, *LinearHost.parts, "weight_type", "origin", "quantised_product")))

    # The type that the weight had, and the kind of the plain layer.
    weight_type: mindspore.dtype
    origin: type[Host]
    # In a tuple, so that it is no child: it is that of other layers too, in which flags of this one mean nothing.
    quantised_product: tuple[Product]
    # The Parameter of a dense layer that a merge puts in this one's place; in a tuple, so that it is none of its own.
    _full: tuple[Parameter, ...] = ()

    @classmethod
    def of(cls: type[Self], plain: nn.Cell, origin: type[Host], gram: np.ndarray | None = None) -> Self:
        """Return the quantised layer for a plain one, which stays as it is.

        Where the plain layer's weight has no numbers yet (`no_init_parameters`), neither have the new Parameters.

        Args:
            plain: the layer.
            origin: its host.
            gram: Xᵀ X of what it is given, by which codes are chosen; see `mindpet_lite.formats.quantised.quantise`.

        Raises:
            ValueError: the kind does not take the weight.
        """
        weight = plain.weight
        shape = tuple(weight.shape)
        parts, prefix = parts_of(cls.quantised_kind, shape), prefix_of(weight.name)
        if weight.has_init:
            values = {name: np.zeros(part.shape, part.dtype) for name, part in parts.items()}
        else:
            values = quantise(cls.quantised_kind, to_numpy(weight), gram)
        layer: Self = nn.Cell.__new__(cls)
        nn.Cell.__init__(layer)
        for name in origin.parts:
            if hasattr(plain, name):
                setattr(layer, name, getattr(plain, name))
        layer.out_channels, layer.in_channels = shape
        layer.matmul, layer.bias_add = ops.MatMul(transpose_b=True), ops.BiasAdd()
        layer.has_bias = plain.bias is not None
        layer.activation_flag = getattr(plain, "activation_flag", False)
        layer.activation = getattr(plain, "activation", None)
        kind: Any = cls
        layer.weight_type, layer.origin, layer.quantised_product = weight.dtype, origin, (_product(kind, shape),)
        for name in cls.base_names:
            if name != "bias":
                own = frozen_parameter(Tensor(values[name]), weight.name if name == "weight" else prefix + name)
                layer.insert_param_to_cell(name, own)
            elif plain.bias is None:
                layer.bias = None
            else:
                layer.insert_param_to_cell("bias", plain.bias)
        layer.set_train(plain.training)
        layer.set_grad(plain.requires_grad)
        take_types(layer, plain)
        return layer

    def full(self, weight: Parameter) -> nn.Cell:
        """Return the plain layer with this Parameter as its weight, and the running types and mode of this one."""
        layer = self.origin.on(self.origin if self.compute_dtype else self.origin.plain_type, self)
        layer.insert_param_to_cell("weight", weight)
        layer.add_flags_recursive(**self.get_flags())
        return as_running(layer, self)

    def full_parameter(self, value: np.ndarray) -> Parameter:
        """Return a Parameter of the full type with this value, by the name of the weight."""
        return Parameter(Tensor(np.ascontiguousarray(value, np.float32)).astype(self.weight_type),
                         name=self.weight.name, requires_grad=False)

    # What methods ask of the layer.

    @classmethod
    def refusal(cls, cell: nn.Cell, method: str) -> str | None:
        """Return None: a layer of this kind can be adapted."""
        return None

    @classmethod
    def logical_shape(cls, layer: nn.Cell) -> tuple[int, ...]:
        """Return (outputs, inputs)."""
        return layer.out_channels, layer.in_channels

    def _own_type(self) -> mindspore.dtype:
        return self.weight_type

    def own_weight(self, dtype: mindspore.dtype) -> Tensor:
        """Return the codes, by whose type `linear` knows the layer's own weight."""
        return self.weight

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Wᵀ, for the layer's own weight by way of its codes."""
        if weight.dtype == self.weight.dtype:
            return self.product_of(h)
        return self.matmul(h, weight)

    def logical_weight(self) -> Tensor:
        """Return the weight in its full type: a method that needs it costs the memory of it."""
        return as_type(self.weight_of(), self.weight_type)

    def weight_numbers(self) -> np.ndarray:
        """Return the numbers that the codes mean, in float32."""
        tensors = {name: to_numpy(getattr(self, name)) for name in self.base_names if name != "bias"}
        return dequantise(self.quantised_kind, tensors, (self.out_channels, self.in_channels))

    def as_weight(self, value: np.ndarray) -> Tensor:
        """Return a weight in the full type."""
        return Tensor(np.ascontiguousarray(value)).astype(self.weight_type)

    def absorbing(self) -> Parameter:
        """Return the weight of the plain layer that takes this one's place after a merge."""
        if not self._full:
            self._full = (self.full_parameter(np.zeros(self.logical_shape(self), np.float32)),)
        return self._full[0]

    def absorbed(self, plain: nn.Cell) -> nn.Cell:
        """Return that plain layer; `plain` where nothing was merged into a weight."""
        return self.full(self._full[0]) if self._full else plain

    def let_go(self) -> None:
        """Let go of the merged weight, where the layer stands here again."""
        self._full = ()

    # What a kind is made of.

    @classmethod
    def make_product(cls, shape: tuple[int, int]) -> Product:
        """Return the cell that multiplies with a weight of this shape."""
        raise NotImplementedError

    def product_of(self, h: Tensor) -> Tensor:
        """Return h Wᵀ."""
        raise NotImplementedError

    def weight_of(self) -> Tensor:
        """Return W in float32."""
        raise NotImplementedError

    def extend_repr(self) -> str:
        """Show the sizes and the kind."""
        return (f"in_channels={self.in_channels}, out_channels={self.out_channels}, has_bias={self.has_bias}, "
                f"kind={self.quantised_kind!r}")


def scaled_codes(codes: Tensor, scale: Tensor, tile: Any, shape: tuple[int, ...], dtype: mindspore.dtype) -> Tensor:
    """Return codes (n, size of a block) times a number for each block (n, 1), in `dtype` and this shape."""
    # Not by `as_type`: a function of ours that a bprop and a forward both call is too much for the compiler.
    numbers = ops.cast(codes, dtype) * tile(ops.cast(scale, dtype), (1, codes.shape[1]))
    return ops.reshape(numbers, shape)
