"""Prefix-Tuning: Optimizing Continuous Prompts for Generation.

Li & Liang, 2021, https://arxiv.org/abs/2101.00190.

    keys = concat([P_K, X W_Kᵀ]),   values = concat([P_V, X W_Vᵀ])                                       (section 4.2)
    P = MLP(P')                                                                                          (section 4.3)

The net is frozen; the embedding P' and the MLP train. After training they can be folded into P.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet_lite.arguments import check_bool, check_int, check_probability, warn_user
from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.base import check_float_type
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.dense import AdaptedDense, OutputConfig
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.hosts import DenseHost, Host
from mindpet_lite.delta.parts import initial, prefix_of
from mindpet_lite.delta.prefix_dense import (
    PrefixDelta,
    Prefixed,
    attention_refusal,
    check_targets,
    folded_parameter,
    place_names,
)
from mindpet_lite.delta.prefix_file import KEY_ROWS, PREFIX_FILE, VALUE_ROWS
from mindpet_lite.delta.values import setting_parameter
from mindpet_lite.formats.peft_method import PeftMethod

WTE, TRANS = "mindpet_delta_prefixtuning_wte", "mindpet_delta_prefixtuning_control_trans"
TABLE = f"{WTE}.embedding_table"


@dataclasses.dataclass(frozen=True)
class PrefixSettings:
    """The settings of Prefix-Tuning, checked when made; see `PrefixDense`."""

    prefix_token_num: int = 128
    embed_dim: int = 512
    mid_dim: int = 512
    dropout_rate: float = 0.1
    prefix_projection: bool = True
    param_init_type: mindspore.dtype = mindspore.float32

    def __post_init__(self) -> None:
        for name in ("prefix_token_num", "embed_dim", "mid_dim"):
            check_int(name, getattr(self, name))
            # Python's own int: what numpy counts as one, JSON does not.
            object.__setattr__(self, name, int(getattr(self, name)))
        check_probability("dropout_rate", self.dropout_rate)
        object.__setattr__(self, "dropout_rate", float(self.dropout_rate))
        check_bool("prefix_projection", self.prefix_projection)
        check_float_type("param_init_type", self.param_init_type)


class Prefixes(PrefixDelta):
    """The half that PrefixLayer and Prefix share: settings, embedding, MLP and dropout."""

    method: ClassVar[str] = "prefixtuning"

    prefix_token_num: int
    embed_dim: int
    mid_dim: int
    dropout_rate: float

    def _add_prefixes(self, config: PrefixSettings, width: int, folded_names: tuple[str, ...]) -> None:
        """Make the Parameters of P (prefix_token_num, width), or its parts under `folded_names` without an MLP."""
        self.prefix_token_num, self.embed_dim, self.mid_dim = config.prefix_token_num, config.embed_dim, config.mid_dim
        self.dropout_rate, self.prefix_projection = config.dropout_rate, config.prefix_projection
        self.dropout = delta_dropout(self.dropout_rate)
        self.has_dropout = self.dropout_rate > 0
        rows, dtype = config.prefix_token_num, config.param_init_type
        if config.prefix_projection:
            self.delta_names = (WTE, TRANS)
            self.mindpet_delta_prefixtuning_wte = nn.Embedding(
                rows, config.embed_dim, embedding_table=initial(WTE, "normal", (rows, config.embed_dim), dtype))
            self.mindpet_delta_prefixtuning_control_trans = nn.SequentialCell(
                nn.Dense(config.embed_dim, config.mid_dim, dtype=dtype), nn.Tanh(),
                nn.Dense(config.mid_dim, width, dtype=dtype))
            return
        self.delta_names = folded_names
        for name in folded_names:
            value = initial(name, "normal", (rows, width // len(folded_names)), dtype)
            setattr(self, name, Parameter(value, name=name))

    def _replace_projection(self, rows: dict[str, Tensor]) -> None:
        """Put Parameters of `rows` in the place of embedding and MLP."""
        table = self.mindpet_delta_prefixtuning_wte.embedding_table
        for name, value in rows.items():
            setattr(self, name, folded_parameter(name, value, table, TABLE))
        del self.mindpet_delta_prefixtuning_wte
        del self.mindpet_delta_prefixtuning_control_trans
        self.delta_names = tuple(rows)

    def settings(self) -> dict[str, Any]:
        """Return prefix_token_num, embed_dim, mid_dim, dropout_rate and prefix_projection."""
        return {"prefix_token_num": self.prefix_token_num, "embed_dim": self.embed_dim, "mid_dim": self.mid_dim,
                "dropout_rate": self.dropout_rate, "prefix_projection": self.prefix_projection}


class _Evaluated(property):
    """A property whose value belongs to one forward: kept from a cell's `__init__`, it would never train."""

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        if layer is not None and layer.prefix_projection:
            place = _cell_being_built(sys._getframe(1))
            if place is not None:
                layer.fold()
                name = self.fget.__name__ if self.fget else "the prefix"
                warn_user(f"{name} is read in {place}.__init__(), and a value kept from there cannot be evaluated "
                          f"anew by each forward. So embedding and MLP are dropped, and the prefix itself is the "
                          f"Parameter that trains. To train it through the MLP, read `self.prefix.{name}` in "
                          f"construct(); if this is meant, say prefix_projection=False.")
        return super().__get__(layer, owner)


