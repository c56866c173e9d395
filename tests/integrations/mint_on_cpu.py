"""Stand-ins for the operators of `mindspore.mint` that have no kernel on CPU; for the tests of mindone alone.

`install()` comes before mindone is imported. The functions have mint's arguments, as far as mindone's models use them.
"""
from __future__ import annotations

import importlib
import math

import mindspore as ms
import mindspore.mint.nn.functional as functional
import numpy as np
from mindspore import Tensor, mint, ops


def arange(start, end=None, step=1, *, dtype=None):
    out = ops.arange(0, start, step) if end is None else ops.arange(start, end, step)
    return out if dtype is None else out.astype(dtype)


def stack(tensors, dim=0):
    return ops.stack(tensors, dim)


def outer(a, b):
    return ops.expand_dims(a, 1) * ops.expand_dims(b, 0)


def cumsum(x, dim, dtype=None):
    return ops.cumsum(x.astype(ms.int32) if x.dtype in (ms.bool_, ms.int64) else x, dim)


def addmm(b, x, w, *, beta=1, alpha=1):
    return ops.matmul(x, w) * alpha + b * beta


def baddbmm(b, x, w, beta=1, alpha=1):
    return ops.bmm(x, w) * alpha + b * beta


def tril(x, diagonal=0):
    return x * Tensor(np.tril(np.ones(x.shape[-2:]), diagonal)).astype(x.dtype)


def triu(x, diagonal=0):
    return x * Tensor(np.triu(np.ones(x.shape[-2:]), diagonal)).astype(x.dtype)


def argmax(x, dim=None, keepdim=False):
    return ops.argmax(x, dim, keepdim)


def index_select(x, dim, index):
    return ops.gather(x, index, dim)


def norm(x, p=2, dim=None, keepdim=False, *, dtype=None):
    return ops.norm(x, p, dim, keepdim)


def randn(*size, **settings):
    return Tensor(np.random.randn(*(size[0] if isinstance(size[0], (tuple, list)) else size)), ms.float32)


def rand(*size, **settings):
    return Tensor(np.random.rand(*(size[0] if isinstance(size[0], (tuple, list)) else size)), ms.float32)


def chunk(x, chunks, dim=0):
    return ops.chunk(x, chunks, dim)


def split(x, size, dim=0):
    return ops.split(x, size, dim)


def unbind(x, dim=0):
    """In slices, because the gradient has no kernel."""
    dim = dim % x.ndim
    return tuple(x[(slice(None),) * dim + (place,)] for place in range(x.shape[dim]))


def repeat_interleave(x, repeats, dim=None, output_size=None):
    if dim is None:
        x, dim = x.reshape(-1), 0
    dim, shape = dim % x.ndim, x.shape
    y = ops.tile(ops.expand_dims(x, dim + 1), (1,) * (dim + 1) + (repeats,) + (1,) * (x.ndim - dim - 1))
    return y.reshape(shape[:dim] + (shape[dim] * repeats,) + shape[dim + 1:])


def einsum(equation, *parts):
    before, after = equation.replace(" ", "").split("->")
    if len(parts) == 1:
        return ops.transpose(parts[0], tuple(before.index(item) for item in after))
    first, second = before.split(",")
    if not set(first.replace("...", "")) & set(second.replace("...", "")):
        return ops.expand_dims(parts[0], -1) * parts[1]
    return ops.einsum(equation, *parts)


def gelu(x, *, approximate="none"):
    if approximate == "none":
        return 0.5 * x * (1 + ops.erf(x / math.sqrt(2.0)))
    return 0.5 * x * (1 + ops.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    off = x - x.mean(-1, keep_dims=True)
    y = off * ops.rsqrt((off * off).mean(-1, keep_dims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    shape, along = x.shape, (1, -1) + (1,) * (len(x.shape) - 2)
    y = x.reshape(shape[0], num_groups, -1)
    off = y - y.mean(-1, keep_dims=True)
    y = (off * ops.rsqrt((off * off).mean(-1, keep_dims=True) + eps)).reshape(shape)
    y = y if weight is None else y * weight.reshape(along)
    return y if bias is None else y + bias.reshape(along)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    stride, dilation, pads = ((item, item) if isinstance(item, int) else tuple(item)
                              for item in (stride, dilation, padding))
    y = ops.Conv2D(weight.shape[0], weight.shape[2:], pad_mode="pad", pad=(pads[0], pads[0], pads[1], pads[1]),
                   stride=stride, dilation=dilation, group=groups)(input, weight)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def embedding(ids, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False):
    return ops.gather(weight, ids, 0)


def pad(x, pad, mode="constant", value=0):
    return ops.pad(x, tuple(pad), mode, value)


def dropout(x, p=0.5, training=True, inplace=False):
    return ops.dropout(x, p, training)


def interpolate(input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None):
    if size is None:
        factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
        size = (int(input.shape[2] * factors[0]), int(input.shape[3] * factors[1]))
    return ops.ResizeNearestNeighbor(tuple(size))(input)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
              backend=None):
    """Without masks, as Flux calls it; in the type of the query, where mindone's own rounds to float16."""
    scores = ops.matmul(query, key.swapaxes(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return ops.matmul(ops.softmax(scores, -1), value)


def clone(x):
    return x.copy()


def rms_norm(x, gamma, epsilon=1e-6):
    y = x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + epsilon)
    return y * gamma, y


def _call_layer_norm(self, input):
    return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _call_embedding(self, input):
    return ops.gather(self.weight, input, 0)


def _call_gelu(self, input):
    return gelu(input, approximate=getattr(self, "approximate", "none"))


def _call_dropout(self, x):
    return ops.dropout(x, self.p, self.training) if self.training and self.p > 0 else x


def install() -> None:
    """Put the stand-ins in the places of mint's operators."""
    for function in (arange, stack, outer, cumsum, addmm, baddbmm, tril, triu, argmax, index_select, norm, rand, randn,
                     chunk, split, unbind, repeat_interleave, einsum):
        setattr(mint, function.__name__, function)
    for function in (gelu, layer_norm, group_norm, conv2d, embedding, pad, dropout, interpolate):
        setattr(functional, function.__name__, function)
        if hasattr(mint.nn, function.__name__):
            setattr(mint.nn, function.__name__, function)
    layers = importlib.import_module("mindspore.mint.nn.layer.conv")
    layers.conv2d_ext_op = layers.conv2d_padding_op = conv2d
    mint.nn.LayerNorm.construct, mint.nn.Embedding.construct = _call_layer_norm, _call_embedding
    mint.nn.GELU.construct, mint.nn.Dropout.construct = _call_gelu, _call_dropout
    ops.rms_norm = rms_norm
    ms.Tensor.repeat_interleave, ms.Tensor.clone = repeat_interleave, clone


def mend_mindone() -> None:
    """Let mindone 0.5's initialisers pass over what MindSpore's `Parameter.data` is not; replace its attention."""
    importlib.import_module("mindone.diffusers.models.attention_dispatch").scaled_dot_product_attention = attention
    utils = importlib.import_module("mindone.models.utils")
    for name in [name for name in vars(utils) if name.endswith("_") and not name.startswith("_")]:
        setattr(utils, name, _forgiving(getattr(utils, name)))


def _forgiving(function):
    def call(tensor, *args, **settings):
        try:
            return function(tensor, *args, **settings)
        except AttributeError:
            return tensor
    return call
