"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning.

Lester et al., 2021, https://arxiv.org/abs/2104.08691, section 2:

    [P; E[x]]        trained rows P before the rows of the tokens x

P starts at random, as rows of the vocabulary, or as those of a text (section 2.1).
"""
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from mindspore import Tensor, nn

from mindpet_lite.delta.adapted import Method
from mindpet_lite.delta.virtual_tokens import KEY, StartedTokensConfig, VirtualTokens, peft_method
from mindpet_lite.formats.peft_method import PeftMethod

_ROWS = "mindpet_delta_prompt_tuning_prompt"
# What PEFT's config says of the start besides; a file holds the rows, whatever they started as.
_WRITTEN = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None}


class PromptTuning(VirtualTokens):
    """A table of tokens with trained rows before each sequence.

    `mindpet_delta_prompt_tuning_prompt` is P (num_virtual_tokens, size). See `VirtualTokens` for shapes and types.
    """

    method = "prompt_tuning"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of P."""
        config.check_size(cls.outputs(layer))
        return {_ROWS: (config.num_virtual_tokens, cls.outputs(layer))}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return P by `prompt_tuning_init`."""
        return {_ROWS: self.first_rows(config)}

    def prompt_rows(self) -> Tensor:
        """Return P."""
        return self.mindpet_delta_prompt_tuning_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(StartedTokensConfig):
    """Settings of prompt tuning; the names are PEFT's, and the fields those of `StartedTokensConfig`.

    Examples:
        >>> import mindspore as ms
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Embedding(10, 4), nn.Dense(4, 2))
        >>> net = mp.get_pet_model(net, mp.PromptTuningConfig(num_virtual_tokens=3))
        >>> net(ms.Tensor([[1, 2]])).shape
        (1, 5, 2)
    """

    pet_type: ClassVar[str] = "prompt_tuning"
    layer: ClassVar[type[Method]] = PromptTuning
    title: ClassVar[str] = "Prompt tuning"
    peft: ClassVar[PeftMethod] = peft_method(PeftMethod, "PROMPT_TUNING", {_ROWS: KEY}, {}, _WRITTEN)
