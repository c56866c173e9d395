"""MindFormers' linear layers and embeddings as hosts. The library is not imported: a layer is known by its class.

That is a class of one of the names below, of a module of ``mindformers`` that is not for inference, or a class made
from it that computes as it does. (MindFormers 2.1. Its classes for inference do not train.)

| host | classes | where |
|---|---|---|
| `FormersLinear` | `Linear` | ``mindformers.modules.layers``: Llama, GLM and others |
| `FormersParallelLinear` | `ColumnParallelLinear`, `RowParallelLinear` and those made from them | ``training_graph`` |
| `FormersPynativeLinear` | `Linear` | ``mindformers.pynative`` |
| `FormersEmbedding` | `LlamaEmbedding`, `GLMEmbedding` | ``mindformers.models`` |
| `FormersVocabEmbedding` | `VocabParallelEmbedding`, `VocabEmbedding` | ``training_graph``, ``pynative`` |

All compute in the type that the library gave the layer, unless the method's `compute_dtype` says another, and give back
the type of the input.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import mindspore
from mindspore import Parameter, Tensor, context, nn, ops

from mindpet_lite.delta.base import type_refusal
from mindpet_lite.delta.hosts.base import Host, override_refusal
from mindpet_lite.delta.hosts.dense import ActiveRowsHost, DenseHost
from mindpet_lite.delta.hosts.embedding import TableHost
from mindpet_lite.delta.hosts.rows import TurnedHost
from mindpet_lite.delta.parts import as_type


def formers_class(cell: nn.Cell, names: Iterable[str], within: str) -> type[nn.Cell] | None:
    """Return the library's class that a cell is of, or None.

    Args:
        cell: any cell.
        names: of the classes.
        within: what the name of its module holds.
    """
    for kind in type(cell).__mro__:
        module = kind.__module__.split(".")
        if kind.__name__ in names and module[0] == "mindformers" and within in module and "inference" not in module:
            return kind
    return None


def _experts(cell: nn.Cell) -> int:
    """Return for how many experts the weight of a cell is a stack, or 0."""
    weight = getattr(cell, "weight", None)
    return weight.shape[0] if weight is not None and weight.ndim == 3 else 0


def experts_refusal(cell: nn.Cell) -> str | None:
    """Return what to do with a Linear of the library whose weight is a stack for experts, or None for others."""
    if formers_class(cell, ("Linear",), "layers") is None or not _experts(cell):
        return None
    return (f"the weight of this {type(cell).__name__} is a stack for {_experts(cell)} experts: name it in "
            f"target_parameters of LoraConfig, such as target_parameters=[\"mlp.mapping.weight\"].")


class FormersHost(Host):
    """What the hosts of MindFormers' layers have in common.

    Class attributes:
        names: of the library's classes.
        within: a part of the name of their modules.
    """

    names: ClassVar[tuple[str, ...]]
    within: ClassVar[tuple[str, ...]]
    # What the library computes in.
    host_type: mindspore.dtype

    @classmethod
    def librarys(cls, cell: nn.Cell) -> type[nn.Cell] | None:
        """Return the library's class that a cell is of, or None."""
        return next(filter(None, (formers_class(cell, cls.names, part) for part in cls.within)), None)

    @classmethod
    def matches(cls, cell: nn.Cell) -> bool:
        """Tell whether a cell is of the library's class, without experts, or one of ours in its place."""
        return isinstance(cell, cls) or cls.librarys(cell) is not None and not _experts(cell)

    @classmethod
    def refusal(cls, cell: nn.Cell, method: str) -> str | None:
        """Return why `cell` cannot be adapted, or None."""
        if isinstance(cell, cls):
            return None
        weight = getattr(cell, cls.base_names[0], None)
        if weight is None:
            return (f"this {type(cell).__name__} has no weight of its own (skip_weight_param_allocation): adapt the "
                    f"layer whose weight it is given.")
        if hasattr(weight, "to_local"):
            return (f"the weight of this {type(cell).__name__} is a DTensor, of which each process has a part: adapt "
                    f"the net before it is parallelised.")
        plain = cls.librarys(cell) or type(cell)
        return override_refusal(cell, plain, cls.plain_name, method) or type_refusal(weight, method)

    def _own_type(self) -> mindspore.dtype:
        return self.host_type

    def _compute_type(self) -> mindspore.dtype:
        # The library's layers compute in their own type whatever to_float() says.
        return self.host_type if self.compute_dtype is None else self.compute_dtype


