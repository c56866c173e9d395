"""The operators that nets are made of, each with what MindSpore's gradient of it reads."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from mindpet_lite.estimate.tape import Shape, Tape, Value
from mindpet_lite.formats.quantised import parts_of
from mindpet_lite.names.parameter_names import is_head

# Bytes of an element of what a quantised weight is made of.
ITEMS_IN_FEW_BITS = {"int8": 1, "uint8": 1, "float16": 2, "float32": 4}

Values = list[Value]
Gradients = Sequence[Value | None]


@dataclasses.dataclass(frozen=True)
class Lora:
    """What LoRA is in one layer."""

    rank: int
    dropout: float = 0.0


class Layers(Tape):
    """A tape with operators.

    Args:
        item: bytes of an element of activations and of what does not train.
        trains: says of a parameter's path whether it trains.
        lora: the LoRA of dense layers, by their paths.
        quantised: how the weights of dense layers but the head are held, see `quantize_base`; empty: as they are.

    Attributes:
        linear: the paths of the dense layers.
    """

    def __init__(self, item: int, trains: Callable[[str], bool], lora: Mapping[str, Lora],
                 quantised: str = "") -> None:
        super().__init__(item, trains)
        self.lora, self.quantised = lora, quantised
        self.linear: list[str] = []

    def dense(self, x: Value, path: str, out: int, bias: bool = True) -> Value:
        """`nn.Dense` at `path` of a net, with LoRA if it has it: y = x Wᵀ + b + s (x Aᵀ) Bᵀ."""
        rows, width = math.prod(x.shape[:-1]), x.shape[-1]
        flat, lora = self.view(x, rows, width), self.lora.get(path)
        self.linear.append(path)
        if self.quantised and not is_head(path):
            parts = parts_of(self.quantised, (out, width)).values()
            stored = sum(math.prod(part.shape) * ITEMS_IN_FEW_BITS[part.dtype] for part in parts)
            y = self.quantised_matmul(flat, self.stored_parameter(f"{path}.weight", stored, out, width))
        else:
            y = self.matmul(flat, self.weight(f"{path}.weight", out, width))
        if bias:
            y = self.bias(y, self.parameter(f"{path}.bias", out))
        if lora:
            # As in LoRADense: two views, whose gradients are added to those of other uses at once.
            y = self._beside(self.view(x, rows, width), y, path, lora)
        return self.view(y, *x.shape[:-1], out)

    def weight(self, path: str, *shape: int) -> Value:
        """Return a parameter in the type of the activations: what trains is cast where that is another."""
        weight = self.parameter(path, *shape)
        if not weight.graded or self.item == self.delta_item:
            return weight
        return self.apply("Cast", [weight], shape, lambda reads, results, dy: [
            self.run("Cast", [dy], shape, item=self.delta_item)])

    def _beside(self, x: Value, y: Value, path: str, lora: Lora) -> Value:
        a = self.weight(f"{path}.mindpet_delta_lora_a", lora.rank, x.shape[1])
        b = self.weight(f"{path}.mindpet_delta_lora_b", y.shape[1], lora.rank)
        low = self.unary("Mul", self.matmul(self.dropout(x, lora.dropout), a))
        return self.binary("Add", y, self.matmul(low, b))

    def matmul(self, x: Value, weight: Value) -> Value:
        """The product of rows with a parameter (out, in)."""
        return self.apply("MatMul", [x, weight], (x.shape[0], weight.shape[0]), lambda reads, results, dy: [
            self.run("MatMul", [dy, reads[1]], reads[0].shape) if reads[0].graded else None,
            self.run("MatMul", [dy, reads[0]], reads[1].shape) if reads[1].graded else None])

    def quantised_matmul(self, x: Value, weight: Value) -> Value:
        """The same with a weight that is held in few bits: it is made for the product, and again for its gradient."""
        def whole(waits_for: Value) -> Value:
            return self.run("Cast", [weight, waits_for], weight.shape)

        return self.record([x], lambda reads: [
            self.run("MatMul", [*reads, whole(reads[0])], (x.shape[0], weight.shape[0]))],
            lambda reads, results, dy: [self.run("MatMul", [dy, whole(dy)], reads[0].shape)
                                        if reads[0].graded else None])

    def bias(self, x: Value, bias: Value) -> Value:
        """A parameter added to each row, or to each pixel of a channel."""
        return self.apply("BiasAdd", [x, bias], x.shape, lambda reads, results, dy: [
            dy, self.run("BiasAddGrad", [dy], bias.shape) if bias.graded else None])

    def dropout(self, x: Value, rate: float) -> Value:
        """`nn.Dropout`, whose mask is as large as x on CPU."""
        if rate == 0:
            return x
        return self.record([x], lambda reads: [self.run("Dropout", reads, x.shape), self.run("Mask", [], x.shape)],
                           lambda reads, results, dy: [self.run("DropoutGrad", [dy, results[1]], x.shape)])

    def batched(self, a: Value, b: Value, shape: Shape, transposes: bool) -> Value:
        """A product for each sample and head: `ops.matmul`, whose gradients transpose a and b, or `ops.BatchMatMul`."""
        def turned(value: Value) -> Value:
            *rest, rows, columns = value.shape
            return self.run("Transpose", [value], (*rest, columns, rows)) if transposes else value

        return self.apply("BatchMatMul", [a, b], shape, lambda reads, results, dy: [
            self.run("BatchMatMul", [dy, turned(reads[1])], a.shape) if a.graded else None,
            self.run("BatchMatMul", [turned(reads[0]), dy], b.shape) if b.graded else None])

    def transpose(self, x: Value, *shape: int) -> Value:
        """The axes in another order."""
        return self.apply("Transpose", [x], shape, lambda reads, results, dy: [self.run("Transpose", [dy], x.shape)])

    def unary(self, kind: str, x: Value, saves: str = "") -> Value:
        """An operator on each element; its gradient reads what it read ("x"), what it wrote ("y"), or neither."""
        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            saved = {"": [], "x": reads, "y": results}[saves]
            return [self.run(f"{kind}Grad", [dy, *saved], x.shape)]

        return self.apply(kind, [x], x.shape, backward)

    def silu(self, x: Value) -> Value:
        """Product x sigmoid(x); the gradient makes its own sigmoid, which reads x and so runs long before its turn."""
        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            sigmoid = self.run("Sigmoid", reads, x.shape)
            inner = self.run("SigmoidGrad", [sigmoid, self.run("Mul", [*reads, dy], x.shape)], x.shape)
            return [self.run("Add", [inner, self.run("Mul", [sigmoid, dy], x.shape)], x.shape)]

        return self.record([x], lambda reads: [
            self.run("Mul", [*reads, self.run("Sigmoid", reads, x.shape)], x.shape)], backward)

    def binary(self, kind: str, a: Value, b: Value) -> Value:
        """A sum ("Add") or product ("Mul") of two tensors, of which one may be smaller."""
        shape = a.shape if a.numel >= b.numel else b.shape

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            found: list[Value | None] = []
            for own, other in (reads, reads[::-1]):
                part = self.run("Mul", [dy, other], shape) if kind == "Mul" and own.graded else dy
                found.append(self.run("ReduceSum", [part], own.shape) if own.graded and own.shape != shape else part)
            return found

        return self.apply(kind, [a, b], shape, backward)

    def softmax(self, x: Value) -> Value:
        """Over the last axis; the gradient y (dy - sum(y dy)) is four kernels."""
        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            total = self.run("ReduceSum", [self.run("Mul", [dy, results[0]], x.shape)], (*x.shape[:-1], 1))
            return [self.run("Mul", [self.run("Sub", [dy, total], x.shape), results[0]], x.shape)]

        return self.apply("Softmax", [x], x.shape, backward)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """The parts one after the other along an axis."""
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.apply("Concat", parts, tuple(shape), lambda reads, results, dy: [
            self.run("Slice", [dy], part.shape) if part.graded else None for part in parts])

    def slice(self, x: Value, *shape: int) -> Value:
        """A part of x; the gradient is as large as x."""
        return self.apply("StridedSlice", [x], shape, lambda reads, results, dy: [
            self.run("StridedSliceGrad", [dy], x.shape)])

    def broadcast(self, x: Value, *shape: int) -> Value:
        """`ops.broadcast_to`."""
        return self.apply("BroadcastTo", [x], shape, lambda reads, results, dy: [self.run("ReduceSum", [dy], x.shape)])

    def reduce(self, kind: str, x: Value, *shape: int) -> Value:
        """A mean or sum; the gradient spreads it over x again."""
        return self.apply(kind, [x], shape, lambda reads, results, dy: [self.run("BroadcastTo", [dy], x.shape)])
