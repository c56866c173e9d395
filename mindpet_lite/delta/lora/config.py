"""The config of LoRA: which layer class adapts which kind of layer."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from mindspore import nn

from mindpet_lite.arguments import check_alpha, check_bool, check_int, did_you_mean
from mindpet_lite.delta.adapted import Adapted, adapted_class
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig, end_expression, names_of
from mindpet_lite.delta.hosts import HOSTS, SPLIT_HOSTS, Host, host_of
from mindpet_lite.delta.hosts.rows import TurnedHost
from mindpet_lite.delta.lora.bank import LoRABank
from mindpet_lite.delta.lora.conv import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAMintConv1d,
    LoRAMintConv2d,
    LoRAMintConv3d,
)
from mindpet_lite.delta.lora.dense import LoRADense
from mindpet_lite.delta.lora.embedding import LoRAEmbedding, LoRAMintEmbedding
from mindpet_lite.delta.lora.linear import LoRALinear
from mindpet_lite.delta.lora.low_rank import LowRank
from mindpet_lite.delta.lora.parameter import LoRAParameter
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.lora.sharded import LoRAFormersLinear, LoRAFormersParallelLinear
from mindpet_lite.delta.lora.start import DATA_STARTS
from mindpet_lite.delta.method_config import HostedConfig
from mindpet_lite.delta.tokens import RowsOf, are_tokens, rows_shape, table_for, token_table
from mindpet_lite.formats.replication import range_problem
from mindpet_lite.formats.starts import takes_from_base
from mindpet_lite.names.default_targets import Family

# The layers that are built by hand too, by the kind of host.
_BY_HAND: dict[type[Host] | None, type[Adapted]] = {
    layer.__bases__[-1]: layer
    for layer in (LoRADense, LoRALinear, LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRAEmbedding, LoRAMintConv1d,
                  LoRAMintConv2d, LoRAMintConv3d, LoRAMintEmbedding, LoRAFormersLinear, LoRAFormersParallelLinear)}

BIASES = ("none", "all", "lora_only")
_ROWS = RowsOf("lora", "mindpet_delta_lora_tokens", "trainable_token_indices")


@dataclasses.dataclass(frozen=True)
class LoraConfig(HostedConfig, LoraSettings):
    """Settings of LoRA, checked when made; the fields are those of `LoRADense` and `DeltaConfig`.

    They hold for every kind of layer that the targets name: nn.Dense, nn.Conv1d to nn.Conv3d and nn.Embedding, and
    mint.nn's Linear, Conv1d to Conv3d and Embedding. `lora_dropout` does not apply to embeddings, whose ids cannot be
    dropped. Without `lora_a_init` and `lora_b_init` each kind starts as its class does where it is built by hand.

    Args:
        lora_rank: rank r of the update B A; positive. Above the smaller side of a layer's weight a warning says that it
            is wasted. Default: 8.
        lora_alpha: the update is scaled by lora_alpha / lora_rank; finite and positive. Default: 16.
        lora_dropout: probability in [0, 1) of dropping an input of A in training; not on embeddings, whose ids cannot
            be dropped. Default: 0.0.
        lora_a_init: start of A: a Tensor, an Initializer, its name or a number. Default: He-uniform with negative slope
            √5; on an embedding zeros.
        lora_b_init: start of B, likewise. Default: zeros, so that training starts at the base; on an embedding normal
            with deviation 1.
        param_init_type: type of A and B: float16, bfloat16 or float32. Default: float32.
        compute_dtype: type that the layers compute in: float16, bfloat16 or float32. None: the type of `to_float()`,
            else that of the weight; see the dtype rule of `LoRADense`. Default: None.
        use_rslora: scale by lora_alpha / √lora_rank instead (rsLoRA). Default: False.
        use_dora: train a magnitude for each output besides (DoRA); not together with lora_bias. Default: False.
        lora_bias: B has a bias of its own. Default: False.
        init_lora_weights: how A and B start, by PEFT's names: True as above, False B at random too, "gaussian",
            "orthogonal", "pissa", "pissa_niter_4" (with any number of iterations), "olora", "loftq", "eva" or "corda"
            (linear layers only). PiSSA, OLoRA and CorDA take what the factors start with out of the base's weight, and
            LoftQ quantises it. EVA and CorDA start like True, and begin with
            `mindpet_lite.initialize_from_data`. Default: True.
        residual_base: True: the base's weights are those that this start left already, so nothing is taken out of them.
            Default: False.
        eva_config: for "eva": rho, tau, use_label_mask, label_mask_value, whiten and adjust_scaling_factors, see
            `mindpet_lite.delta.lora.eva.EvaConfig`. Default: None.
        corda_config: for "corda": corda_method, "ipm" or "kpm"; see
            `mindpet_lite.delta.lora.corda.CordaConfig`. Default: None.
        loftq_config: for "loftq": loftq_bits, 4 or 8, and loftq_iter; see
            `mindpet_lite.delta.lora.loftq.LoftQConfig`. Default: None.
        rank_pattern: ranks by regular expression, each positive; the first that fits the end of a layer's path counts.
            Default: none, lora_rank everywhere.
        alpha_pattern: alphas by regular expression, each finite and positive, likewise. Default: none, lora_alpha
            everywhere.
        bias: which biases of the base train too: "none", "all", or "lora_only", those of the adapted layers.
            Default: "none".
        trainable_token_indices: token numbers whose rows train, by the name of the embedding, or a list of them for
            ``embed_tokens``. An output layer with the same table as its weight (tied weights) has the trained rows too.
            Default: None.
        ensure_weight_tying: a weight that an embedding and an output layer share stays one where `modules_to_save`
            names one of them alone, and trains for both. (So do tokens that train, in any case.) A LoRA on one of them
            is refused then. Default: False.
        layer_replication: ranges of the net's layers, ``[[0, 4], [2, 5]]`` for the layers 0, 1, 2, 3, 2, 3, 4: the list
            called ``layers``, ``encoder.layer`` or ``h`` has them then. Those that are one layer share its Parameters;
            each has a LoRA of its own. Default: None.
        target_parameters: Parameters of any cells that are adapted themselves, each named by its path or the end of it,
            such as ``"experts.up_proj"``: matrices, and stacks of them as a mixture of experts has. A cell can have
            one. The weight of a linear layer named so is adapted like the layer. With them, `target_modules` can be
            left out; `lora_dropout` must be 0, and `lora_bias` and `use_dora` do not go with them. Default: None.

    Raises:
        TypeError, ValueError: as `LoRADense`.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> config = mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["0", "2"], rank_pattern={"2": 1})
        >>> net = mp.get_pet_model(net, config)
        >>> sum(item.size for item in net.trainable_params())
        34
    """

    pet_type: ClassVar[str] = "lora"
    layer: ClassVar[type[Adapted]] = LowRank
    title: ClassVar[str] = "LoRA"
    fits: ClassVar[tuple[type[Host], ...]] = HOSTS + SPLIT_HOSTS
    by_hand: ClassVar[Mapping[type[Host] | None, type[Adapted]]] = _BY_HAND
    holds_several: ClassVar[bool] = True
    of_one_layer: ClassVar[tuple[str, ...]] = ("token_indices", "target_parameter")

    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bias: str = "none"
    trainable_token_indices: Mapping[str, Sequence[int]] | Sequence[int] | None = None
    _token_indices: Sequence[int] | None = dataclasses.field(default=None, repr=False, kw_only=True)
    ensure_weight_tying: bool = False
    layer_replication: Sequence[Sequence[int]] | None = None
    target_parameters: tuple[str, ...] | None = None
    _target_parameter: str | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        LoraSettings.__post_init__(self)
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, but got {self.bias!r:.100}."
                             f"{did_you_mean(self.bias, BIASES)}")
        for name, check in (("rank_pattern", check_int), ("alpha_pattern", check_alpha)):
            for pattern, value in _mapping(name, getattr(self, name)).items():
                check(f"{name}[{pattern!r}]", value)
                end_expression(name, pattern)
        object.__setattr__(self, "target_parameters",
                           names_of("target_parameters", self.target_parameters, allow_text=False))
        wrong = [name for name in ("lora_dropout", "lora_bias", "use_dora") if getattr(self, name)]
        if (self.target_parameters or self._target_parameter) and wrong:
            raise ValueError(f"target_parameters changes Parameters, whatever they are used for, and {wrong[0]} is of "
                             f"layers: leave one of them out.")
        check_bool("ensure_weight_tying", self.ensure_weight_tying)
        reason = range_problem(self.layer_replication)
        if reason:
            raise ValueError(reason)
        for name in ("trainable_token_indices", "_token_indices"):
            tokens = getattr(self, name)
            for item in tokens.values() if isinstance(tokens, Mapping) else [tokens]:
                if item is not None and not are_tokens(item):
                    raise TypeError(f"{name.strip('_')} must be a list of token numbers, or such lists by the name of "
                                    f"an embedding, but got {item!r:.100}.")

    def for_layer(self, path: str) -> LoraConfig:
        """Return the settings for the layer at `path`: the rank and alpha of the first pattern that fits its end."""
        changed: dict[str, Any] = {}
        for field, patterns in (("lora_rank", self.rank_pattern), ("lora_alpha", self.alpha_pattern)):
            fitting = [value for pattern, value in patterns.items() if end_expression(field, pattern).fullmatch(path)]
            if fitting:
                changed[field] = fitting[0]
        tokens = next((tokens for name, tokens in self._tokens().items() if _ends(path, name)), None)
        own = next((entry.rpartition(".")[2] for entry in self.target_parameters or ()
                    if _ends(path, entry.rpartition(".")[0]) or "." not in entry), None)
        return dataclasses.replace(self, **changed, _token_indices=tokens, _target_parameter=own) \
            if changed or tokens or own else self

    def unhit(self, adapted: Iterable[str]) -> list[str]:
        """Return a sentence for each pattern of a rank or an alpha that fits the end of no adapted layer's path."""
        paths = list(adapted)
        names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        return [f"{field} {pattern!r} hits no adapted layer; a pattern must fit the end of a layer's path, such as "
                f"{paths[0]!r}.{did_you_mean(pattern.strip('.*^$'), names)}"
                for field in ("rank_pattern", "alpha_pattern") for pattern in getattr(self, field)
                if not any(end_expression(field, pattern).fullmatch(path) for path in paths)]

    def trains_base(self, name: str, of_adapted_layer: bool) -> bool:
        """Tell whether a base Parameter is a bias that `bias` says to train."""
        return name.endswith("bias") and (self.bias == "all" or self.bias == "lora_only" and of_adapted_layer)

    def more_targets(self, cells: Mapping[str, nn.Cell]) -> dict[str, nn.Cell]:
        """Return the embeddings of which tokens train, and the cells of which a Parameter is adapted.

        Raises:
            ValueError: a name hits none; or a cell would have two Parameters adapted.
        """
        found: dict[str, nn.Cell] = {}
        for name in self._tokens():
            hits = {path: cell for path, cell in cells.items() if _ends(path, name) and token_table(cell)}
            if not hits:
                raise ValueError(f"trainable_token_indices names {name!r}, but the net has no embedding there."
                                 f"{did_you_mean(name, [path.rpartition('.')[2] for path in cells if path])}")
            found.update(hits)
        for entry in self.target_parameters or ():
            hits = _owners(entry, cells)
            if not hits:
                known = [name for path, cell in cells.items() for name in _own_names(path, cell)]
                raise ValueError(f"target_parameters entry {entry!r:.100} hits no Parameter; it must equal a path or "
                                 f"its last parts, such as {known[0] if known else '(the net has none)'!r}."
                                 f"{did_you_mean(entry, known)}")
            twice = [path for path in hits if path in found]
            if twice:
                raise ValueError(f"target_parameters entry {entry!r:.100} hits {twice[0]}, which is adapted already by "
                                 f"this config: a cell can have one Parameter adapted, or tokens. Put the other one "
                                 f"into a cell of its own.")
            found.update(hits)
        return found

    @property
    def replication(self) -> list[list[int]]:
        """Return layer_replication as lists."""
        return [list(part) for part in self.layer_replication or ()]

    @property
    def keeps_ties(self) -> bool:
        """Return ensure_weight_tying."""
        return self.ensure_weight_tying

    @property
    def has_other_targets(self) -> bool:
        """Tell whether target_parameters names some."""
        return bool(self.target_parameters)

    def refuses(self, cell: nn.Cell) -> str | None:
        """Return why `cell`, or its Parameter that is meant, cannot carry LoRA, or None."""
        if self._target_parameter is None:
            return self.refusal(cell)
        if isinstance(cell, Delta) or _is_linear_weight(cell, self._target_parameter):
            return self.refusal(cell)
        if host_of(cell) is not None:
            return (f"target_parameters adapts the weights of linear layers and Parameters of cells of your own, not "
                    f"{self._target_parameter} of a {type(cell).__name__}: name the layer in target_modules.")
        if self.init_lora_weights not in (True, False):
            return (f"init_lora_weights {self.init_lora_weights!r} is for linear layers, and target_parameters names a "
                    f"Parameter of a {type(cell).__name__}: adapt it with another config.")
        return LoRAParameter.refusal(cell, self._target_parameter)

    def _tokens(self) -> dict[str, Sequence[int]]:
        tokens = self.trainable_token_indices
        if isinstance(tokens, Mapping):
            return dict(tokens)
        # PEFT's default name of the embedding.
        return {"embed_tokens": tokens} if tokens else {}

    @classmethod
    def default_fields(cls, family: Family) -> dict[str, tuple[str, ...]]:
        """Return the layers that PEFT adapts in a family of models."""
        return {"target_modules": family.targets}

    @classmethod
    def split_axes(cls, cell: nn.Cell) -> Mapping[str, int]:
        """Return which axis of A or B is split, where each process has a part of `cell`."""
        host = host_of(cell)
        return {} if host is None or not host.is_split else cls.class_for(cell).axes_of_parts()

    def adapt(self, cell: nn.Cell) -> Delta:
        """Return the LoRA cell on the Parameter objects of `cell`."""
        if self._target_parameter is not None and host_of(cell) is None:
            return LoRAParameter.on(cell, self, self._target_parameter)
        if self._token_indices is not None:
            return table_for(cell).on_rows(cell, self._token_indices, _ROWS)
        return super().adapt(cell)

    def shapes(self, cell: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what these settings train on `cell`."""
        if self._target_parameter is not None and host_of(cell) is None:
            return LoRAParameter.shapes(cell, self, self._target_parameter)
        if self._token_indices is None:
            found: dict[str, tuple[int, ...]] = self.class_for(cell).delta_shapes(cell, self)
            return found
        return {_ROWS.parameter: rows_shape(cell, self._token_indices)}

    def adds_up(self) -> bool:
        """Tell whether adapters with these settings add up with others: no DoRA, no base parameters of their own."""
        alone = (self.use_dora, self.lora_bias, self.bias != "none", self.trainable_token_indices, self._token_indices,
                 takes_from_base(self.init_lora_weights), self.init_lora_weights in DATA_STARTS,
                 self.layer_replication, self.target_parameters)
        return super().adds_up() and not any(alone)

    @classmethod
    def bank(cls, layer: nn.Cell, name: str) -> LoRABank:
        """Return a layer for several adapters in the place of this one; see `DeltaConfig.bank`."""
        host = host_of(layer)
        if host is not None and host.is_split:
            raise ValueError("each process has a part of this layer, which holds one adapter alone.")
        kind = adapted_class(LoRABank, host)
        return kind.of(layer, name) if isinstance(layer, Delta) else kind.empty(layer)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _owners(entry: str, cells: Mapping[str, nn.Cell]) -> dict[str, nn.Cell]:
    """Return the cells that hold the Parameters that an entry names, each once."""
    found: dict[int, tuple[str, nn.Cell]] = {}
    for path, cell in cells.items():
        if any(_ends(name, entry) for name in _own_names(path, cell)):
            found.setdefault(id(cell), (path, cell))
    return dict(found.values())


def _own_names(path: str, cell: nn.Cell) -> list[str]:
    """Return the paths of a cell's own Parameters."""
    return [f"{path}.{name}" if path else name for name, _ in cell.parameters_and_names(expand=False)]


def _is_linear_weight(cell: nn.Cell, name: str) -> bool:
    """Tell whether a Parameter is the weight of a linear layer."""
    host = host_of(cell)
    if host is None or not host.is_linear or host.is_quantised or name != host.base_names[0]:
        return False
    # One that lies as (inputs, outputs) is no such matrix.
    return not (issubclass(host, TurnedHost) and host.turned(cell))


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping from patterns of paths to numbers, but got {value!r:.100}.")
    return value
