"""Trainable tokens: chosen rows of an embedding train beside LoRA, as PEFT's `trainable_token_indices`."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.hosts import Host, as_running, override_refusal, take_types
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.hosts.embedding import EmbeddingHost, MintEmbeddingHost
from mindpet_lite.delta.hosts.linear import LinearHost
from mindpet_lite.delta.parts import as_type, prefix_of, put
from mindpet_lite.delta.values import setting_parameter


class TokenTable(Delta, Host):
    r"""An embedding of which some rows train: y_i = D_k where i is the k-th of the token numbers, else T_i.

    The table T (vocab_size, embedding_size) stays frozen; `mindpet_delta_lora_tokens` D (tokens, embedding_size)
    starts as its rows, so that the layer starts equal to its base. `scaling` () holds the strength t:
    T_i + t (D_k - T_i), exact at 0 and 1. Made by :class:`mindpet_lite.LoraConfig` with `trainable_token_indices`.

    Where another layer has the same table as its weight (tied weights), that layer computes with the trained rows too:
    :class:`TokenDense`, :class:`TokenLinear`, or this class again for another embedding.

    Source: PEFT, trainable tokens.
    """

    method: ClassVar[str] = "lora"
    delta_names = ("mindpet_delta_lora_tokens",)
    setting_names = ("scaling",)
    follows_ties = True

    _plain: tuple[nn.Cell, ...] = ()
    token_indices: tuple[int, ...]
    lora_token_ids: Tensor
    scaling: Parameter
    mindpet_delta_lora_tokens: Parameter

    @classmethod
    def on_rows(cls, plain: nn.Cell, tokens: Sequence[int]) -> TokenTable:
        """Return the layer on the Parameter object of `plain`, which stays as it is.

        Raises:
            ValueError: a token is not in the table, or named twice; or the layer changes rows by itself.
        """
        table = getattr(plain, cls.base_names[0])
        size = table.shape[0]
        wrong = [token for token in tokens if token >= size]
        if wrong or len(set(tokens)) != len(tokens):
            raise ValueError(f"trainable_token_indices must be different numbers below {size}, the size of the table, "
                             f"but got {list(tokens)}.")
        layer = cls.on(cls, plain)
        layer._require_still_rows(tokens)
        prefix = prefix_of(table.name)
        layer.token_indices = tuple(tokens)
        layer.mindpet_delta_lora_tokens = Parameter(layer._rows_of(table), name=prefix + "mindpet_delta_lora_tokens")
        layer.scaling = setting_parameter(1.0, prefix + "scaling")
        layer._take_plain(plain)
        return layer

    @classmethod
    def after(cls, first: TokenTable, plain: nn.Cell) -> TokenTable:
        """Return the layer on another embedding with the same table, with the rows of the first."""
        layer = cls.on(cls, plain)
        layer._require_still_rows(first.token_indices)
        follow(layer, first)
        layer._take_plain(plain)
        return layer

    def _take_plain(self, plain: nn.Cell) -> None:
        self._plain = (plain,)
        self.lora_token_ids = Tensor(np.array(self.token_indices, np.int32))
        take_types(self, plain)

    def _require_still_rows(self, tokens: Sequence[int]) -> None:
        """Raise ValueError where the layer itself changes rows that are to train, or keeps their gradients."""

    def construct(self, ids: Tensor) -> Tensor:
        """Look up `ids` (*); return (*, embedding_size) of the type of the table, or what `to_float()` set."""
        dtype = self._compute_type()
        y = ops.reshape(self.linear(self.arranged(ids), self.weight, dtype), (*ids.shape, -1))
        # Products with 0 and 1: exact, and without a shape that depends on the ids.
        which = as_type(ops.equal(ops.expand_dims(as_type(ids, mindspore.int32), -1), self.lora_token_ids), dtype)
        gate = as_type(self.scaling, dtype)
        chosen = ops.matmul(which, as_type(self.mindpet_delta_lora_tokens, dtype))
        is_chosen = which.sum(-1, keepdims=True)
        return as_type(y * (1 - is_chosen * gate) + chosen * gate, self._output_type(ids))

    def setting_values(self) -> dict[str, Any]:
        """Return the strength for the scaling, or 0 where switched off."""
        return {"scaling": self.strength if self.enabled else 0.0}

    def base_parameter(self) -> Parameter:
        """Return the table: the rows start as its own."""
        return self.weight

    def start_again(self) -> None:
        """Take the rows from the table as it is now."""
        put(self.mindpet_delta_lora_tokens, self._rows_of(self.weight))

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

    def _rows_of(self, table: Parameter) -> Tensor:
        return Tensor(table.astype(mindspore.float32).asnumpy()[list(self.token_indices)]).astype(table.dtype)

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return the table with the trained rows in it, at the strength of the running net."""
        table = self.weight.astype(mindspore.float32).asnumpy().copy()
        rows, gate = list(self.token_indices), float(self.scaling.asnumpy())
        trained = self.mindpet_delta_lora_tokens.astype(mindspore.float32).asnumpy()
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
    """`nn.Embedding` with rows that train; see :class:`TokenTable`."""


