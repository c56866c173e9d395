"""Trainable tokens: chosen rows of an embedding train beside LoRA, as PEFT's `trainable_token_indices`."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.dense import as_running, take_types
from mindpet_lite.delta.lora.typed import TypedEmbedding
from mindpet_lite.delta.parts import as_type, put
from mindpet_lite.delta.values import setting_parameter


class TrainedTokens(TypedEmbedding, Delta):
    r"""An embedding of which some rows train: y_i = D_k where i is the k-th of the token numbers, else T_i.

    `embedding_table` (vocab_size, embedding_size) stays frozen; `mindpet_delta_lora_tokens` (tokens, embedding_size)
    starts as its rows, so that the layer starts equal to its base. `scaling` () holds the live strength t:
    T_i + t (D_k - T_i), exact at 0 and 1. Made by :class:`mindpet_lite.LoraConfig` with `trainable_token_indices`.

    Source: PEFT, trainable tokens.
    """

    method: ClassVar[str] = "lora"
    delta_names = ("mindpet_delta_lora_tokens",)
    live_names = ("scaling",)

    _plain: tuple[nn.Embedding, ...] = ()

    @classmethod
    def on_rows(cls, plain: nn.Embedding, tokens: Sequence[int]) -> TrainedTokens:
        """Return the layer on the Parameter object of `plain`, which stays as it is.

        Raises:
            ValueError: a token is not in the table, or named twice.
        """
        size = plain.embedding_table.shape[0]
        wrong = [token for token in tokens if token >= size]
        if wrong or len(set(tokens)) != len(tokens):
            raise ValueError(f"trainable_token_indices must be different numbers below {size}, the size of the table, "
                             f"but got {list(tokens)}.")
        layer = cls.on(cls, plain)
        layer.token_indices = tuple(tokens)
        layer._plain = (plain,)
        table = plain.embedding_table
        prefix = table.name.removesuffix("embedding_table")
        layer.mindpet_delta_lora_tokens = Parameter(layer._rows_of(table), name=prefix + "mindpet_delta_lora_tokens")
        layer.scaling = setting_parameter(1.0, prefix + "scaling")
        layer.lora_token_ids = Tensor(np.array(tokens, np.int32))
        take_types(layer, plain)
        return layer

    def construct(self, ids: Tensor) -> Tensor:
        """Look up `ids` (*); return (*, embedding_size) of the type of the table, or what `to_float()` set."""
        dtype = self._compute_type()
        y = self._base(ids, dtype)
        # Products with 0 and 1: exact, and without a shape that depends on the ids.
        which = as_type(ops.equal(ops.expand_dims(as_type(ids, mindspore.int32), -1), self.lora_token_ids), dtype)
        gate = as_type(self.scaling, dtype)
        chosen = ops.matmul(which, as_type(self.mindpet_delta_lora_tokens, dtype))
        is_chosen = which.sum(-1, keepdims=True)
        return as_type(y * (1 - is_chosen * gate) + chosen * gate, self._output_type(ids))

    def live_values(self) -> dict[str, Any]:
        """Return the strength for the live gate, or 0 where switched off."""
        return {"scaling": self.strength if self.enabled else 0.0}

    def base_parameter(self) -> Parameter:
        """Return the table: the rows start as its own."""
        return self.embedding_table

    def start_again(self) -> None:
        """Take the rows from the table as it is now."""
        put(self.mindpet_delta_lora_tokens, self._rows_of(self.embedding_table))

    def _rows_of(self, table: Parameter) -> Tensor:
        return Tensor(table.astype(mindspore.float32).asnumpy()[list(self.token_indices)]).astype(table.dtype)

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return the table with the trained rows in it, at the strength of the running net."""
        table = self.embedding_table.astype(mindspore.float32).asnumpy().copy()
        rows, gate = list(self.token_indices), float(self.scaling.asnumpy())
        trained = self.mindpet_delta_lora_tokens.astype(mindspore.float32).asnumpy()
        table[rows] = table[rows] * (1 - gate) + trained * gate
        return {self.embedding_table: Tensor(table).astype(self.embedding_table.dtype)}

    def plain_cell(self) -> nn.Embedding:
        """Return the embedding that this layer is on."""
        return as_running(self._plain[0], self)

    def settings(self) -> dict[str, Any]:
        """Return token_indices."""
        return {"token_indices": list(self.token_indices)}

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over nothing: the token numbers are compared."""