class FormersLinear(FormersHost, ActiveRowsHost, TurnedHost):
    """`mindformers.modules.layers.Linear`: act(x Wᵀ + b), with W as (inputs, outputs) where `transpose_b` is False.

    `matmul`, `bias_add` and the activation are the layer's own, with the strategies that `shard` gave them.
    """

    plain_name = "MindFormers' Linear"
    names, within = ("Linear",), ("layers",)
    parts = (*DenseHost.parts, "transpose_b", "host_type", "param_init_type", "act_name")

    @classmethod
    def librarys(cls, cell: nn.Cell) -> type[nn.Cell] | None:
        """Return the library's class: the `Linear` of ``modules``, not that of ``pynative``."""
        found = super().librarys(cell)
        return None if found is None or "pynative" in found.__module__.split(".") else found

    @classmethod
    def turned(cls, layer: nn.Cell) -> bool:
        """Tell whether the weight lies as (inputs, outputs)."""
        return not layer.transpose_b

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        layer.matmul = source.matmul
        if layer.has_bias:
            layer.bias_add = source.bias_add
        layer.host_type = source.host_type if isinstance(source, FormersHost) else source.dtype
        layer.dtype = layer.host_type


class _Called(FormersHost):
    """Layers that are called with a second, optional weight."""

    def _without_weight(self, weight: Any) -> None:
        if weight is not None:
            raise ValueError("this layer is adapted, with its own weight, and was called with another one: leave it "
                             "out with exclude_modules.")


class FormersParallelLinear(_Called, TurnedHost):
    """`ColumnParallelLinear`, `RowParallelLinear` and the like of MindFormers' mcore layers for graphs.

    A call gives back the output and the bias, which is None unless `skip_bias_add` leaves it to the caller to add.
    Where MindSpore's semi-automatic parallelism splits the net, the product is split as the layer itself splits it.
    """

    plain_name = "MindFormers' ColumnParallelLinear and RowParallelLinear"
    names, within = ("ColumnParallelLinear", "RowParallelLinear"), ("training_graph",)
    parts = ("input_size", "output_size", "config", "transpose_b", "skip_bias_add", "params_dtype", "host_type")

    @classmethod
    def turned(cls, layer: nn.Cell) -> bool:
        """Tell whether the weight lies as (inputs, outputs)."""
        return not layer.transpose_b

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        layer.host_type = source.host_type if isinstance(source, FormersHost) else source.compute_dtype
        layer.gives_bias = layer.has_bias and source.skip_bias_add
        layer.has_bias = layer.has_bias and not source.skip_bias_add
        if isinstance(source, FormersHost) or getattr(source.matmul, "in_strategy", None):
            layer.matmul = source.matmul
        elif context.get_auto_parallel_context("parallel_mode") == "semi_auto_parallel":
            layer.matmul.shard(split_of(source))

    @classmethod
    def leaves_bias(cls, layer: nn.Cell) -> bool:
        """Tell whether `skip_bias_add` leaves a bias to the caller."""
        return bool(layer.skip_bias_add) and layer.bias is not None

    def adds_bias(self) -> bool:
        """Tell whether the layer adds its bias itself."""
        return bool(self.has_bias)

    def entrance(self, input_: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Parameter | None]:
        """Return the output, and the bias where it is for the caller to add."""
        self._without_weight(weight)
        return self.inside(input_), self.bias if self.gives_bias else None

    inside, construct = Host.construct, entrance  # type: ignore[assignment]


