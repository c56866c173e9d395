"""What a bank holds: its adapters, where each stands in the reserved room, and which of them count."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Tensor

from mindpet_lite.delta.lora.settings import scale_of

# Choices of which a bank keeps the numbers.
_MOST_SEEN = 64


@dataclasses.dataclass
class Choice:
    """Which adapters of a bank count: weights by name, or where samples differ a name, or None, for each."""

    weights: dict[str, float]
    names: tuple[str | None, ...] | None = None
    # The numbers of `scaling` by choice, strength and switch: a choice that was made before costs a look-up.
    seen: dict[Any, Tensor] = dataclasses.field(default_factory=dict)

    def remember(self, key: Any, numbers: Tensor) -> None:
        """Keep the numbers of a choice, and forget the others where they are many."""
        if len(self.seen) >= _MOST_SEEN:
            self.seen.clear()
        self.seen[key] = numbers


@dataclasses.dataclass
class Slot:
    """One adapter of a bank.

    Args:
        settings: lora_rank, lora_alpha, lora_dropout, use_rslora.
        names: of its Parameters A and B in the layer, or None where it stands in the reserved room.
        start: its first place in a group's share of the room.
        file_types: see `Delta.file_types`.
    """

    settings: dict[str, Any]
    names: tuple[str, str] | None
    start: int = 0
    file_types: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Its rank."""
        return int(self.settings["lora_rank"])

    @property
    def scale(self) -> float:
        """Its alpha / rank, or alpha / √rank."""
        return scale_of(self.settings["lora_alpha"], self.rank, self.settings.get("use_rslora", False))

    def places(self, room: int, groups: int) -> tuple[np.ndarray, slice]:
        """Return which rows of the room's A and columns of its B are its own: some of each group's share."""
        own = self.rank // groups
        rows = np.concatenate([np.arange(own) + group * (room // groups) + self.start for group in range(groups)])
        return rows, slice(self.start, self.start + own)


def free_place(slots: Mapping[str, Slot], rank: int, room: int, groups: int) -> int:
    """Return the first place of a group's share of the room that has `rank` rows free.

    Raises:
        ValueError: there is none.
    """
    share, wanted = room // groups, rank // groups
    taken = sorted((slot.start, slot.start + slot.rank // groups) for slot in slots.values() if slot.names is None)
    start = 0
    for begin, end in taken:
        if begin - start >= wanted:
            break
        start = end
    if rank % groups or start + wanted > share:
        used = sum(end - begin for begin, end in taken) * groups
        raise ValueError(f"rank {rank} does not fit the room of rank {room}, of which {used} are taken: "
                         f"delete_adapter() frees some, reserve_adapters() makes more.")
    return start