class TrainedMintTokens(TokenTable, MintEmbeddingHost):
    """`mint.nn.Embedding` with rows that train; see :class:`TokenTable`."""

    def _require_still_rows(self, tokens: Sequence[int]) -> None:
        for name, reason in (("max_norm", "rewrites rows whenever they are looked up"),
                             ("scale_grad_by_freq", "scales gradients, which those of the tokens would not follow")):
            if getattr(self, name):
                raise ValueError(f"an embedding with {name}={getattr(self, name)!r} {reason}: its tokens cannot be "
                                 f"trained.")
        if self.padding_idx is not None and self.padding_idx % self.num_embeddings in tokens:
            raise ValueError(f"token {self.padding_idx} is the padding_idx of the embedding, which does not train: "
                             f"leave it out.")


class _TokenColumns(Delta):
    """A layer over the vocabulary whose weight is the table of an embedding with trained tokens: the rows are shared.

    y = x Tᵀ + b, and x (D - T)ᵀ more at the outputs of the tokens, times the strength. It equals the plain layer
    bit for bit at the start and while switched off.
    """

    method: ClassVar[str] = "lora"
    follows = True
    delta_names = ()

    _plain: tuple[nn.Cell, ...] = ()
    weight: Parameter
    scaling: Parameter
    lora_token_ids: Tensor
    lora_vocabulary: Tensor
    token_indices: tuple[int, ...]
    mindpet_delta_lora_tokens: Parameter

    def _take(self, first: TokenTable, plain: nn.Cell) -> None:
        follow(self, first)
        self._plain = (plain,)
        self.lora_token_ids = Tensor(np.array(self.token_indices, np.int32)[:, None])
        self.lora_vocabulary = Tensor(np.arange(first.weight.shape[0], dtype=np.int32))

    def _change(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what the trained tokens add to the output for the input `x` of type `dtype`."""
        rows = ops.gather(self.weight, self.lora_token_ids[:, 0], 0)
        change = as_type(self.mindpet_delta_lora_tokens - rows, dtype) * as_type(self.scaling, dtype)
        # Products with 0 and 1 again: each token's column goes to its place.
        places = as_type(ops.equal(self.lora_token_ids, self.lora_vocabulary), dtype)
        return ops.matmul(ops.matmul(x, ops.transpose(change, (1, 0))), places)

    def plain_cell(self) -> nn.Cell:
        """Return the layer that this one is on."""
        return as_running(self._plain[0], self)  # type: ignore[arg-type]


class TokenDense(_TokenColumns, DenseHost):
    """`nn.Dense` on the table of trained tokens; see :class:`_TokenColumns`."""

    @classmethod
    def after(cls, first: TokenTable, plain: nn.Dense) -> TokenDense:
        """Return the layer on the Parameter objects of `plain`, with the rows of the first."""
        layer = cls.on(cls, plain)
        layer._take(first, plain)
        take_types(layer, plain)
        return layer

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the plain layer's outputs and what the trained tokens add."""
        return self.biased(self.matmul(h, weight), dtype) + self._change(h, dtype)


class TokenLinear(_TokenColumns, LinearHost):
    """`mint.nn.Linear` on the table of trained tokens; see :class:`_TokenColumns`."""

    @classmethod
    def after(cls, first: TokenTable, plain: mint.nn.Linear) -> TokenLinear:
        """Return the layer on the Parameter objects of `plain`, with the rows of the first."""
        layer = cls.on(cls, plain)
        layer._take(first, plain)
        take_types(layer, plain)
        return layer

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the plain layer's outputs and what the trained tokens add."""
        bias = as_type(self.bias, dtype) if self.has_bias else None
        return self.dense(h, weight, bias) + self._change(h, dtype)


TABLES: dict[type[nn.Cell], type[TokenTable]] = {nn.Embedding: TrainedTokens, mint.nn.Embedding: TrainedMintTokens}
_FOLLOWERS: dict[type[nn.Cell], Any] = {nn.Dense: TokenDense, mint.nn.Linear: TokenLinear, **TABLES}


def token_table(cell: nn.Cell) -> type[TokenTable] | None:
    """Return the class that trains tokens of an embedding that is not adapted, or None for another cell."""
    return None if isinstance(cell, Delta) else next((kind for plain, kind in TABLES.items()
                                                      if isinstance(cell, plain)), None)


def follow(layer: Any, first: TokenTable) -> None:
    """Give a layer the tokens and the Parameters of the first, without renaming them."""
    layer.follows, layer.delta_names, layer.token_indices = True, (), first.token_indices
    for name in ("mindpet_delta_lora_tokens", "scaling"):
        layer.insert_param_to_cell(name, getattr(first, name))


def _follower(first: TokenTable, path: str, cell: nn.Cell) -> Delta:
    """Return a layer with the same table as it computes with the trained tokens."""
    plain = next((kind for kind in _FOLLOWERS if isinstance(cell, kind)), None)
    where = f"{path}, a {type(cell).__name__}, has the same table as its weight (tied weights)"
    cure = "give it a weight of its own, or do not train tokens"
    if isinstance(cell, Delta):
        raise ValueError(f"{where} and is adapted already: merge() it first, or do not train tokens.")
    if plain is None:
        raise ValueError(f"{where}, and is no layer that can compute with the trained tokens: {cure}.")
    reason = override_refusal(cell, plain, plain.__name__, "trainable_token_indices")
    if reason:
        raise ValueError(f"{where}, but {reason}")
    layer: Delta = _FOLLOWERS[plain].after(first, cell)
    return layer
