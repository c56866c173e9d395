"""Trainable tokens: chosen rows of an embedding train, such as those of new words.

Source: Hugging Face PEFT, https://huggingface.co/docs/peft/package_reference/trainable_tokens (there is no paper).

    y_i = D_k where i is the k-th of the token numbers, else T_i
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

from mindspore import nn

from mindpet_lite.arguments import check_bool
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.hosts import host_refusal
from mindpet_lite.delta.hosts.embedding import EmbeddingHost, MintEmbeddingHost
from mindpet_lite.delta.tokens import RowsOf, TokenTable, are_tokens, rows_shape, table_for
from mindpet_lite.formats.peft_method import PeftMethod

_ROWS = RowsOf("trainable_tokens", "mindpet_delta_trainable_tokens_rows", "token_indices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(DeltaConfig):
    """Settings of trainable tokens; the names are PEFT's.

    Other layers with the same table as their weight (tied weights) compute with the trained rows too. What the adapter
    holds is as large as the rows. Beside LoRA, see `trainable_token_indices` of `mindpet_lite.LoraConfig`.

    Args:
        target_modules: the embeddings, as `DeltaConfig` has it; ``["embed_tokens"]`` without it. Default: None.
        token_indices: the numbers of the rows that train, each from 0 to below the table's rows, none twice. There must
            be one. Default: ().
        init_weights: True starts with the table's rows, and so at the base; False at random. Default: True.

    Raises:
        TypeError: `token_indices` is no list of token numbers, or empty; `init_weights` is no bool.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Embedding(100, 8), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.TrainableTokensConfig(target_modules=["0"], token_indices=[7, 98]))
        >>> [item.shape for item in net.trainable_params()]
        [(2, 8)]
    """

    pet_type: ClassVar[str] = "trainable_tokens"
    peft: ClassVar[PeftMethod] = PeftMethod("TRAINABLE_TOKENS", {_ROWS.parameter: "trainable_tokens_delta"},
                                            {"token_indices": []}, written={"init_weights": True})

    token_indices: tuple[int, ...] = ()
    init_weights: bool = True

    def __post_init__(self) -> None:
        if self.target_modules is None:
            object.__setattr__(self, "target_modules", ["embed_tokens"])
        super().__post_init__()
        if not are_tokens(self.token_indices):
            raise TypeError(f"token_indices must be a list of token numbers that is not empty, but got "
                            f"{self.token_indices!r:.100}.")
        object.__setattr__(self, "token_indices", tuple(self.token_indices))
        check_bool("init_weights", self.init_weights)

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why no tokens of `cell` can be trained, or None if they can."""
        return host_refusal(cell, "the method of trainable tokens", (EmbeddingHost, MintEmbeddingHost))

    def adapt(self, cell: nn.Cell) -> TokenTable:
        """Return the embedding with rows that train, on the Parameter object of `cell`."""
        return table_for(cell).on_rows(cell, self.token_indices, _ROWS, self.init_weights)

    def shapes(self, cell: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Return the shape of the rows."""
        return {_ROWS.parameter: rows_shape(cell, self.token_indices)}
