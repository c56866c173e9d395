"""What layers with rows that train have in common: whose the rows are, and where a layer has them."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mindspore import Parameter

from mindpet_lite.delta.base import Delta


@dataclasses.dataclass(frozen=True)
class RowsOf:
    """What a method calls rows that train.

    Args:
        method: its name.
        parameter: the name of the Parameter that holds the rows.
        field: of its config, with the token numbers.
    """

    method: str
    parameter: str
    field: str


class WithRows(Delta):
    """A layer that computes with rows that train: its own, or those of the layer that it follows."""

    rows_of: RowsOf
    token_indices: tuple[int, ...]
    scaling: Parameter

    @property
    def trained_rows(self) -> Parameter:
        """The rows that train, (tokens, embedding_size)."""
        rows: Parameter = getattr(self, self.rows_of.parameter)
        return rows

    def _be_of(self, rows_of: RowsOf, tokens: Sequence[int]) -> None:
        """Be a layer of the method, for these tokens."""
        self.method = rows_of.method  # type: ignore[misc]
        self.rows_of, self.token_indices = rows_of, tuple(tokens)

    def _follow(self: Any, first: WithRows) -> None:
        """Take the tokens and the Parameters of the first, without renaming them."""
        self._be_of(first.rows_of, first.token_indices)
        self.follows, self.delta_names = True, ()
        for name in (first.rows_of.parameter, "scaling"):
            self.insert_param_to_cell(name, getattr(first, name))


def are_tokens(value: object) -> bool:
    """Tell whether a value is a list of token numbers that is not empty."""
    return isinstance(value, (list, tuple)) and bool(value) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value)
