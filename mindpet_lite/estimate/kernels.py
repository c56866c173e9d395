"""What a training step runs, as kernels that read and write memory; and the most memory they hold at a time."""
from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Sequence

# Bytes of an index into a tensor, of which MindSpore's kernels on CPU keep tables: a Transpose one for each element, a
# sum or product of two shapes two for each element of the result.
INDEX = 8
# MindSpore's pools hand out memory in units of this.
UNIT = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """A piece of memory of some bytes, known by its identity."""

    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", -(-self.size // UNIT) * UNIT)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that has memory while it runs: what it reads, and what it writes, until the last kernel has read it.

    `tables` are bytes that the kernel keeps on CPU, as long as its graph lives. A kernel that recomputes is `copied` by
    the compiler from one of the forward pass.
    """

    kind: str
    reads: tuple[Memory, ...]
    writes: tuple[Memory, ...]
    tables: int = 0
    copied: bool = False


def as_run(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Return the kernels in the order in which MindSpore runs them: each as soon as what it reads is there.

    So kernels of the backward pass that read activations only, or parameters only, run long before their turn, and
    what they write is held.
    """
    makers = {id(piece): index for index, kernel in enumerate(kernels) for piece in kernel.writes}
    waits = [{makers[id(piece)] for piece in kernel.reads if id(piece) in makers} for kernel in kernels]
    readers: dict[int, list[int]] = {}
    for index, needed in enumerate(waits):
        for maker in needed:
            readers.setdefault(maker, []).append(index)
    ready = deque(index for index, needed in enumerate(waits) if not needed)
    order: list[Kernel] = []
    while ready:
        index = ready.popleft()
        order.append(kernels[index])
        for reader in readers.get(index, []):
            waits[reader].discard(index)
            if not waits[reader]:
                ready.append(reader)
    return order


def highest(kernels: Sequence[Kernel], kept: Iterable[Memory] = ()) -> int:
    """Return the most bytes that are held while the kernels run one after the other.

    What a kernel writes is there from then on until the last kernel that reads it has run; what is `kept` stays. So a
    kernel of the backward pass that reads an activation is why that activation is held.

    Args:
        kernels: in the order in which they run.
        kept: the step's results.
    """
    last = {id(piece): index for index, kernel in enumerate(kernels) for piece in (*kernel.reads, *kernel.writes)}
    last |= {id(piece): len(kernels) for piece in kept}
    held = most = 0
    there: set[int] = set()
    for index, kernel in enumerate(kernels):
        for piece in {id(piece): piece for piece in kernel.writes}.values():
            if id(piece) not in there:
                there.add(id(piece))
                held += piece.size
        most = max(most, held)
        for piece in {id(piece): piece for piece in (*kernel.reads, *kernel.writes)}.values():
            if last[id(piece)] == index and id(piece) in there:
                there.remove(id(piece))
                held -= piece.size
    return most


def tables_of(kind: str, shapes: Sequence[Sequence[int]], result: Sequence[int]) -> int:
    """Return the bytes of the tables of indices that MindSpore's kernel of this kind keeps on CPU.

    Args:
        kind: MindSpore's name of the operator.
        shapes: of what it reads.
        result: shape of what it writes.
    """
    size = math.prod(result)
    if kind == "Transpose":
        return INDEX * size
    if kind in BROADCASTING and len(shapes) == 2 and min(map(math.prod, shapes)) > 1 and \
            list(shapes[0]) != list(shapes[1]):
        return 2 * INDEX * size
    return 0


BROADCASTING = ("Add", "Sub", "Mul", "Div", "RealDiv")
