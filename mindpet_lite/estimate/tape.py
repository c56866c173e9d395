"""Training steps of models that are not there: each operator by its shapes, and what its gradient reads."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mindpet_lite.estimate.kernels import Kernel, Memory, tables_of

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a planned step: its shape, its memory (None for parameters and inputs), and if it has a gradient.

    `stored` are the bytes of a parameter that is held in few bits.
    """

    shape: Shape
    memory: Memory | None
    graded: bool
    stored: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def viewed(self, *shape: int) -> Value:
        """Return it in another shape, in the same memory."""
        return Value(shape, self.memory, self.graded)


# Runs an operator's kernels on what it reads; returns its result, and after that what only its gradient reads.
Forward = Callable[[list[Value]], list[Value]]
# Runs the gradient's kernels: from what was read, what `Forward` returned and the result's gradient to the gradients of
# what was read (None where there is none).
Backward = Callable[[list[Value], list[Value], Value], Sequence[Value | None]]


@dataclasses.dataclass(frozen=True)
class Node:
    """An operator of the forward pass.

    Where its gradient is a cell's own `bprop`, that reads what the operator read and wrote first, even if it lies in a
    block that is recomputed: this is kept then.
    """

    reads: list[Value]
    forward: Forward
    backward: Backward
    results: list[Value]
    own_bprop: bool


class Tape:
    """Records the operators of a forward pass, and appends those of the backward pass and of the optimizer.

    Args:
        item: bytes of an element of activations and of what does not train.
        trains: says of a parameter's path whether it trains.
        delta_item: bytes of an element of what trains.
    """

    def __init__(self, item: int, trains: Callable[[str], bool], delta_item: int = 4) -> None:
        self.item, self.delta_item, self.trains = item, delta_item, trains
        self.kernels: list[Kernel] = []
        self.parameters: dict[str, Value] = {}
        # Parts of the forward pass in their order, and whether each is recomputed.
        self._parts: list[tuple[bool, list[Node]]] = [(False, [])]

    def bytes_of(self, trained: bool) -> int:
        """Return the bytes of the parameters that train, or of the others."""
        each = self.delta_item if trained else self.item
        return sum(item.numel * each if item.stored is None else item.stored for item in self.parameters.values()
                   if item.graded is trained)

    def parameter(self, path: str, *shape: int) -> Value:
        """Return the parameter at `path`, which is made when it is first asked for."""
        return self.parameters.setdefault(path, Value(shape, None, self.trains(path)))

    def stored_parameter(self, path: str, stored: int, *shape: int) -> Value:
        """Return the parameter at `path`, which is frozen and held in so many bytes."""
        return self.parameters.setdefault(path, Value(shape, None, False, stored))

    def input(self, *shape: int) -> Value:
        """Return what the step is called with, or a constant."""
        return Value(shape, None, False)

    @contextmanager
    def recomputed(self, wanted: bool) -> Iterator[None]:
        """Record what follows as one block, which is recomputed if `wanted`."""
        self._parts.append((wanted, []))
        yield
        self._parts.append((False, []))

    def run(self, kind: str, reads: Sequence[Value], shape: Shape, item: int | None = None, buffer: int = 0) -> Value:
        """Run a kernel; return what it writes.

        Args:
            kind: MindSpore's name of the operator.
            reads: what it reads.
            shape: of what it writes.
            item: bytes of an element of that, where it is not the tape's.
            buffer: bytes that it keeps on CPU as long as the graph lives, besides its tables.
        """
        memory = Memory(math.prod(shape) * (item or self.item))
        tables = tables_of(kind, [value.shape for value in reads], shape)
        self.kernels.append(Kernel(kind, tuple(value.memory for value in reads if value.memory), (memory,),
                                   tables + buffer))
        return Value(shape, memory, any(value.graded for value in reads))

    def record(self, reads: Sequence[Value], forward: Forward, backward: Backward, own_bprop: bool = False) -> Value:
        """Run an operator of the forward pass; return its result."""
        results = forward(list(reads))
        self._parts[-1][1].append(Node(list(reads), forward, backward, results, own_bprop))
        return results[0]

    def apply(self, kind: str, reads: Sequence[Value], shape: Shape, backward: Backward) -> Value:
        """Run an operator of one kernel; return its result."""
        return self.record(reads, lambda reads: [self.run(kind, reads, shape)], backward)

    def view(self, x: Value, *shape: int) -> Value:
        """Return `x` in another shape, in the same memory."""
        return self.record([x], lambda reads: [reads[0].viewed(*shape)],
                           lambda reads, results, dy: [dy.viewed(*reads[0].shape)])

    def backward(self, loss: Value) -> list[Kernel]:
        """Append the backward pass from `loss`, and a kernel of the optimizer for each parameter that trains.

        Returns:
            All kernels of the step, without those whose results nobody reads: the compiler leaves them out.
        """
        gradients: dict[int, list[Value]] = {id(loss): [self.run("Fill", [], loss.shape)]}
        for wanted, nodes in reversed(self._parts):
            again: dict[int, Value] = {}
            results = {id(node): node.results for node in nodes}
            if wanted and nodes and nodes[-1].results[0].graded:
                results = self._run_again(nodes, again, gradients[id(nodes[-1].results[0])])
            for node in reversed(nodes):
                given = gradients.pop(id(node.results[0]), [])
                if not given:
                    continue
                dy = self.run("AddN", given, node.results[0].shape) if len(given) > 1 else given[0]
                reads, written = node.reads, node.results
                if not node.own_bprop:
                    reads, written = [again.get(id(value), value) for value in reads], results[id(node)]
                for value, gradient in zip(node.reads, node.backward(reads, written, dy)):
                    if value.graded and gradient is not None:
                        gradients.setdefault(id(value), []).append(gradient)
        for parameter in self.parameters.values():
            given = gradients.get(id(parameter), [])
            if given:
                self.kernels.append(Kernel("AdamWeightDecay", tuple(item.memory for item in given if item.memory), ()))
        return self._needed()

    def _run_again(self, nodes: list[Node], again: dict[int, Value], due: list[Value]) -> dict[int, list[Value]]:
        """Run the forward pass of a block once more; return its results by the ids of the nodes.

        Args:
            nodes: the block.
            again: gets the new results by the ids of the first ones.
            due: the gradients of what goes out, for which kernels wait that read nothing that is computed again.
        """
        found: dict[int, list[Value]] = {}
        waits = tuple(value.memory for value in due if value.memory)
        start = len(self.kernels)
        for node in nodes:
            found[id(node)] = node.forward([again.get(id(value), value) for value in node.reads])
            again[id(node.results[0])] = dataclasses.replace(found[id(node)][0], graded=node.results[0].graded)
        made = {id(piece) for kernel in self.kernels[start:] for piece in kernel.writes}
        for place, kernel in enumerate(self.kernels[start:], start):
            reads = kernel.reads if any(id(piece) in made for piece in kernel.reads) else (*kernel.reads, *waits)
            self.kernels[place] = dataclasses.replace(kernel, reads=reads, copied=True)
        return found

    def _needed(self) -> list[Kernel]:
        found: list[Kernel] = []
        read: set[int] = set()
        for kernel in reversed(self.kernels):
            if not kernel.writes or any(id(piece) in read for piece in kernel.writes):
                read |= {id(piece) for piece in kernel.reads}
                found.append(kernel)
        return found[::-1]
