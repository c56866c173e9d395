"""An embedding of which chosen rows train, and what it makes of the layers that have its table (tied weights)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.hosts import Host, as_running, override_refusal, take_types
from mindpet_lite.delta.hosts.embedding import EmbeddingHost, MintEmbeddingHost
from mindpet_lite.delta.parts import as_type, prefix_of, put
from mindpet_lite.delta.tokens.columns import TokenDense, TokenLinear
from mindpet_lite.delta.tokens.rows import RowsOf, WithRows
from mindpet_lite.delta.values import setting_parameter


class TokenTable(WithRows, Host):
    r"""An embedding of which some rows train: y_i = D_k where i is the k-th of the token numbers, else T_i.

    The table T (vocab_size, embedding_size) stays frozen. D (tokens, embedding_size), under the name that the method
    gives it, starts as its rows, so that the layer starts equal to its base. `scaling` () holds the strength t:
    T_i + t (D_k - T_i), exact at 0 and 1.

    Where another layer has the same table as its weight (tied weights), that layer computes with the trained rows too:
    `TokenDense`, `TokenLinear`, or this class again for another embedding.

    Source: PEFT, trainable tokens.
    """

    setting_names = ("scaling",)
    follows_ties = True

    _plain: tuple[nn.Cell, ...] = ()
    starts_as_base = True
    token_ids: Tensor

    @classmethod
    def on_rows(cls, plain: nn.Cell, tokens: Sequence[int], rows_of: RowsOf, starts_as_base: bool = True) -> TokenTable:
        """Return the layer on the Parameter object of `plain`, which stays as it is.

        Args:
            plain: the embedding.
            tokens: the numbers of the rows that train.
            rows_of: the method that trains them.
            starts_as_base: False starts the rows at random, from a normal distribution.

        Raises:
            ValueError: a token is not in the table, or named twice; or the layer changes rows by itself.
        """
        table = getattr(plain, cls.base_names[0])
        size = table.shape[0]
        wrong = [token for token in tokens if token >= size]
        if wrong or len(set(tokens)) != len(tokens):
            raise ValueError(f"{rows_of.field} must be different numbers below {size}, the size of the table, but got "
                             f"{list(tokens)}.")
        layer = cls.on(cls, plain)
        layer._require_still_rows(tokens)
        prefix = prefix_of(table.name)
        layer._be_of(rows_of, tokens)
        layer.starts_as_base, layer.delta_names = starts_as_base, (rows_of.parameter,)
        start = layer._rows_in(table) if starts_as_base else Tensor(
            np.random.standard_normal((len(tokens), table.shape[1])), table.dtype)
        setattr(layer, rows_of.parameter, Parameter(start, name=prefix + rows_of.parameter))
        layer.scaling = setting_parameter(1.0, prefix + "scaling")
        layer._take_plain(plain)
        return layer

    @classmethod
    def after(cls, first: TokenTable, plain: nn.Cell) -> TokenTable:
        """Return the layer on another embedding with the same table, with the rows of the first."""
        layer = cls.on(cls, plain)
        layer._require_still_rows(first.token_indices)
        layer._follow(first)
        layer._take_plain(plain)
        return layer

    def _take_plain(self, plain: nn.Cell) -> None:
        self._plain = (plain,)
        self.token_ids = Tensor(np.array(self.token_indices, np.int32))
        take_types(self, plain)

    def _require_still_rows(self, tokens: Sequence[int]) -> None:
        """Raise ValueError where the layer itself changes rows that are to train, or keeps their gradients."""

    def construct(self, ids: Tensor) -> Tensor:
        """Look up `ids` (*); return (*, embedding_size) of the type of the table, or what `to_float()` set."""
        dtype = self._compute_type()
        y = ops.reshape(self.linear(self.arranged(ids), self.weight, dtype), (*ids.shape, -1))
        # Products with 0 and 1: exact, and without a shape that depends on the ids.
        which = as_type(ops.equal(ops.expand_dims(as_type(ids, mindspore.int32), -1), self.token_ids), dtype)
        gate = as_type(self.scaling, dtype)
        chosen = ops.matmul(which, as_type(self.trained_rows, dtype))
        is_chosen = which.sum(-1, keepdims=True)
        return as_type(y * (1 - is_chosen * gate) + chosen * gate, self._output_type(ids))

    def setting_values(self) -> dict[str, Any]:
        """Return the strength for the scaling, or 0 where switched off."""
        return {"scaling": self.strength if self.enabled else 0.0}

    def base_parameter(self) -> Parameter | None:
        """Return the table where the rows start as its own."""
        return self.weight if self.starts_as_base else None

    def start_again(self) -> None:
        """Take the rows from the table as it is now."""
        put(self.trained_rows, self._rows_in(self.weight))

    def followers(self, cells: Mapping[str, nn.Cell]) -> dict[str, Delta]:
        """Return the layers whose weight is the table too, as they compute with the trained rows, by path.

        Raises:
            ValueError: one is of a kind that cannot.
        """
        found: dict[str, Delta] = {}
        seen = {id(self._plain[0])}
        for path, cell in cells.items():
            if id(cell) not in seen and any(item is self.weight
                                            for _, item in cell.parameters_and_names(expand=False)):
                seen.add(id(cell))
                found[path] = _follower(self, path, cell)
        return found

    def _rows_in(self, table: Parameter) -> Tensor:
        return Tensor(table.astype(mindspore.float32).asnumpy()[list(self.token_indices)]).astype(table.dtype)

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return the table with the trained rows in it, at the strength of the running net."""
        table = self.weight.astype(mindspore.float32).asnumpy().copy()
        rows, gate = list(self.token_indices), float(self.scaling.asnumpy())
        trained = self.trained_rows.astype(mindspore.float32).asnumpy()
        table[rows] = table[rows] * (1 - gate) + trained * gate
        return {self.weight: Tensor(table).astype(self.weight.dtype)}

    def plain_cell(self) -> nn.Cell:
        """Return the embedding that this layer is on."""
        return as_running(self._plain[0], self)

    def settings(self) -> dict[str, Any]:
        """Return token_indices."""
        return {"token_indices": list(self.token_indices)}

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over nothing: the token numbers are compared."""


class TrainedTokens(TokenTable, EmbeddingHost):
    """`nn.Embedding` with rows that train; see `TokenTable`."""


class TrainedMintTokens(TokenTable, MintEmbeddingHost):
    """`mint.nn.Embedding` with rows that train; see `TokenTable`."""

    def _require_still_rows(self, tokens: Sequence[int]) -> None:
        for name, reason in (("max_norm", "rewrites rows whenever they are looked up"),
                             ("scale_grad_by_freq", "scales gradients, which those of the tokens would not follow")):
            if getattr(self, name):
                raise ValueError(f"an embedding with {name}={getattr(self, name)!r} {reason}: its tokens cannot be "
                                 f"trained.")
        if self.padding_idx is not None and self.padding_idx % self.num_embeddings in tokens:
            raise ValueError(f"token {self.padding_idx} is the padding_idx of the embedding, which does not train: "
                             f"leave it out.")


TABLES: dict[type[nn.Cell], type[TokenTable]] = {nn.Embedding: TrainedTokens, mint.nn.Embedding: TrainedMintTokens}
_FOLLOWERS: dict[type[nn.Cell], Any] = {nn.Dense: TokenDense, mint.nn.Linear: TokenLinear, **TABLES}


def token_table(cell: nn.Cell) -> type[TokenTable] | None:
    """Return the class that trains tokens of an embedding that is not adapted, or None for another cell."""
    return None if isinstance(cell, Delta) else next((kind for plain, kind in TABLES.items()
                                                      if isinstance(cell, plain)), None)


def table_for(cell: nn.Cell) -> type[TokenTable]:
    """Return the class that trains tokens of an embedding; raise TypeError for another cell."""
    kind = token_table(cell)
    if kind is None:
        raise TypeError(f"tokens can only be trained of an embedding, not of a {type(cell).__name__}.")
    return kind


def rows_shape(cell: nn.Cell, tokens: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the rows of these tokens of a plain embedding; raise TypeError for another cell."""
    return len(tokens), getattr(cell, table_for(cell).base_names[0]).shape[1]


def _follower(first: TokenTable, path: str, cell: nn.Cell) -> Delta:
    """Return a layer with the same table as it computes with the trained tokens."""
    plain = next((kind for kind in _FOLLOWERS if isinstance(cell, kind)), None)
    where = f"{path}, a {type(cell).__name__}, has the same table as its weight (tied weights)"
    cure = "give it a weight of its own, or do not train tokens"
    if isinstance(cell, Delta):
        raise ValueError(f"{where} and is adapted already: merge() it first, or do not train tokens.")
    if plain is None:
        raise ValueError(f"{where}, and is no layer that can compute with the trained tokens: {cure}.")
    reason = override_refusal(cell, plain, plain.__name__, first.rows_of.field)
    if reason:
        raise ValueError(f"{where}, but {reason}")
    layer: Delta = _FOLLOWERS[plain].after(first, cell)
    return layer
