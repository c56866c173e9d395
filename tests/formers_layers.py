"""MindFormers' layers in small: classes of the library's names and modules, with its attributes and its arithmetic."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops


def parameter(*shape: int, name: str) -> Parameter:
    return Parameter(Tensor(np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)), name=name)


class Linear(nn.Cell):
    """`mindformers.modules.layers.Linear`."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True, activation: Any = None,
                 transpose_b: bool = True, expert_num: int = 1, compute_dtype: ms.dtype = ms.float32):
        super().__init__()
        shape = (out_channels, in_channels) if transpose_b else (in_channels, out_channels)
        self.in_channels, self.out_channels, self.expert_num = in_channels, out_channels, expert_num
        self.transpose_b, self.use_gmm, self.expert_flag = transpose_b, False, expert_num > 1
        self.weight = parameter(*([expert_num] if expert_num > 1 else []), *shape, name="weight")
        self.matmul = (ops.BatchMatMul if expert_num > 1 else ops.MatMul)(transpose_b=transpose_b)
        self.bias, self.has_bias = None, has_bias
        if has_bias:
            self.bias, self.bias_add = parameter(out_channels, name="bias"), ops.Add()
        self.act_name, self.activation = activation, None if activation is None else nn.get_activation(activation)
        self.activation_flag = activation is not None
        self.param_init_type, self.dtype, self.cast = ms.float32, compute_dtype, ops.Cast()

    def construct(self, x, group_list=None):
        h = self.cast(ops.reshape(x, (-1, self.in_channels)), self.dtype)
        if self.expert_flag:
            # The library has one more axis, to which CPU's kernel does not broadcast the weight.
            h = ops.reshape(h, (self.expert_num, -1, self.in_channels))
        h = self.matmul(h, self.cast(self.weight, self.dtype))
        if self.has_bias:
            h = self.bias_add(h, self.cast(self.bias, self.dtype))
        if self.activation_flag:
            h = self.activation(h)
        return ops.reshape(self.cast(h, x.dtype), x.shape[:-1] + (self.out_channels,))


class LlamaEmbedding(nn.Cell):
    """`mindformers.models.llama.llama_layer.LlamaEmbedding`."""

    def __init__(self, vocab_table_size: int, embedding_size: int, rmsnorm_compute_2d: bool = False):
        super().__init__()
        self.vocab_table_size, self.embedding_size = vocab_table_size, embedding_size
        self.embedding_weight = parameter(vocab_table_size, embedding_size, name="embedding_weight")
        self.rmsnorm_compute_2d, self.gather = rmsnorm_compute_2d, ops.Gather()

    def construct(self, input_ids):
        if self.rmsnorm_compute_2d:
            input_ids = input_ids.reshape(-1)
        return self.gather(self.embedding_weight, input_ids, 0)


class VocabEmbedding(nn.Cell):
    """`VocabParallelEmbedding` of training_graph and `VocabEmbedding` of pynative, in one process."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.enable_embedding_tp = num_embeddings, embedding_dim, False
        self.weight = parameter(num_embeddings, embedding_dim, name="weight")

    def construct(self, input_):
        return ops.gather(self.weight, input_, 0)


class ColumnParallelLinear(nn.Cell):
    """That of training_graph: without its operators that only parallelism needs."""

    def __init__(self, input_size: int, output_size: int, bias: bool = True, skip_bias_add: bool = False,
                 transpose_b: bool = True, compute_dtype: ms.dtype = ms.float32, weight: bool = True, **sizes: int):
        super().__init__()
        self.input_size, self.output_size, self.transpose_b = input_size, output_size, transpose_b
        self.config = SimpleNamespace(**{"data_parallel_size": None, "context_parallel_size": None,
                                         "tensor_model_parallel_size": None, **sizes})
        self.skip_bias_add, self.has_bias, self.compute_dtype = skip_bias_add, bias, compute_dtype
        shape = (output_size, input_size) if transpose_b else (input_size, output_size)
        self.weight = parameter(*shape, name="weight") if weight else None
        self.bias = parameter(output_size, name="bias") if bias else None
        self.params_dtype, self.matmul = ms.float32, ops.MatMul(transpose_b=transpose_b)

    def construct(self, input_, weight=None):
        weight = ops.cast(self.weight if weight is None else weight, self.compute_dtype)
        y = self.matmul(ops.cast(ops.reshape(input_, (-1, self.input_size)), self.compute_dtype), weight)
        if self.has_bias and not self.skip_bias_add:
            y = y + ops.cast(self.bias, self.compute_dtype)
        y = ops.reshape(ops.cast(y, input_.dtype), input_.shape[:-1] + (self.output_size,))
        return y, self.bias if self.skip_bias_add else None


class RowParallelLinear(ColumnParallelLinear):
    """In one process it computes the same."""


class PynativeLinear(nn.Cell):
    """`mindformers.pynative.layers.linear.Linear`."""

    def __init__(self, input_size: int, output_size: int, bias: bool = True, compute_dtype: ms.dtype = ms.float32):
        super().__init__()
        self.input_size, self.output_size, self.has_bias = input_size, output_size, bias
        self.compute_dtype, self.params_dtype, self.skip_add_bias = compute_dtype, ms.float32, False
        self.weight = parameter(output_size, input_size, name="weight")
        self.bias = parameter(output_size, name="bias") if bias else None

    def construct(self, input_, weight=None):
        y = ops.matmul(ops.cast(input_, self.compute_dtype), ops.cast(self.weight, self.compute_dtype).T)
        if self.has_bias and not self.skip_add_bias:
            y = y + ops.cast(self.bias, self.compute_dtype)
        return ops.cast(y, input_.dtype)


Linear.__module__ = "mindformers.modules.layers"
LlamaEmbedding.__module__ = "mindformers.models.llama.llama_layer"
ColumnParallelLinear.__module__ = "mindformers.parallel_core.training_graph.tensor_parallel.layers"
RowParallelLinear.__module__ = ColumnParallelLinear.__module__
VocabEmbedding.__module__ = "mindformers.pynative.base_models.common.embeddings.vocab_embedding"
PynativeLinear.__module__, PynativeLinear.__name__ = "mindformers.pynative.layers.linear", "Linear"