def _cell_being_built(frame: FrameType | None) -> str | None:
    """Return the class of the cell whose `__init__` runs in `frame` or around it, or None in a forward."""
    while frame is not None and frame.f_code.co_name != "construct":
        if frame.f_code.co_name == "__init__" and frame.f_code.co_argcount:
            built = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(built, nn.Cell):
                return type(built).__name__
        frame = frame.f_back
    return None


class PrefixLayer(Prefixes, nn.Cell):
    r"""The keys and values that an attention reads before those of its input.

    $$
    [P_K, P_V] = drop(tanh(P' W_1^T + b_1) W_2^T + b_2)
    $$

    Read the prefixes in `construct`, where every forward evaluates them anew, and put them before keys and values:

    ```python
    prefix_key, prefix_value = self.prefix()          # or self.prefix.past_key_reparam, .past_value_reparam
    key = prepend_prefix(prefix_key, key)             # (batch, seq, hidden_dim), not split into heads yet
    value = prepend_prefix(prefix_value, value)
    attention_mask = prefix_mask(attention_mask, self.prefix.prefix_token_num, visible=1)
    ```

    A prefix that MindPet's way keeps in `__init__` (``self.past_key = self.prefix.past_key_reparam``) cannot be
    evaluated by each forward. There, the layer warns, drops embedding and MLP, and hands out the Parameter that the
    prefix now is, so that it trains; with ``prefix_projection=False`` it is one from the start. Read elsewhere, outside
    of a forward, the properties give the value of that moment.

    The layer changes the output of its attention from the start: the prefixes take part in the softmax.

    Parameters: `mindpet_delta_prefixtuning_wte.embedding_table` (prefix_token_num, embed_dim),
    `mindpet_delta_prefixtuning_control_trans` (a SequentialCell of Dense, Tanh and Dense whose last has
    2 · hidden_dim outputs: keys, then values), and `input_tokens` (prefix_token_num,), never trained. Folded:
    `mindpet_delta_prefixtuning_key` and `mindpet_delta_prefixtuning_value` (prefix_token_num, hidden_dim).

    Source: Li & Liang, https://arxiv.org/abs/2101.00190, section 4.3.

    Args:
        prefix_token_num (int): rows of the prefix; a multiple of `batch_size`.
        batch_size (int): sequences in a batch; positive. Kept for attentions that share the rows out among the batch,
            prefix_token_num / batch_size each, as MindPet's documentation does for its mask.
        num_heads (int): heads of the attention; positive. Kept for the caller's mask, as `batch_size`.
        hidden_dim (int): width of keys and values, all heads together; positive.
        embed_dim (int): width of the embedding; positive.
        mid_dim (int): width of the MLP; positive. Default: 512.
        dropout_rate (int | float): probability in [0, 1) of dropping an element of a prefix in training. At 0 there
            is no dropout operator. Default: 0.1.
        prefix_projection (bool): an MLP gives the prefixes. False: they are Parameters, as after `fold`, and
            embed_dim and mid_dim mean nothing. Default: True.
        param_init_type (mindspore.dtype): type of the Parameters and of what they give: float16, bfloat16 or float32.
            Default: float32.

    Outputs:
        Tuple of the keys' and the values' prefix, `(prefix_token_num, hidden_dim)` each.

    Raises:
        TypeError: an int is a bool or no int, dropout_rate no number, prefix_projection no bool, or param_init_type
            no float type.
        ValueError: an int is not positive; prefix_token_num is no multiple of batch_size; dropout_rate is outside
            [0, 1).

    Examples:
        >>> import mindpet_lite as mp
        >>> layer = mp.PrefixLayer(4, batch_size=2, num_heads=2, hidden_dim=8, embed_dim=4, mid_dim=4)
        >>> keys, values = layer()
        >>> keys.shape, values.shape
        ((4, 8), (4, 8))
    """

    setting_names = ("input_tokens",)

    def __init__(self, prefix_token_num: int, batch_size: int, num_heads: int, hidden_dim: int, embed_dim: int,
                 mid_dim: int = 512, dropout_rate: float = 0.1, prefix_projection: bool = True,
                 param_init_type: mindspore.dtype = mindspore.float32) -> None:
        super().__init__()
        settings = PrefixSettings(prefix_token_num, embed_dim, mid_dim, dropout_rate, prefix_projection,
                                  param_init_type)
        for name, value in (("batch_size", batch_size), ("num_heads", num_heads), ("hidden_dim", hidden_dim)):
            check_int(name, value)
        if prefix_token_num % batch_size:
            raise ValueError(f"prefix_token_num must be a multiple of batch_size, but got {prefix_token_num} and "
                             f"{batch_size}.")
        self.batch_size, self.num_heads, self.hidden_dim = batch_size, num_heads, hidden_dim
        self.input_tokens = setting_parameter(Tensor(np.arange(settings.prefix_token_num), mindspore.int32),
                                              "mindpet_delta_prefixtuning_input_tokens")
        self._add_prefixes(settings, 2 * hidden_dim, (KEY_ROWS, VALUE_ROWS))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # MindSpore compiles a property into the graph only where the cell's own class has it, and makes a constant of
        # an inherited one.
        for name in ("past_key_reparam", "past_value_reparam"):
            if name not in vars(cls):
                setattr(cls, name, next(vars(parent)[name] for parent in cls.__mro__ if name in vars(parent)))

    @_Evaluated
    def past_key_reparam(self) -> Tensor:
        """The keys' prefix (prefix_token_num, hidden_dim), evaluated by every forward whose `construct` reads it."""
        return self.construct()[0]

    @_Evaluated
    def past_value_reparam(self) -> Tensor:
        """The values' prefix, likewise."""
        return self.construct()[1]

    def construct(self) -> tuple[Tensor, Tensor]:
        """Return the prefixes of the keys and of the values."""
        key, value = self._evaluate()
        if self.has_dropout:
            key, value = self.dropout(key), self.dropout(value)
        return key, value

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        if self.prefix_projection:
            rows = self.mindpet_delta_prefixtuning_wte(self.input_tokens)
            rows = self.mindpet_delta_prefixtuning_control_trans(rows)
            return rows[:, :self.hidden_dim], rows[:, self.hidden_dim:]
        return self.mindpet_delta_prefixtuning_key, self.mindpet_delta_prefixtuning_value

    def setting_values(self) -> dict[str, Any]:
        """Return the row numbers."""
        return {"input_tokens": np.arange(self.prefix_token_num)}

    def _drop_projection(self) -> None:
        self._replace_projection(dict(zip((KEY_ROWS, VALUE_ROWS), self._evaluate())))


