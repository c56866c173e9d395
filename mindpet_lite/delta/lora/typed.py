"""The kinds of plain layers besides Dense, with the dtype rule: LoRA is built on them, and leaves them when merged."""
from __future__ import annotations

from typing import ClassVar, TypeVar

import mindspore
from mindspore import Parameter, Tensor, mint, nn, ops

from mindpet_lite.delta.dense import TypedCell
from mindpet_lite.delta.parts import as_type

SomeLayer = TypeVar("SomeLayer", bound=nn.Cell)


class TypedLayer(TypedCell):
    """A layer of `plain_type` with the dtype rule; a kind's class is ``class X(TypedLayer, plain_type)``.

    `parts` names what a plain layer is made of besides its Parameters, which `base_names` names: taken over, not
    copied, by `on`.
    """

    plain_type: ClassVar[type[nn.Cell]]
    plain_name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    base_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    weight: Parameter

    @classmethod
    def on(cls, kind: type[SomeLayer], source: nn.Cell) -> SomeLayer:
        """Return a layer of this class or its plain one on the parts of `source`, without renaming a Parameter."""
        layer: SomeLayer = nn.Cell.__new__(kind)
        nn.Cell.__init__(layer)
        for name in cls.parts:
            if hasattr(source, name):
                setattr(layer, name, getattr(source, name))
        for name in cls.base_names:
            parameter = getattr(source, name)
            if parameter is None:
                # The compiler does not take a Parameter slot that holds None.
                setattr(layer, name, None)
            else:
                # A plain assignment would rename it.
                layer.insert_param_to_cell(name, parameter)
        layer.set_train(source.training)
        layer.set_grad(source.requires_grad)
        return layer

    def _own_type(self) -> mindspore.dtype:
        return self.weight.dtype

    def _base(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what the plain layer makes of `x`, in `dtype`."""
        raise NotImplementedError

    def _linear(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return it without a bias."""
        raise NotImplementedError

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`."""
        dtype = self._compute_type()
        return as_type(self._base(self._entered(x, dtype), dtype), self._output_type(x), dtype)


class TypedLinear(TypedLayer, mint.nn.Linear):
    """`mint.nn.Linear` with the dtype rule."""

    plain_type, plain_name = mint.nn.Linear, "mint.nn.Linear"
    parts = ("in_features", "out_features", "has_bias", "dense")

    def _base(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        bias = as_type(self.bias, dtype) if self.has_bias else None
        return self.dense(x, as_type(self.weight, dtype), bias)

    def _linear(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        return self.dense(x, as_type(self.weight, dtype))


class _NNConv(TypedLayer):
    parts = ("in_channels", "out_channels", "kernel_size", "stride", "pad_mode", "data_format", "padding", "dilation",
             "_dilation", "group", "has_bias", "weight_init", "bias_init", "bias_add", "shape", "expand_dims",
             "squeeze", "concat", "split_0", "split_1", "conv2d", "conv3d")

    def _linear(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        return self.conv2d(x, as_type(self.weight, dtype))

    def _base(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        y = self._linear(x, dtype)
        if self.has_bias:
            y = self.bias_add(y, as_type(self.bias, dtype))
        return y


class TypedConv1d(_NNConv, nn.Conv1d):
    """`nn.Conv1d` with the dtype rule."""

    plain_type, plain_name, dims = nn.Conv1d, "nn.Conv1d", 1

    def _linear(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        return self.squeeze(self.conv2d(self.expand_dims(x, 2), as_type(self.weight, dtype)))

    def _base(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        # The bias before the axis goes, as the plain layer has it.
        y = self.conv2d(self.expand_dims(x, 2), as_type(self.weight, dtype))
        if self.has_bias:
            y = self.bias_add(y, as_type(self.bias, dtype))
        return self.squeeze(y)


class TypedConv2d(_NNConv, nn.Conv2d):
    """`nn.Conv2d` with the dtype rule."""

    plain_type, plain_name, dims = nn.Conv2d, "nn.Conv2d", 2


class TypedConv3d(_NNConv, nn.Conv3d):
    """`nn.Conv3d` with the dtype rule."""

    plain_type, plain_name, dims = nn.Conv3d, "nn.Conv3d", 3

    def _linear(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        weight = as_type(self.weight, dtype)
        if self.group == 1:
            return self.conv3d(x, weight)
        # As the plain layer does it: Ascend's convolution of volumes has no groups.
        parts, kernels = self.split_1(x), self.split_0(weight)
        return self.concat([self.conv3d(parts[index], kernels[index]) for index in range(self.group)])


class _MintConv(TypedLayer):
    dims: ClassVar[int]
    parts = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "transposed",
             "output_padding", "padding_mode", "_reversed_padding", "conv1d", "conv2d", "conv3d")

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Return what the layer's own operator makes of `x` with this kernel."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = mint.nn.functional.pad(x, self._reversed_padding, mode=self.padding_mode)
            padding = (0,) * self.dims
        if self.dims == 1:
            return self.conv1d(x, weight, bias, self.stride, padding, self.dilation, groups)
        if self.dims == 2:
            return self.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)
        return self.conv3d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def _base(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        bias = None if self.bias is None else as_type(self.bias, dtype)
        return self._convolution(x, as_type(self.weight, dtype), bias, self.groups)

    def _linear(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        return self._convolution(x, as_type(self.weight, dtype), None, self.groups)


class TypedMintConv1d(_MintConv, mint.nn.Conv1d):
    """`mint.nn.Conv1d` with the dtype rule."""

    plain_type, plain_name, dims = mint.nn.Conv1d, "mint.nn.Conv1d", 1


class TypedMintConv2d(_MintConv, mint.nn.Conv2d):
    """`mint.nn.Conv2d` with the dtype rule."""

    plain_type, plain_name, dims = mint.nn.Conv2d, "mint.nn.Conv2d", 2


class TypedMintConv3d(_MintConv, mint.nn.Conv3d):
    """`mint.nn.Conv3d` with the dtype rule."""

    plain_type, plain_name, dims = mint.nn.Conv3d, "mint.nn.Conv3d", 3


class _Table(TypedLayer):
    """A table of vectors: ids have no float type, so without `to_float()` the output has the type of the table."""

    def _output_type(self, x: Tensor) -> mindspore.dtype:
        return self.weight.dtype if self.float_type is None else self.float_type

    def _rows(self, ids: Tensor) -> Tensor:
        """Return the table's rows for `ids` (n,): (n, embedding_size)."""
        raise NotImplementedError

    def construct(self, ids: Tensor) -> Tensor:
        """Look up `ids` (*); return (*, embedding_size)."""
        return as_type(self._base(ids, self._compute_type()), self._output_type(ids))

    def _base(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        rows = as_type(self._rows(ops.reshape(x, (-1,))), dtype)
        return ops.reshape(rows, (*x.shape, rows.shape[1]))


class TypedEmbedding(_Table, nn.Embedding):
    """`nn.Embedding` with the dtype rule."""

    plain_type, plain_name = nn.Embedding, "nn.Embedding"
    base_names = ("embedding_table",)
    parts = ("vocab_size", "embedding_size", "use_one_hot", "dtype", "padding_idx", "init_tensor", "expand",
             "reshape_flat", "shp_flat", "gather", "one_hot", "on_value", "off_value", "array_mul", "reshape",
             "get_shp", "concat")

    @property
    def weight(self) -> Parameter:
        """The table, by the name that other kinds of layers have for it."""
        return self.embedding_table

    def _one_hot(self, ids: Tensor, dtype: mindspore.dtype) -> Tensor:
        return as_type(self.one_hot(ids, self.vocab_size, self.on_value, self.off_value), dtype)

    def _rows(self, ids: Tensor) -> Tensor:
        if self.use_one_hot:
            return self.array_mul(self._one_hot(ids, self.embedding_table.dtype), self.embedding_table)
        return self.gather(self.embedding_table, ids, 0)


class TypedMintEmbedding(_Table, mint.nn.Embedding):
    """`mint.nn.Embedding` with the dtype rule."""

    plain_type, plain_name = mint.nn.Embedding, "mint.nn.Embedding"
    base_names = ("weight",)
    parts = ("num_embeddings", "embedding_dim", "dtype", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq",
             "sparse")

    def _output_type(self, x: Tensor) -> mindspore.dtype:
        return self.weight.dtype if self.in_graph else super()._output_type(x)

    def _compute_type(self) -> mindspore.dtype:
        # MindSpore's own layer looks up by a function, into which to_float() does not reach in graph mode.
        if self.in_graph and self.compute_dtype is None:
            return self.weight.dtype
        return super()._compute_type()

    def _rows(self, ids: Tensor) -> Tensor:
        return mint.nn.functional.embedding(ids, self.weight, self.padding_idx)
