"""What the methods of virtual tokens share: trained rows before the rows of the tokens that an embedding looks up."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.arguments import check_int
from mindpet_lite.delta.adapted import Method
from mindpet_lite.delta.hosts import HOSTS, Host
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import put
from mindpet_lite.delta.prefix_dense import prefix_mask, prepend_prefix
from mindpet_lite.formats.peft_method import PeftMethod
from mindpet_lite.names.parameter_names import is_embedding

# PEFT's key of the rows. It stands at the top of a file, and so the one layer of a file goes by this name too.
KEY = "prompt_embeddings"
# What only says what the base is like. PEFT fills in what a file does not say.
_OF_BASE = ("token_dim", "num_attention_heads", "num_layers")


def prompt_mask(attention_mask: Tensor, num_virtual_tokens: int, visible: float, hidden: float | None = None) -> Tensor:
    """Return an attention mask for a sequence that has virtual tokens before its own.

    PEFT does the same to the mask of padding. A net that makes its other masks from the length of the hidden states
    needs nothing else.

    Args:
        attention_mask: of padding, `(batch, key)`, where every virtual token is seen; or causal, `(..., query, key)`
            with as many queries as keys. Any type. Another mask with an axis of queries is made from the lengthened
            mask of padding, not lengthened itself.
        num_virtual_tokens: how many there are, n; positive.
        visible: what the mask holds where a query sees a key: 1 (or True) in masks that multiply or select, 0 in masks
            that are added to the scores.
        hidden: what it holds elsewhere, for a causal mask: a virtual token sees itself and those before it, no token.
            Default: None.

    Returns:
        Tensor `(batch, n + key)` or `(..., n + query, n + key)` of the type of `attention_mask`.

    Raises:
        ValueError: the axes are others; `hidden` is missing for a causal mask, or given for one of padding;
            `num_virtual_tokens` is not positive.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> mask = Tensor(np.array([[1, 1, 0]], np.int32))      # the third token is padding
        >>> mp.prompt_mask(mask, 2, visible=1).asnumpy().tolist()
        [[1, 1, 1, 1, 0]]
    """
    if (len(attention_mask.shape) == 2) != (hidden is None):
        raise ValueError(f"prompt_mask takes a mask of padding (batch, key) without hidden, or a causal one (batch, "
                         f"..., query, key) with hidden, but the shape is {attention_mask.shape} and hidden is "
                         f"{hidden}.")
    wide = prefix_mask(attention_mask, num_virtual_tokens, visible)
    if hidden is None:
        return wide
    length = wide.shape[-1]
    if attention_mask.shape[-2] != attention_mask.shape[-1]:
        raise ValueError(f"A causal mask has as many queries as keys, but the shape is {attention_mask.shape}: make it "
                         f"from the length of the hidden states.")
    shape = attention_mask.shape[:-2] + (num_virtual_tokens, length)
    sees = ops.tril(ops.ones((num_virtual_tokens, length), mindspore.float32)) > 0
    rows = ops.where(ops.broadcast_to(sees, shape), ops.full(shape, visible, dtype=mindspore.float32),
                     ops.full(shape, hidden, dtype=mindspore.float32))
    return ops.concat((ops.cast(rows, attention_mask.dtype), wide), -2)


class VirtualTokens(Method):
    """A table of tokens whose looked-up rows have trained rows before them.

    $$
    y = concat([P, E[ids]])
    $$

    P (num_virtual_tokens, size) stands before each sequence of a batch: ids `(batch, seq)` give
    `(batch, num_virtual_tokens + seq, size)`. It is cast to the type of the rows. A net that takes positions and masks
    from the length of its hidden states needs no change; one that takes them from the ids' fails on the shapes.
    """

    fixed = ("its rows lengthen every sequence, and a compiled graph cannot shorten one again: call a net without the "
             "adapter for the base's output.")
    unmergeable = "its rows stand before those that are looked up, which no table of a plain layer can hold."

    # The ids of the tokens whose rows P started as, where it did.
    start_ids: tuple[int, ...] = ()

    def prompt_rows(self) -> Tensor:
        """Return P (num_virtual_tokens, size)."""
        raise NotImplementedError

    def construct(self, x: Tensor) -> Tensor:
        """Return the virtual tokens and the rows of the ids."""
        return prepend_prefix(self.prompt_rows(), self.plain(x))

    def add_parameters(self, trained: Mapping[str, Tensor], steering: Mapping[str, float]) -> None:
        """Make Parameters of what trains: nothing steers."""
        super().add_parameters(trained, {})

    def setting_values(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the fields of the config, with the size of the rows."""
        return {**super().settings(), "token_dim": self.outputs(self)}

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Tell nothing of what the base is like, which changes nothing here."""
        return super().unlike({name: value for name, value in settings.items() if name not in _OF_BASE})

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over what a file says of the base."""
        said = {name: settings[name] for name in _OF_BASE if settings.get(name) is not None}
        self.config = dataclasses.replace(self.config, **said)

    # A start from the table's own rows, for the methods that have one.

    def first_rows(self, config: Any) -> np.ndarray:
        """Return the P that training starts from, by `prompt_tuning_init`."""
        count, size = config.num_virtual_tokens, self.outputs(self)
        ids = self.logical_shape(self)[0]
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            self.start_ids = tuple(map(int, np.random.randint(0, ids, count)))
        elif config.prompt_tuning_init == "TEXT":
            self.start_ids = tuple(np.resize(config.init_token_ids, count).tolist())
            if max(self.start_ids) >= ids:
                raise ValueError(f"init_token_ids has {max(self.start_ids)}, but the table has rows 0 to {ids - 1}.")
        return self._started() if self.start_ids else np.random.standard_normal((count, size))

    def _started(self) -> np.ndarray:
        return self.weight_numbers()[list(self.start_ids)]

    def base_parameter(self) -> Parameter | None:
        """Return the table, where P starts as rows of it."""
        return self.weight if self.start_ids else None

    def start_again(self) -> None:
        """Take the same tokens' rows of the table as it is now."""
        rows = getattr(self, self.delta_names[0])
        put(rows, Tensor(self._started().astype(np.float32)).astype(rows.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualTokensConfig(MethodConfig):
    """Settings that all methods of virtual tokens have; the names are PEFT's.

    Without `target_modules` the table of tokens is found: what the net's `get_input_embeddings()` returns, else its
    only embedding, else the only one with a name that libraries give such tables, as `embed_tokens`.

    Args:
        num_virtual_tokens: the rows before each sequence; positive. Default: 20.
        token_dim: their size, positive, which is that of the table's rows; None takes it from there. Default: None.
        num_transformer_submodules: 1; for PEFT's 2 (an encoder and a decoder with prompts of their own) there is no
            form here. Default: 1.
        num_attention_heads: of the base, positive, for PEFT, which reads it from the file. None leaves it to PEFT to
            find out. Default: None.
        num_layers: of the base, likewise. Default: None.

    Raises:
        TypeError: a number is none.
        ValueError: a number is not positive, or num_transformer_submodules not 1.
    """

    fits: ClassVar[tuple[type[Host], ...]] = tuple(host for host in HOSTS if host.takes_ids)

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_transformer_submodules: int = 1
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_virtual_tokens", *_OF_BASE):
            if getattr(self, name) is not None or name == "num_virtual_tokens":
                check_int(name, getattr(self, name))
                object.__setattr__(self, name, int(getattr(self, name)))
        if self.num_transformer_submodules != 1:
            raise ValueError(f"num_transformer_submodules must be 1, but got {self.num_transformer_submodules!r:.60}: "
                             f"prompts of its own for a decoder are not supported; adapt its embedding with a config "
                             f"of its own.")

    @classmethod
    def default_paths(cls, cells: Mapping[str, nn.Cell]) -> list[str]:
        """Return the path of the table of tokens.

        Raises:
            ValueError: the net has no such table, or several, of which nothing tells the one.
        """
        tables = {path: cell for path, cell in cells.items() if cls.refusal(cell) is None}
        for cell in cells.values():
            given = cell.get_input_embeddings() if hasattr(cell, "get_input_embeddings") else None
            found = [path for path, table in tables.items() if table is given]
            if found:
                return found[:1]
        named = [path for path in tables if is_embedding(path)]
        found = list(tables) if len(tables) == 1 else named
        if len(found) != 1:
            raise ValueError(f"the table of tokens is not told: the net has "
                             f"{', '.join(found or tables) or 'no embedding'}. Name it in target_modules.")
        return found

    def check_size(self, size: int) -> None:
        """Raise ValueError where `token_dim` is not the size of the table's rows."""
        if self.token_dim not in (None, size):
            raise ValueError(f"token_dim is {self.token_dim}, but the rows of the table have {size} numbers.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartedTokensConfig(VirtualTokensConfig):
    """Settings of the methods whose rows can start as those of tokens.

    Args:
        prompt_tuning_init: "RANDOM" (a normal distribution), "SAMPLE_VOCAB" (rows of random tokens) or "TEXT" (rows of
            the tokens in `init_token_ids`). Default: "RANDOM".
        init_token_ids: ids of a text's tokens, each 0 or more, repeated or cut to num_virtual_tokens; for "TEXT" alone.
            Default: None.
    """

    inits: ClassVar[tuple[str, ...]] = ("RANDOM", "SAMPLE_VOCAB", "TEXT")

    prompt_tuning_init: str = "RANDOM"
    init_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in self.inits:
            raise ValueError(f"prompt_tuning_init must be one of {', '.join(self.inits)}, but got "
                             f"{self.prompt_tuning_init!r:.100}.")
        if self.init_token_ids is not None:
            ids = tuple(self.init_token_ids)
            for item in ids:
                check_int("an entry of init_token_ids", item, 0)
            object.__setattr__(self, "init_token_ids", ids)
        if (self.prompt_tuning_init == "TEXT") != bool(self.init_token_ids):
            raise ValueError("prompt_tuning_init='TEXT' and init_token_ids go together: tokenize the text with the "
                             "model's tokenizer and give the ids as init_token_ids; no tokenizer is run here.")


def peft_method(kind: type[PeftMethod], peft_type: str, keys: Mapping[str, str], fields: Mapping[str, Any],
                written: Mapping[str, Any], remark: str = "") -> PeftMethod:
    """Return how PEFT's files hold a method of virtual tokens: at the top, beside what all of them say."""
    return kind(peft_type, keys, {"num_virtual_tokens": None, **dict.fromkeys(_OF_BASE), **fields},
                neutral={"num_transformer_submodules": (1, None)},
                written={"num_transformer_submodules": 1, **written}, home=KEY, remark=remark)