_ROWS = "mindpet_delta_prefixtuning_prefix"


class Prefix(Prefixes, Prefixed):
    """A key or value layer with a prefix before the sequence from the start of training on; see `PrefixDense`."""

    def _add_delta(self, config: PrefixSettings) -> None:
        self._add_prefixes(config, self.outputs(self), (_ROWS,))
        place_names(self, prefix_of(self.weight.name))

    def prefix_rows(self) -> Tensor:
        """Return P (prefix_token_num, outputs), with dropout in training."""
        rows = self._evaluate()
        if self.has_dropout:
            rows = self.dropout(rows)
        return rows

    def _evaluate(self) -> Tensor:
        if self.prefix_projection:
            table = self.mindpet_delta_prefixtuning_wte.embedding_table
            return self.mindpet_delta_prefixtuning_control_trans(table)
        return self.mindpet_delta_prefixtuning_prefix

    def _drop_projection(self) -> None:
        self._replace_projection({_ROWS: self._evaluate()})


class PrefixDense(Prefix, AdaptedDense):
    r"""The key or value layer of an attention, with a prefix before the rows of the sequence.

    $$
    y = concat([P, act(x W^T + b)]), \quad P = drop(tanh(P' W_1^T + b_1) W_2^T + b_2)
    $$

    P stands before each sequence of a batch. The layer changes the output from the start, in its values and in its
    length: the attention must take more keys than queries. Those that read the lengths of query and key from their
    tensors do; a fixed mask needs `prefix_mask`. Both the key and the value layer need a prefix.

    `weight` and `bias` are where nn.Dense has them. The layer adds `mindpet_delta_prefixtuning_wte.embedding_table`
    (prefix_token_num, embed_dim) and `mindpet_delta_prefixtuning_control_trans` (a SequentialCell of Dense, Tanh and
    Dense); folded, `mindpet_delta_prefixtuning_prefix` (prefix_token_num, out_channels).

    Dtype rule: parameters keep their type. `to_float(t)` means what it means in MindSpore: the input counts as one of
    type t, and the output has type t. Without it the output has the type of the input. The Dense computes in t, else
    in the type of `weight`, the prefix in the type of its own Parameters.

    Source: Li & Liang, https://arxiv.org/abs/2101.00190, sections 4.2 and 4.3.

    Args:
        in_channels (int): size of the last axis of the input; positive.
        out_channels (int): size of the last axis of the output; positive.
        prefix_token_num (int): rows of the prefix; positive. Default: 128.
        embed_dim (int): width of the embedding P'; positive. Default: 512.
        mid_dim (int): width of the MLP; positive. Default: 512.
        dropout_rate (int | float): probability in [0, 1) of dropping an element of P in training. At 0 there is no
            dropout operator. Default: 0.1.
        prefix_projection (bool): an MLP gives P. False: P is a Parameter, as after `fold()`, and embed_dim and mid_dim
            mean nothing. Default: True.
        param_init_type (mindspore.dtype): type of what the layer adds: float16, bfloat16 or float32. Default: float32.
        **dense_kwargs: weight_init, bias_init, has_bias, activation and dtype of nn.Dense.

    Inputs:
        - **x** (Tensor): `(*, seq, in_channels)`.

    Outputs:
        Tensor `(*, prefix_token_num + seq, out_channels)`, of the type that the dtype rule says.

    Raises:
        TypeError: an int is a bool or no int, dropout_rate no number, prefix_projection no bool, or a type is not
            float16, bfloat16 or float32.
        ValueError: an int is not positive; dropout_rate is outside [0, 1); an input has no axis for the sequence.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.PrefixDense(4, 8, prefix_token_num=3, embed_dim=4, mid_dim=4)
        >>> layer(Tensor(np.ones((2, 5, 4), np.float32))).shape       # the prefix, and five rows of the sequence
        (2, 8, 8)
    """

    def __init__(self, in_channels: int, out_channels: int, prefix_token_num: int = 128, embed_dim: int = 512,
                 mid_dim: int = 512, dropout_rate: float = 0.1, prefix_projection: bool = True,
                 param_init_type: mindspore.dtype = mindspore.float32, **dense_kwargs: Any) -> None:
        settings = PrefixSettings(prefix_token_num, embed_dim, mid_dim, dropout_rate, prefix_projection,
                                  param_init_type)
        super().__init__(in_channels, out_channels, **dense_kwargs)
        self._add_delta(settings)


