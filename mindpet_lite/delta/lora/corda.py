"""CorDA: context-oriented decomposition adaptation, Yang et al., 2024, https://arxiv.org/abs/2406.05223.

With C = Xᵀ X of what the layer is given, W C = U S Vᵀ, and W = U S (Vᵀ C⁻¹).                  (section 3.2)

A and B start as the part of some of those directions, which is taken out of W: the largest in the instruction-previewed
mode ("ipm"), or the smallest in the knowledge-preserved mode ("kpm").                          (section 3.3)
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.delta.data_start import Begin

_METHODS = ("ipm", "kpm")
# Of the mean of C's diagonal, added to the diagonal so that C has an inverse (section 3.2, as the authors' code).
_DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class CordaConfig:
    """Settings of CorDA, by PEFT's names.

    Args:
        corda_method: "ipm": the largest directions train, for what is to be learnt, of which the data are samples.
            "kpm": the smallest, so that what the data are samples of is kept.

    Raises:
        ValueError: `corda_method` is another.
    """

    corda_method: str = "ipm"

    def __post_init__(self) -> None:
        if self.corda_method not in _METHODS:
            raise ValueError(f"corda_config corda_method must be one of {', '.join(_METHODS)}, but got "
                             f"{self.corda_method!r:.100}.{did_you_mean(self.corda_method, _METHODS)}")

    def places(self, batch: Any) -> np.ndarray | None:
        """Return None: all places count."""
        return None

    def gathered(self, layer: Any) -> Covariance:
        """Return what takes in the inputs of a layer."""
        return Covariance()

    def is_settled(self, found: Mapping[str, tuple[Any, Covariance]]) -> bool:
        """Return False: C is a mean over all data."""
        return False

    def begin(self, found: Mapping[str, tuple[Any, Covariance]]) -> dict[str, Begin]:
        """Return what gives each layer its factors."""
        silent = [f"{path}: all that it is given is 0: there is no direction in it." for path, (_, seen) in
                  found.items() if not seen.total.any()]
        if silent:
            raise ValueError("\n  ".join(silent))
        return {path: partial(layer.begin, *self.factors(layer.weight_numbers(), seen.total / seen.calls,
                                                          layer.lora_rank, layer.factor()))
                for path, (layer, seen) in found.items()}

    def factors(self, weight: np.ndarray, covariance: np.ndarray, rank: int, scaling: float
                ) -> tuple[np.ndarray, np.ndarray]:
        """Return A (rank, in) and B (out, rank).

        Args:
            weight: W (out, in).
            covariance: C (in, in).
            rank: of the update.
            scaling: what B A is multiplied with.
        """
        damped = covariance + np.eye(len(covariance)) * _DAMPING * np.diag(covariance).mean()
        u, s, vt = np.linalg.svd(weight.astype(np.float64) @ damped, full_matrices=False)
        vt = np.linalg.solve(damped.T, vt.T).T
        chosen = slice(rank) if self.corda_method == "ipm" else slice(len(s) - rank, None)
        root = np.sqrt(s[chosen] / scaling)
        return root[:, None] * vt[chosen], u[:, chosen] * root


class Covariance:
    """The sum of Xᵀ X over calls, each X divided by its largest number as the authors' code does."""

    def __init__(self) -> None:
        self.calls = 0
        self.total = np.zeros(())

    def add(self, rows: np.ndarray) -> None:
        """Take in rows (n, inputs)."""
        largest = np.abs(rows).max()
        rows = rows / largest if largest else rows
        self.total, self.calls = self.total + rows.T @ rows, self.calls + 1
