"""EVA: Explained Variance Adaptation, Paischer et al., 2024, https://arxiv.org/abs/2410.07170.

A starts as the right singular vectors of what the layer is given, B at zero, so that training starts at the base. The
layers share out their ranks by how much of the variance of their inputs each direction explains.    (section 3, alg. 1)
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mindpet_lite.arguments import check_bool, check_number
from mindpet_lite.delta.data_start import Begin, seen_places, values_in
from mindpet_lite.delta.lora.start import fast_svd

_ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class EvaConfig:
    """Settings of EVA, by PEFT's names.

    Args:
        rho: the highest rank of a layer is `rho` times its own; 1 leaves all ranks as they are.
        tau: the data are enough once each direction that is used has a cosine of at least `tau` with itself a call
            of the layer before.
        use_label_mask: places of a batch whose "labels" are `label_mask_value` do not count.
        label_mask_value: see there.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: change alpha with the rank, so that the scale of a layer's update stays what it was.

    Raises:
        TypeError, ValueError: a value is of another type, rho is below 1 or tau outside [0, 1].
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not 1 <= check_number("eva_config rho", self.rho) < math.inf:
            raise ValueError(f"eva_config rho must be a number of at least 1, but got {self.rho}.")
        if not 0 <= check_number("eva_config tau", self.tau) <= 1:
            raise ValueError(f"eva_config tau must be from 0 to 1, but got {self.tau}.")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            check_bool(f"eva_config {name}", getattr(self, name))
        check_number("eva_config label_mask_value", self.label_mask_value)

    def places(self, batch: Any) -> np.ndarray | None:
        """Return where a batch's attention_mask is not 0, and its labels are no mask; None for a batch without both."""
        seen, labels = seen_places(batch), values_in(batch, "labels")
        if not self.use_label_mask or labels is None:
            return seen
        answers = labels != self.label_mask_value
        return answers if seen is None else seen & answers

    def gathered(self, layer: Any) -> PrincipalComponents:
        """Return what takes in the inputs of a layer."""
        most = min(round(layer.lora_rank * self.rho), layer.inputs(layer), layer.outputs(layer))
        return PrincipalComponents(max(most, layer.lora_rank))

    def ranks(self, found: Mapping[str, tuple[Any, PrincipalComponents]]) -> dict[str, int]:
        """Return the rank of each layer: the directions that explain most, as many as all ranks together."""
        budget = sum(layer.lora_rank for layer, _ in found.values())
        parts = [(ratio, path) for path, (_, seen) in found.items() for ratio in seen.explained()]
        parts.sort(key=lambda part: -part[0])
        ranks = dict.fromkeys(found, 0)
        for _, path in parts[:budget]:
            ranks[path] += 1
        return ranks

    def is_settled(self, found: Mapping[str, tuple[Any, PrincipalComponents]]) -> bool:
        """Tell whether each layer's directions are those of a call before."""
        return all(len(found[path][1].cosines) >= rank and (found[path][1].cosines[:rank] >= self.tau).all()
                   for path, rank in self.ranks(found).items())

    def begin(self, found: Mapping[str, tuple[Any, PrincipalComponents]]) -> dict[str, Begin]:
        """Return what gives each layer its directions; a layer without any becomes plain."""
        few = [f"{path}: the data have {seen.rows} rows for it, but its rank {layer.lora_rank} needs more rows than "
               f"that: give more data, or a lower rank." for path, (layer, seen) in found.items()
               if seen.rows <= layer.lora_rank]
        same = [f"{path}: all that it is given is the same: there is no direction in it." for path, (_, seen) in
                found.items() if not seen.explained().any()]
        if few or same:
            raise ValueError("\n  ".join([*few, *same]))
        return {path: partial(self._begin, *found[path], rank) for path, rank in self.ranks(found).items()}

    def _begin(self, layer: Any, seen: PrincipalComponents, rank: int) -> Any:
        if not rank:
            return None
        a = seen.directions[:rank]
        if self.whiten:
            a = a / np.sqrt(seen.values[:rank, None])
        share = rank / layer.lora_rank
        if not self.adjust_scaling_factors:
            share = 1
        elif layer.use_rslora:
            share = math.sqrt(share)
        return layer.begin(a, lora_alpha=layer.lora_alpha * share if share != 1 else layer.lora_alpha)


class PrincipalComponents:
    """The directions of rows, batch by batch (Ross et al., 2008, Incremental Learning for Robust Visual Tracking, 3.2).

    What was seen is kept as its largest singular values and vectors, around the mean of all rows: those that are
    wanted, and some more, so that what the truncation leaves out matters less.

    Args:
        most: how many directions are wanted.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.rows = 0
        self.mean = self.squares = np.zeros(0)
        self.values = self.cosines = np.zeros(0)
        self.directions = np.zeros((0, 0))

    def add(self, rows: np.ndarray) -> None:
        """Take in rows (n, inputs)."""
        count, mean = len(rows), rows.mean(0)
        stacked = rows - mean
        squares = np.square(stacked).sum(0)
        total = self.rows + count
        if self.rows:
            # The two means differ from the common one: as a row more.
            between = math.sqrt(self.rows * count / total) * (self.mean - mean)
            squares = self.squares + squares + np.square(between)
            mean = (self.rows * self.mean + count * mean) / total
            stacked = np.vstack([self.values[:, None] * self.directions, stacked, between])
        _, values, directions = fast_svd(stacked, min(self.most, *stacked.shape), _ITERATIONS)
        # The sign of a direction is free: its largest number is positive.
        largest = np.abs(directions).argmax(1)
        directions = directions * np.where(directions[np.arange(len(directions)), largest] < 0, -1, 1)[:, None]
        known = min(len(directions), len(self.directions))
        self.cosines = (directions[:known] * self.directions[:known]).sum(1) if known else np.zeros(0)
        self.rows, self.mean, self.squares, self.values, self.directions = total, mean, squares, values, directions

    def explained(self) -> np.ndarray:
        """Return for each direction that is wanted which part of the variance of all rows it explains."""
        total, values = self.squares.sum(), self.values[:self.most]
        return np.square(values) / total if total > 0 else np.zeros(len(values))
