"""The cases for the laws of LoRA on convolutions."""
from __future__ import annotations

import reference_conv
from laws import Case
from mindspore import nn
from nets import numbers

from mindpet_lite.delta import LoRAConv1d, LoRAConv2d, LoRAConv3d

LORA = {"lora_rank": 2, "lora_alpha": 5}


def reference_of(layer, x, output_gradient):
    """Compute what a LoRAConv should, from its settings and Parameters."""
    kernel, stride, dilation, padding = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    weight = numbers(layer.weight)
    if x.ndim == 3:
        # nn.Conv1d is a flat nn.Conv2d inside.
        kernel, stride, dilation, padding = kernel[1:], stride[1:], dilation[1:], padding[2:]
        weight = weight[:, :, 0]
    pads = reference_conv.padding_of(x.shape[2:], kernel, stride, dilation, layer.pad_mode, padding)
    y, found = reference_conv.lora(
        reference_conv.Convolution(x, kernel, stride, dilation, pads), weight,
        numbers(layer.bias) if layer.has_bias else None, numbers(layer.mindpet_delta_lora_a),
        numbers(layer.mindpet_delta_lora_b), 5 / 2, layer.group, output_gradient)
    by = {layer.weight: found["weight"].reshape(layer.weight.shape), layer.mindpet_delta_lora_a: found["a"],
          layer.mindpet_delta_lora_b: found["b"]}
    if layer.has_bias:
        by[layer.bias] = found["bias"]
    return y, by, found["x"]


def conv_case(name, plain, adapted, x_shape, width, **conv):
    """Return the case of 4 to 6 channels and a kernel of 3; `width` is the last axis of the output."""
    conv = {"kernel_size": 3, **conv}
    return Case("lora", name, lambda dtype: plain(4, 6, dtype=dtype, **conv),
                lambda dtype: adapted(4, 6, **LORA, dtype=dtype, **conv), LORA, x_shape, reference_of,
                rounds_in_fp16=False, head=lambda dtype: nn.Dense(x_shape[-1], x_shape[-1], dtype=dtype),
                tail=lambda dtype: nn.Dense(width, 3, dtype=dtype))


CASES = [
    conv_case("conv2d", nn.Conv2d, LoRAConv2d, (2, 4, 5, 5), 5, has_bias=True),
    conv_case("conv2d, stride, dilation, padding on each side", nn.Conv2d, LoRAConv2d, (2, 4, 7, 6), 3,
              kernel_size=(3, 2), stride=(2, 3), dilation=(2, 1), pad_mode="pad", padding=(1, 0, 2, 1)),
    conv_case("conv2d with 2 groups", nn.Conv2d, LoRAConv2d, (2, 4, 5, 5), 3, pad_mode="valid", group=2,
              has_bias=True),
    conv_case("conv1d", nn.Conv1d, LoRAConv1d, (2, 4, 7), 4, stride=2, pad_mode="pad", padding=1, has_bias=True),
    conv_case("conv3d", nn.Conv3d, LoRAConv3d, (2, 4, 3, 4, 4), 2, kernel_size=2, stride=(1, 1, 2), has_bias=True),
]
