"""A small plain layer of each kind of host, and the settings with which each method is put on it.

A new host is a line in `LAYERS`, a new method a line in `SETTINGS`: `test_methods.py` runs every law on every pair.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import formers_layers
import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn
from nets import inputs

import mindpet_lite as mp
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.adapted import Reweighed
from mindpet_lite.delta.hosts import QUANTISED
from mindpet_lite.delta.hosts.base import Host
from mindpet_lite.delta.hosts.conv import (
    Conv1dHost,
    Conv2dHost,
    Conv3dHost,
    MintConv1dHost,
    MintConv2dHost,
    MintConv3dHost,
)
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.hosts.embedding import EmbeddingHost, MintEmbeddingHost
from mindpet_lite.delta.hosts.int8 import Int8Dense
from mindpet_lite.delta.hosts.linear import LinearHost
from mindpet_lite.delta.hosts.mindformers import (
    FormersEmbedding,
    FormersLinear,
    FormersParallelLinear,
    FormersPynativeLinear,
    FormersVocabEmbedding,
)
from mindpet_lite.delta.hosts.nf4 import NF4Dense
from mindpet_lite.delta.hosts.q8_0 import Q8Dense
from mindpet_lite.delta.hosts.transposed import Conv1D, TransposedHost

IDS = Tensor(np.array([[0, 5, 2], [6, 1, 5]], np.int32))
# By the kind of host: what makes the layer, and its input. Inputs and outputs are divisible by 4.
LAYERS: dict[type[Host], tuple[Callable[[], nn.Cell], Tensor]] = {
    DenseHost: (lambda: nn.Dense(8, 4, activation="tanh"), inputs(2, 3, 8)),
    LinearHost: (lambda: mint.nn.Linear(8, 4), inputs(2, 3, 8)),
    Conv1dHost: (lambda: nn.Conv1d(8, 4, 3, has_bias=True), inputs(2, 8, 5)),
    Conv2dHost: (lambda: nn.Conv2d(8, 4, 3, stride=2, pad_mode="pad", padding=1, has_bias=True), inputs(2, 8, 5, 4)),
    Conv3dHost: (lambda: nn.Conv3d(8, 4, 2, has_bias=True), inputs(1, 8, 3, 3, 2)),
    EmbeddingHost: (lambda: nn.Embedding(8, 4), IDS),
    TransposedHost: (lambda: Conv1D(4, 8), inputs(2, 3, 8)),
    FormersLinear: (lambda: formers_layers.Linear(8, 4, activation="sigmoid", transpose_b=False), inputs(2, 3, 8)),
    FormersEmbedding: (lambda: formers_layers.LlamaEmbedding(8, 4), IDS),
    # Of quantised layers what they are made of: `plain_net` quantises it.
    Int8Dense: (lambda: nn.Dense(8, 4, activation="tanh"), inputs(2, 3, 8)),
    Q8Dense: (lambda: mint.nn.Linear(32, 4), inputs(2, 3, 32)),
    NF4Dense: (lambda: nn.Dense(8, 4, activation="tanh"), inputs(2, 3, 8)),
}
# CPU has no kernels for them; `test_lora_mint.py` runs them on stand-ins.
WITHOUT_KERNELS = (MintConv1dHost, MintConv2dHost, MintConv3dHost)
# As kinds that are there, but for what `test_mindformers_layers.py` tests.
ELSEWHERE = (FormersParallelLinear, FormersPynativeLinear, FormersVocabEmbedding)
# CPU has a kernel in graph mode alone.
IN_GRAPHS_ALONE: dict[type[Host], tuple[Callable[[], nn.Cell], Tensor]] = {
    MintEmbeddingHost: (lambda: mint.nn.Embedding(8, 4), IDS),
}

# By the method: what its config needs besides target_modules, one entry for each way of computing.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "hira": ({"r": 2},),
    "hra": ({"r": 4}, {"r": 3, "apply_GS": True}),
    "ia3": ({}, {"feedforward_modules": ["0"]}),
    "oft": ({"oft_block_size": 4}, {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
            {"oft_block_size": 2, "block_share": True, "coft": True, "eps": 100.0, "use_cayley_neumann": False}),
    "boft": ({"boft_block_size": 4}, {"boft_block_size": 2, "boft_n_butterfly_factor": 3}),
    "loha": ({"r": 2, "alpha": 4}, {"r": 2, "alpha": 3, "use_effective_conv2d": True}),
    # Inputs and outputs are cut into 2 x 4 and 2 x 2, or with factor 1 into 1 x 8 and 1 x 4, whose half is above r.
    "lokr": ({"r": 4, "alpha": 8}, {"r": 3, "alpha": 2, "decompose_factor": 1},
             {"r": 1, "alpha": 2, "decompose_factor": 1, "use_effective_conv2d": True},
             {"r": 1, "alpha": 2, "decompose_factor": 4, "decompose_both": True, "init_weights": "lycoris"}),
    "adalora": ({"total_step": 100, "init_r": 4, "target_r": 2},
                {"total_step": 100, "init_r": 3, "target_r": 3, "lora_alpha": 5, "_kept": "101"}),
    "vera": ({"r": 3}, {"r": 6, "d_initial": -0.4, "projection_prng_key": 7, "save_projection": False}),
}
# By the method and the entry: how far of its largest output a layer starts from its base, where the method has no start
# that is exact; None where it has none at all.
STARTS: dict[tuple[str, int], float | None] = {
    ("hra", 0): 1e-6,
    # An odd number of reflections, or orthogonal ones, are never none together.
    ("hra", 1): None,
}


def off_bound(method: str, host: type[Host]) -> float:
    """Return how far of its largest output a layer that is switched off, or has not trained, may be from its base."""
    # The base of int8 multiplies outputs with the scales; a method that makes a new weight, the weight: it rounds else.
    return 1e-6 if host is Int8Dense and issubclass(METHODS[method].layer, Reweighed) else 0.0


class Net(nn.Cell):
    """One layer below a net, so that it has a path and a place to be put into."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.box = nn.SequentialCell(layer)

    def construct(self, x):
        """Return what the layer makes of `x`."""
        return self.box(x)


def plain_net(host: type[Host], seed: int = 0) -> Net:
    """Return a net with a layer of the kind, of values that come from the seed and are large enough to tell apart."""
    net, rng = Net({**LAYERS, **IN_GRAPHS_ALONE}[host][0]()), np.random.default_rng(seed)
    for item in net.get_parameters():
        item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)).astype(ms.float32))
    if host in QUANTISED.values():
        mp.quantize_base(net, host.quantised_kind, ["box.0"])
    return net


def full_net(host: type[Host], seed: int = 0) -> Net:
    """Return the same net with a layer of the full type, whose weight a new one can be written into."""
    net = plain_net(host, seed)
    return mp.dequantize_base(net) if host in QUANTISED.values() else net