class FormersPynativeLinear(_Called, TurnedHost):
    """`mindformers.pynative.layers.linear.Linear`; with `skip_add_bias` a hook around the layer adds the bias."""

    plain_name = "MindFormers' Linear of PyNative mode"
    names, within = ("Linear",), ("pynative",)
    parts = ("input_size", "output_size", "params_dtype", "host_type", "skip_add_bias")

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        layer.host_type = source.host_type if isinstance(source, FormersHost) else source.compute_dtype
        layer.has_bias = layer.has_bias and not source.skip_add_bias

    @classmethod
    def leaves_bias(cls, layer: nn.Cell) -> bool:
        """Tell whether `skip_add_bias` leaves a bias to a hook."""
        return bool(layer.skip_add_bias) and layer.bias is not None

    def entrance(self, input_: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the output."""
        self._without_weight(weight)
        return self.inside(input_)

    inside, construct = Host.construct, entrance  # type: ignore[assignment]


class FormersEmbedding(FormersHost, TableHost):
    """`LlamaEmbedding`, whose table is `embedding_weight`."""

    plain_name = "MindFormers' LlamaEmbedding"
    names, within = ("LlamaEmbedding", "GLMEmbedding"), ("models",)
    base_names = ("embedding_weight",)
    parts = ("vocab_table_size", "embedding_size", "rmsnorm_compute_2d", "gather")
    padding_idx = None

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        layer.host_type = source.embedding_weight.dtype

    @property
    def weight(self) -> Parameter:
        """The table, by the name that other kinds of layers have for it."""
        return self.embedding_weight

    def rows(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return the rows of a table, by the layer's own operator."""
        return self.gather(table, ids, 0)

    def finish(self, y: Tensor, shape: tuple[int, ...], output_type: mindspore.dtype,
               dtype: mindspore.dtype) -> Tensor:
        """Return the rows with the axes of the ids, or as they are where the layer gives them so."""
        # Written out: in a graph `super()` is that of the adapted class.
        if self.rmsnorm_compute_2d:
            return as_type(y, output_type)
        return as_type(ops.reshape(y, (*shape, y.shape[1])), output_type)


class FormersVocabEmbedding(FormersHost, TableHost):
    """`VocabParallelEmbedding` and `VocabEmbedding`, whose table is `weight`, in one process or split by no hook."""

    plain_name = "MindFormers' VocabParallelEmbedding and VocabEmbedding"
    names, within = ("VocabParallelEmbedding", "VocabEmbedding"), ("training_graph", "pynative")
    parts = ("num_embeddings", "embedding_dim")
    padding_idx = None
    gather: ops.Gather

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        layer.host_type, layer.gather = source.weight.dtype, ops.Gather()

    @classmethod
    def refusal(cls, cell: nn.Cell, method: str) -> str | None:
        """Return why `cell` cannot be adapted: processes share its table, among others."""
        if getattr(cell, "enable_embedding_tp", False):
            return ("processes share this table by communication of the layer's own: leave it out with "
                    "exclude_modules, or train with tensor_model_parallel_size 1.")
        return super().refusal(cell, method)

    def rows(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return the rows of a table."""
        return self.gather(table, ids, 0)


KINDS: tuple[type[Host], ...] = (FormersLinear, FormersParallelLinear, FormersPynativeLinear, FormersEmbedding,
                                 FormersVocabEmbedding)
for _kind in KINDS:
    # There is no class of ours that is plain: one of these without a method stands for the library's.
    _kind.plain_type = _kind


def split_of(layer: nn.Cell) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return how a layer's product of (rows, inputs) and its weight is split: outputs by columns, inputs by rows."""
    config = layer.config
    data, several, parts = (getattr(config, name, None) or 1 for name in (
        "data_parallel_size", "context_parallel_size", "tensor_model_parallel_size"))
    name = next(kind.__name__ for kind in type(layer).__mro__ if kind.__name__ in (
        "RowParallelLinear", "LinearNoTP", "SequenceParallelLinear", "ColumnParallelLinear"))
    outputs = parts if name == "ColumnParallelLinear" else 1
    inputs = parts if name == "RowParallelLinear" else 1
    rows = data * several * (parts if name == "SequenceParallelLinear" else 1)
    return (rows, inputs), (outputs, inputs) if layer.transpose_b else (inputs, outputs)
