"""P-tuning: GPT Understands, Too.

Liu et al., 2021, https://arxiv.org/abs/2103.10385, section 3: an encoder gives the trained rows P from an embedding H.

    [P; E[x]],    P = MLP(H)    or    P = MLP([LSTM→(H); LSTM←(H)])

The LSTM is that of Hochreiter and Schmidhuber (1997) with a forget gate, in both directions:

    [i, f, g, o] = W x_t + b + U h_{t-1} + d,    c_t = σ(f) c_{t-1} + σ(i) tanh(g),    h_t = σ(o) tanh(c_t)

After training the encoder is dropped and P alone is kept; so do PEFT's files.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet_lite.arguments import check_bool, check_int, check_probability, warn_user
from mindpet_lite.delta.adapted import Method
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.p_tuning.encoder import LSTM, MLP, TABLE, BothWays, encoded, lstm_shapes
from mindpet_lite.delta.parts import prefix_of
from mindpet_lite.delta.prefix_dense import folded_parameter, place_names
from mindpet_lite.delta.virtual_tokens import KEY, VirtualTokens, VirtualTokensConfig, peft_method
from mindpet_lite.formats.peft_method import PeftMethod

_ROWS = "mindpet_delta_p_tuning_prompt"
_ENCODERS = ("MLP", "LSTM")
# The layers of PEFT's MLP; a file may say another number, which PEFT passes over.
_MLP_LAYERS = 2


def _mlp_sizes(width: int, config: Any) -> tuple[int, ...]:
    size = config.encoder_hidden_size or width
    return (width, size, size, width) if config.encoder_reparameterization_type == "MLP" else (2 * size, 2 * size,
                                                                                               width)


def _lstm_inputs(width: int, config: Any) -> list[int]:
    """Return the number of inputs of each layer of the LSTM."""
    if config.encoder_reparameterization_type == "MLP":
        return []
    return [width, *[2 * (config.encoder_hidden_size or width)] * (config.encoder_num_layers - 1)]


class PTuning(VirtualTokens):
    """A table of tokens with rows before each sequence that an encoder gives.

    With the encoder: `mindpet_delta_p_tuning_embedding` H (num_virtual_tokens, size), `mindpet_delta_p_tuning_lstm` (a
    CellList of `BothWays`) and `mindpet_delta_p_tuning_mlp` (a SequentialCell of Dense and ReLU). Without it, after
    `fold()` or from a file of PEFT's, `mindpet_delta_p_tuning_prompt` P (num_virtual_tokens, size), which trains by
    itself. See `VirtualTokens` for shapes and types; the encoder computes in the type of its Parameters.
    """

    method = "p_tuning"
    foldable = True

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the encoder's Parameters, or of P alone."""
        width = cls.outputs(layer)
        config.check_size(width)
        rows = (config.num_virtual_tokens, width)
        if config.inference_mode:
            return {_ROWS: rows}
        found: dict[str, tuple[int, ...]] = {TABLE: rows}
        for number, inputs in enumerate(_lstm_inputs(width, config)):
            found.update({f"{LSTM}.{number}.{name}": shape for name, shape in
                          lstm_shapes(inputs, config.encoder_hidden_size or width).items()})
        sizes = _mlp_sizes(width, config)
        for number, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            found.update({f"{MLP}.{2 * number}.weight": (outputs, inputs), f"{MLP}.{2 * number}.bias": (outputs,)})
        return found

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return H from a normal distribution, and the rest as torch starts such layers: evenly within 1 / √inputs."""
        values, limit = {}, 1.0
        for name, shape in self.shapes(self, config).items():
            if name in (_ROWS, TABLE):
                values[name] = np.random.standard_normal(shape)
                continue
            if name.endswith(".weight"):
                limit = shape[-1] ** -0.5
            elif name.startswith(LSTM):
                limit = (config.encoder_hidden_size or self.outputs(self)) ** -0.5
            values[name] = np.random.uniform(-limit, limit, shape)
        return values

    def add_parameters(self, trained: Mapping[str, Tensor], steering: Mapping[str, float]) -> None:
        """Make the encoder's cells, or P alone, of what trains."""
        self.encodes = not self.config.inference_mode
        if not self.encodes:
            super().add_parameters(trained, {})
            return
        width, dtype = self.outputs(self), self.config.param_init_type
        setattr(self, TABLE, Parameter(trained[TABLE], name=TABLE))
        self.has_lstm = bool(_lstm_inputs(width, self.config))
        if self.has_lstm:
            setattr(self, LSTM, nn.CellList([
                BothWays(self.config.num_virtual_tokens, inputs, self.config.encoder_hidden_size or width, dtype)
                for inputs in _lstm_inputs(width, self.config)]))
        sizes = _mlp_sizes(width, self.config)
        parts: list[nn.Cell] = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            parts += [nn.Dense(inputs, outputs, dtype=dtype), nn.ReLU()]
        setattr(self, MLP, nn.SequentialCell(*parts[:-1]))
        self.delta_names = (TABLE, *([LSTM] if self.has_lstm else []), MLP)
        for name, item in self.delta_parameters().items():
            item.set_data(trained[name])
        place_names(self, prefix_of(self.weight.name))
        self.has_dropout = self.has_lstm and self.config.encoder_dropout > 0
        self.dropout = delta_dropout(self.config.encoder_dropout)

    def prompt_rows(self) -> Tensor:
        """Return P, which the encoder gives anew in every forward."""
        if not self.encodes:
            return self.mindpet_delta_p_tuning_prompt
        rows = self.mindpet_delta_p_tuning_embedding
        if self.has_lstm:
            first = True
            for layer in self.mindpet_delta_p_tuning_lstm:
                # As torch: between the layers.
                if self.has_dropout and not first:
                    rows = self.dropout(rows)
                rows = layer(rows)
                first = False
        return self.mindpet_delta_p_tuning_mlp(rows)

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Say where only one of the two has an encoder; its sizes show in the shapes."""
        if settings.get("inference_mode", not self.encodes) != self.encodes:
            return []
        return ["the file holds the rows alone, the net has an encoder that gives them: call fold_prefixes(net) first, "
                "or load the file into a plain net." if self.encodes else
                "the file holds an encoder, the net the rows alone: load the file into a plain net."]

    def fold(self) -> None:
        """Keep only the rows: run the encoder once, without dropout, and drop it."""
        if not self.encodes:
            return
        was_training = self.training
        self.set_train(False)
        rows = self.prompt_rows()
        self.set_train(was_training)
        setattr(self, _ROWS, folded_parameter(_ROWS, rows, getattr(self, TABLE), TABLE))
        for name in self.delta_names:
            delattr(self, name)
        self.delta_names, self.encodes = (_ROWS,), False
        self.config = dataclasses.replace(self.config, inference_mode=True)
        # A compiled graph would run the encoder on.
        mindspore.ms_memory_recycle()


class _File(PeftMethod):
    """PEFT's files hold the rows that the encoder gave, never the encoder."""

    def layer_settings(self, path: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a layer without an encoder."""
        return {**super().layer_settings(path, config), "inference_mode": True}

    def config_fields(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return PEFT's fields, which say that there is no encoder."""
        return {**super().config_fields(settings), "inference_mode": True}

    def in_file(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return the rows that the encoder gives."""
        if _ROWS in tensors:
            return tensors
        warn_user("PEFT's files hold the rows that P-tuning's encoder gives, not the encoder: what is loaded from one "
                  "computes the same, and trains on as rows without an encoder. To train on with it, save with "
                  "format='mindpet' too.")
        wide = {name: value.astype(np.float64) for name, value in tensors.items()}
        return {_ROWS: encoded(wide).astype(tensors[TABLE].dtype)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(VirtualTokensConfig):
    """Settings of P-tuning; the names are PEFT's. See `VirtualTokensConfig` for the others.

    Args:
        encoder_reparameterization_type: "MLP" (three Dense layers) or "LSTM" (in both directions, then two Dense).
            Default: "MLP".
        encoder_hidden_size: the width within the encoder; positive. None: that of the rows. Default: None.
        encoder_num_layers: of the LSTM; positive. The MLP has its three. Default: 2.
        encoder_dropout: probability in [0, 1) of dropping a number between the layers of the LSTM in training. The MLP
            has no dropout. Default: 0.0.
        inference_mode: no encoder: the rows themselves are what is kept, and what would train. So are those of a file.
            Default: False.

    Examples:
        >>> import mindspore as ms
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Embedding(10, 4), nn.Dense(4, 2))
        >>> net = mp.get_pet_model(net, mp.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8))
        >>> net(ms.Tensor([[1, 2]])).shape
        (1, 5, 2)
    """

    pet_type: ClassVar[str] = "p_tuning"
    layer: ClassVar[type[Method]] = PTuning
    title: ClassVar[str] = "P-tuning"
    peft: ClassVar[PeftMethod] = peft_method(
        _File, "P_TUNING", {_ROWS: KEY},
        {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": None, "encoder_num_layers": 2,
         "encoder_dropout": 0.0, "inference_mode": False}, {},
        "PEFT's files of P-tuning hold the rows that the encoder gave, not the encoder: what trains on here is the "
        "rows themselves, as in prompt tuning.")

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    inference_mode: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("inference_mode", self.inference_mode)
        kind = self.encoder_reparameterization_type
        if kind not in _ENCODERS:
            raise ValueError(f"encoder_reparameterization_type must be one of {', '.join(_ENCODERS)}, but got "
                             f"{kind!r:.100}.")
        if self.encoder_hidden_size is not None:
            check_int("encoder_hidden_size", self.encoder_hidden_size)
        check_int("encoder_num_layers", self.encoder_num_layers)
        check_probability("encoder_dropout", self.encoder_dropout)
        if kind == "MLP" and not self.inference_mode and (self.encoder_num_layers != _MLP_LAYERS
                                                          or self.encoder_dropout):
            raise ValueError("encoder_num_layers and encoder_dropout are of the LSTM: the MLP has three layers and no "
                             "dropout. Leave them out, or choose encoder_reparameterization_type='LSTM'.")