@dataclasses.dataclass(frozen=True)
class PrefixTuningConfig(OutputConfig, PrefixSettings):
    """Settings of Prefix-Tuning, checked when made; the fields are those of `PrefixDense` and `DeltaConfig`.

    `target_modules` names the key and the value layers of attentions, such as ``["to_k", "to_v"]``.

    Args:
        prefix_token_num: rows of the prefix; positive. Default: 128.
        embed_dim: width of the embedding; positive. Without prefix_projection it means nothing. Default: 512.
        mid_dim: width of the MLP; positive. Without prefix_projection it means nothing. Default: 512.
        dropout_rate: probability in [0, 1) of dropping an element of the prefix in training. Default: 0.1.
        prefix_projection: True: an MLP gives the prefix. False: it is a Parameter. Default: True.
        param_init_type: type of what trains: float16, bfloat16 or float32. Default: float32.

    Raises:
        TypeError, ValueError: as `PrefixDense`.

    Examples:
        >>> from mindspore import nn
        >>> import mindpet_lite as mp
        >>> class Attention(nn.Cell):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_q, self.to_k, self.to_v = nn.Dense(4, 4), nn.Dense(4, 4), nn.Dense(4, 4)
        >>> config = mp.PrefixTuningConfig(prefix_token_num=3, embed_dim=4, mid_dim=4, target_modules=["to_k", "to_v"])
        >>> net = mp.get_pet_model(Attention(), config)
        >>> type(net.to_q).__name__, type(net.to_k).__name__
        ('Dense', 'PrefixDense')
    """

    pet_type: ClassVar[str] = "prefixtuning"
    layer: ClassVar[type[Adapted]] = Prefix
    by_hand: ClassVar[Mapping[type[Host] | None, type[Adapted]]] = {DenseHost: PrefixDense}
    title: ClassVar[str] = "Prefix-Tuning"
    other_names: ClassVar[tuple[str, ...]] = ("prefix",)
    peft: ClassVar[PeftMethod | None] = PREFIX_FILE

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        PrefixSettings.__post_init__(self)
        check_targets(self.target_modules)

    @classmethod
    def refusal_in(cls, path: str, cells: Mapping[str, nn.Cell]) -> str | None:
        """Return why the attention around the layer cannot take rows before its keys, or None."""
        return attention_refusal(path, cells)

    def shapes(self, cell: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the embedding and the MLP, or of the rows alone."""
        rows, width = self.prefix_token_num, self.class_for(cell).outputs(cell)
        if not self.prefix_projection:
            return {_ROWS: (rows, width)}
        return {TABLE: (rows, self.embed_dim),
                f"{TRANS}.0.weight": (self.mid_dim, self.embed_dim), f"{TRANS}.0.bias": (self.mid_dim,),
                f"{TRANS}.2.weight": (width, self.mid_dim), f"{TRANS}.2.bias": (width,)}
