"""Several processes: each its share of the data, or a part of every layer."""

import numpy as np
import operators
from common import UserError, explained
from decoder import Decoder
from mindspore import Tensor, ops
from mindspore.communication import get_group_size, get_rank, init
from options import Settings

from mindpet_lite import init_data_parallel, split_linear
from mindpet_lite.train import Ranks

COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]


def join(settings: Settings) -> Ranks:
    """Joins the processes that --parallel asks for.

    Raises:
        UserError: The script was not started as one of several.
    """
    if settings.parallel == "none":
        return Ranks()
    with explained(f"--parallel {settings.parallel}", RuntimeError):
        if settings.parallel == "data":
            return init_data_parallel()
        init()
        return Ranks(get_rank(), get_group_size())


def total(ranks: Ranks, *numbers: float) -> list[float]:
    """The sums of numbers over all processes that share the data."""
    if ranks.size == 1:
        return list(numbers)
    return ops.AllReduce()(Tensor(np.array(numbers, np.float32))).asnumpy().tolist()


def split(net: Decoder) -> None:
    """Gives this process its part of every layer: some heads of the attention, some of the MLP's width.

    Raises:
        UserError: The heads or the width cannot be shared evenly.
    """
    count, sizes = get_group_size(), net.sizes
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(sizes, name) % count:
            raise UserError(f"--parallel tensor: {count} processes cannot share {name} = {getattr(sizes, name)} evenly")
    with explained("--parallel tensor", ValueError, RuntimeError):
        split_linear(net, COLUMN, ROW)
    heads, groups = sizes.num_attention_heads // count, sizes.num_key_value_heads // count
    for part in (net.model, *(layer.self_attn for layer in net.model.layers)):
        part.heads, part.groups, part.attend = heads, groups, operators.attend(heads, groups)
        part.query_heads, part.key_heads = operators.by_head(heads, part.d), operators.by_head(groups, part.d)
