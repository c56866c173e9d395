"""LoRA on the convolutions of `mindspore.nn` and `mindspore.mint.nn`."""
from __future__ import annotations

import math
from typing import Any, ClassVar

import mindspore
from mindspore import Tensor, nn, ops

from mindpet_lite.delta.dense import require_float
from mindpet_lite.delta.lora.layer import LoRALayer
from mindpet_lite.delta.lora.low_rank import HE_UNIFORM
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.lora.typed import (
    TypedConv1d,
    TypedConv2d,
    TypedConv3d,
    TypedMintConv1d,
    TypedMintConv2d,
    TypedMintConv3d,
)
from mindpet_lite.delta.parts import as_type


class LoRAConv(LoRALayer):
    r"""A convolution with a trainable low-rank update beside its frozen kernel: what all kinds share.

    .. math:: y = W * x + b + \frac{\alpha}{r} B * (A * drop(x))

    A is a convolution to `lora_rank` channels with the kernel size, stride, padding and dilation of the layer, B one
    of kernel size 1: `mindpet_delta_lora_a` (lora_rank, in_channels, *kernel) and `mindpet_delta_lora_b`
    (out_channels, lora_rank / group, 1, ...), as PEFT has them. With the scaling `scaling` (), see
    :class:`LoRADense`, where the dtype rule stands too.

    With ``group > 1``, A sees all channels and B has the groups, as in PEFT: output group g is made of the g-th
    part of the `lora_rank` channels. An output then depends on every input channel, which no kernel of the grouped
    layer can express: `merge` refuses such a layer. (DoRA takes the norm as PEFT does, which lays B A over the
    kernel.) `lora_rank` must be divisible by `group`.

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; for convolutions the authors' loralib, and PEFT.

    Args:
        in_channels (int): channels of the input.
        out_channels (int): channels of the output.
        kernel_size (int | tuple[int]): as the plain layer takes it.
        lora_rank (int): channels between A and B; positive, divisible by the number of groups.
        lora_alpha (int | float): finite and positive; the update is scaled by lora_alpha / lora_rank.
        lora_dropout (int | float): probability in [0, 1) of dropping an input of A in training.
        lora_a_init (Tensor | str | Initializer | number): start of A. Default: He-uniform with negative slope √5.
        lora_b_init (Tensor | str | Initializer | number): start of B. Default: zeros, so that the layer starts equal
            to its base.
        param_init_type (mindspore.dtype): type of A and B: float16, bfloat16 or float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule.
        use_rslora (bool), lora_bias (bool): as for :class:`LoRADense`.
        **conv_kwargs: the other arguments of the plain layer.

    Inputs:
        - **x** (Tensor): as the plain layer takes it.

    Outputs:
        Tensor of the plain layer's shape, and of the type that the dtype rule says.

    Raises:
        TypeError: as :class:`LoRADense` and the plain layer.
        ValueError: as :class:`LoRADense` and the plain layer; lora_rank is not divisible by the number of groups; the
            layout is not channels first.
    """

    dims: ClassVar[int]
    groups_name: ClassVar[str]

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], lora_rank: int,
                 lora_alpha: float, lora_dropout: float = 0.0, lora_a_init: Any = HE_UNIFORM,
                 lora_b_init: Any = "zeros", param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, use_rslora: bool = False,
                 lora_bias: bool = False, **conv_kwargs: Any) -> None:
        settings = LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type,
                                compute_dtype, use_rslora, lora_bias=lora_bias)
        super().__init__(in_channels, out_channels, kernel_size, **conv_kwargs)
        require_float(self.weight, type(self))
        self._add_delta(settings)

    @classmethod
    def factor_shapes(cls, layer: nn.Cell, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B."""
        kernel = tuple(layer.weight.shape[-cls.dims:])
        return ((rank, layer.in_channels, *kernel),
                (layer.out_channels, rank // getattr(layer, cls.groups_name), *[1] * cls.dims))

    def _add_delta(self, config: LoraSettings) -> None:
        groups = getattr(self, self.groups_name)
        if config.lora_rank % groups:
            raise ValueError(f"lora_rank must be divisible by the {groups} groups of the convolution, between which "
                             f"its channels are shared out, but got {config.lora_rank}: take a multiple of {groups}, "
                             f"or leave the layer out with exclude_modules.")
        kernel = tuple(self.weight.shape[-self.dims:])
        self.compute_dtype = config.compute_dtype
        self._add_factors(config, self.weight, min(self.out_channels, self.in_channels * math.prod(kernel)))
        self._add_dropout()
        self.lora_groups = groups
        self.lora_b_matmul = ops.BatchMatMul()
        if groups > 1:
            self.unmergeable = (f"with {groups} groups the update makes each output depend on every input channel, "
                                f"which a kernel of as many groups cannot hold; use the net unmerged.")

    def _low(self, x: Tensor, a: Tensor) -> Tensor:
        """Return A * x: (batch, lora_rank, *space)."""
        raise NotImplementedError

    def _high(self, low: Tensor, b: Tensor) -> Tensor:
        """Return B * low: (batch, out_channels, *space).

        A product of matrices for each group, because Ascend's convolution knows no groups but a channel each.
        """
        shape, groups = low.shape, self.lora_groups
        batch = shape[:-self.dims - 1]
        rows = ops.reshape(low, (*batch, groups, self.lora_rank // groups, -1))
        b = ops.reshape(b, (groups, self.out_channels // groups, self.lora_rank // groups))
        y = self.lora_b_matmul(ops.broadcast_to(b, (*batch, *b.shape)), rows)
        return ops.reshape(y, (*batch, self.out_channels, *shape[-self.dims:]))

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (batch, in_channels, *space); return a Tensor of the type that the dtype rule says."""
        output_type, dtype = self._output_type(x), self._compute_type()
        x = self._entered(x, dtype)
        y = self._base(x, dtype)
        if self.has_dropout:
            x = self.lora_dropout(x)
        low = self._scaled(self._low(x, as_type(self.mindpet_delta_lora_a, dtype)), dtype)
        update = self._high(low, as_type(self.mindpet_delta_lora_b, dtype))
        if self.has_lora_bias:
            update = update + self._scaled_bias(dtype)
        if self.use_dora:
            update = self._dora(self._linear(x, dtype), update, dtype)
        return as_type(ops.add(y, update), output_type)

    @classmethod
    def magnitude_shape(cls, outputs: int) -> tuple[int, ...]:
        """Return the shape of a number for each output beside the layer's output."""
        return (1, outputs, *[1] * cls.dims)


class _NNConv(LoRAConv):
    groups_name = "group"

    def _add_delta(self, config: LoraSettings) -> None:
        if self.data_format == "NHWC":
            raise ValueError("LoRA's convolutions are channels first, but data_format is 'NHWC': build the layer with "
                             "'NCHW'.")
        super()._add_delta(config)
        primitive = ops.Conv3D if self.dims == 3 else ops.Conv2D
        self.lora_a_conv = primitive(self.lora_rank, self.kernel_size, pad_mode=self.pad_mode, pad=self.padding,
                                     stride=self.stride, dilation=self.dilation)

    def _low(self, x: Tensor, a: Tensor) -> Tensor:
        return self.lora_a_conv(x, a)


class LoRAConv1d(_NNConv, TypedConv1d):
    """LoRA on `nn.Conv1d`; see :class:`LoRAConv`. `weight` is (out_channels, in_channels / group, 1, kernel_size)."""

    def _low(self, x: Tensor, a: Tensor) -> Tensor:
        return self.squeeze(self.lora_a_conv(self.expand_dims(x, 2), self.expand_dims(a, 2)))


class LoRAConv2d(_NNConv, TypedConv2d):
    """LoRA on `nn.Conv2d`; see :class:`LoRAConv`."""


class LoRAConv3d(_NNConv, TypedConv3d):
    """LoRA on `nn.Conv3d`; see :class:`LoRAConv`."""


class _MintConv(LoRAConv):
    groups_name = "groups"

    def _low(self, x: Tensor, a: Tensor) -> Tensor:
        return self._convolution(x, a, None, 1)


class LoRAMintConv1d(_MintConv, TypedMintConv1d):
    """LoRA on `mint.nn.Conv1d`; see :class:`LoRAConv`."""


class LoRAMintConv2d(_MintConv, TypedMintConv2d):
    """LoRA on `mint.nn.Conv2d`; see :class:`LoRAConv`."""


class LoRAMintConv3d(_MintConv, TypedMintConv3d):
    """LoRA on `mint.nn.Conv3d`; see :class:`LoRAConv`."""
