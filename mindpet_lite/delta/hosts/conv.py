"""The convolutions of `mindspore.nn` and `mindspore.mint.nn` as hosts."""
from __future__ import annotations

from typing import Any, ClassVar

import mindspore
from mindspore import Tensor, mint, nn, ops

from mindpet_lite.delta.hosts.base import Host
from mindpet_lite.delta.parts import as_type


class _Conv(Host):
    """What all convolutions share: `narrow` slides as the layer does and sees all channels, `widen` has its groups."""

    groups_name: ClassVar[str]

    @classmethod
    def logical_shape(cls, layer: nn.Cell) -> tuple[int, ...]:
        """Return (outputs, inputs of a group, *kernel): nn.Conv1d's own weight has an axis more."""
        shape = tuple(layer.weight.shape)
        return *shape[:2], *shape[len(shape) - cls.dims:]

    @classmethod
    def group_count(cls, layer: nn.Cell) -> int:
        """Return the number of groups."""
        return getattr(layer, cls.groups_name)

    @classmethod
    def widen_shape(cls, layer: nn.Cell, rank: int) -> tuple[int, ...]:
        """Return (outputs, rank of a group, 1, ...)."""
        return cls.outputs(layer), rank // cls.group_count(layer), *[1] * cls.dims

    def add_low_rank_operators(self, rank: int) -> None:
        """Make the product of `widen`."""
        self.lora_groups, self.lora_width = self.group_count(self), self.outputs(self)
        self.lora_b_matmul = ops.BatchMatMul()

    def widen(self, low: Tensor, b: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return B * low.

        A product of matrices for each group, because Ascend's convolution knows no groups but a channel each.
        """
        shape, groups = low.shape, self.lora_groups
        batch, share = shape[:-self.dims - 1], shape[-self.dims - 1] // groups
        rows = ops.reshape(low, (*batch, groups, share, -1))
        b = ops.reshape(as_type(b, dtype), (groups, self.lora_width // groups, share))
        y = self.lora_b_matmul(ops.broadcast_to(b, (*batch, *b.shape)), rows)
        return ops.reshape(y, (*batch, self.lora_width, *shape[-self.dims:]))


class _NNConv(_Conv):
    groups_name = "group"
    parts = ("in_channels", "out_channels", "kernel_size", "stride", "pad_mode", "data_format", "padding", "dilation",
             "_dilation", "group", "has_bias", "weight_init", "bias_init", "bias_add", "shape", "expand_dims",
             "squeeze", "concat", "split_0", "split_1", "conv2d", "conv3d")

    def check(self) -> None:
        """Raise ValueError for a layout that is not channels first."""
        if self.data_format == "NHWC":
            raise ValueError("an adapted convolution is channels first, but data_format is 'NHWC': build the layer "
                             "with 'NCHW'.")

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W * h."""
        return self.conv2d(h, weight)

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W * h + b."""
        y = self.linear(h, weight, dtype)
        if self.has_bias:
            y = self.bias_add(y, as_type(self.bias, dtype))
        return y

    def add_low_rank_operators(self, rank: int) -> None:
        """Make a convolution to `rank` channels as the layer's own, and the product of `widen`."""
        super().add_low_rank_operators(rank)
        primitive: Any = ops.Conv3D if self.dims == 3 else ops.Conv2D
        self.lora_a_conv = primitive(rank, self.kernel_size, pad_mode=self.pad_mode, pad=self.padding,
                                     stride=self.stride, dilation=self.dilation)

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return A * h."""
        return self.lora_a_conv(h, as_type(a, dtype))


class Conv1dHost(_NNConv, nn.Conv1d):
    """`nn.Conv1d` with the dtype rule; its weight is (outputs, inputs of a group, 1, kernel)."""

    plain_type, plain_name, dims = nn.Conv1d, "nn.Conv1d", 1

    def logical_weight(self) -> Tensor:
        """Return the weight without the axis that nn.Conv1d has more."""
        return ops.squeeze(self.weight, 2)

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return the weight with the axis that nn.Conv1d has more."""
        return ops.expand_dims(weight, 2)

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W * h."""
        return self.squeeze(self.conv2d(self.expand_dims(h, 2), weight))

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W * h + b, the bias before the axis goes, as the plain layer has it."""
        y = self.conv2d(self.expand_dims(h, 2), weight)
        if self.has_bias:
            y = self.bias_add(y, as_type(self.bias, dtype))
        return self.squeeze(y)

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return A * h."""
        return self.squeeze(self.lora_a_conv(self.expand_dims(h, 2), self.expand_dims(as_type(a, dtype), 2)))


class Conv2dHost(_NNConv, nn.Conv2d):
    """`nn.Conv2d` with the dtype rule."""

    plain_type, plain_name, dims = nn.Conv2d, "nn.Conv2d", 2


class Conv3dHost(_NNConv, nn.Conv3d):
    """`nn.Conv3d` with the dtype rule."""

    plain_type, plain_name, dims = nn.Conv3d, "nn.Conv3d", 3

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W * h."""
        if self.group == 1:
            return self.conv3d(h, weight)
        # As the plain layer does it: Ascend's convolution of volumes has no groups.
        parts, kernels = self.split_1(h), self.split_0(weight)
        return self.concat([self.conv3d(parts[index], kernels[index]) for index in range(self.group)])


class _MintConv(_Conv):
    groups_name = "groups"
    parts = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "transposed",
             "output_padding", "padding_mode", "_reversed_padding", "conv1d", "conv2d", "conv3d")

    def _convolution(self, h: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Return what the layer's own operator makes of `h` with this kernel."""
        padding = self.padding
        if self.padding_mode != "zeros":
            h = mint.nn.functional.pad(h, self._reversed_padding, mode=self.padding_mode)
            padding = (0,) * self.dims
        if self.dims == 1:
            return self.conv1d(h, weight, bias, self.stride, padding, self.dilation, groups)
        if self.dims == 2:
            return self.conv2d(h, weight, bias, self.stride, padding, self.dilation, groups)
        return self.conv3d(h, weight, bias, self.stride, padding, self.dilation, groups)

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W * h."""
        return self._convolution(h, weight, None, self.groups)

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W * h + b, by one operator."""
        return self._convolution(h, weight, None if self.bias is None else as_type(self.bias, dtype), self.groups)

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return A * h."""
        return self._convolution(h, as_type(a, dtype), None, 1)


class MintConv1dHost(_MintConv, mint.nn.Conv1d):
    """`mint.nn.Conv1d` with the dtype rule."""

    plain_type, plain_name, dims = mint.nn.Conv1d, "mint.nn.Conv1d", 1


class MintConv2dHost(_MintConv, mint.nn.Conv2d):
    """`mint.nn.Conv2d` with the dtype rule."""

    plain_type, plain_name, dims = mint.nn.Conv2d, "mint.nn.Conv2d", 2


class MintConv3dHost(_MintConv, mint.nn.Conv3d):
    """`mint.nn.Conv3d` with the dtype rule."""

    plain_type, plain_name, dims = mint.nn.Conv3d, "mint.nn.Conv3d", 3
