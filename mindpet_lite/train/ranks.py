"""Data-parallel training in several processes: who this process is, and what travels between them."""
from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import mindspore
from mindspore import Parameter
from mindspore.communication import get_group_size, get_rank, init

_STARTED_BY = ("MS_WORKER_NUM", "RANK_TABLE_FILE", "OMPI_COMM_WORLD_SIZE")


class Ranks(NamedTuple):
    """One process of a job.

    Args:
        rank: number of the process, from 0. Default: 0.
        size: how many processes there are; positive. Default: 1.

    Examples:
        >>> import mindpet_lite as mp
        >>> mp.Ranks()
        Ranks(rank=0, size=1)
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


def init_data_parallel() -> Ranks:
    """Join the processes of a job for data-parallel training; call it before the net is made.

    Every process has the whole net and its share of each batch (see `BatchSampler`); the gradients of what
    trains, and nothing else, are averaged over the processes. `GradientAccumulation` and MindSpore's own steps
    do that by themselves then. `get_pet_model` and `load_adapter` give all processes the values of rank 0.

    Returns:
        The number of this process, and how many there are.

    Raises:
        RuntimeError: the script was not started as one of several processes, or the others did not come.

    Examples:
        >>> import mindpet_lite as mp
        >>> ranks = mp.init_data_parallel()  # by msrun --worker_num=2 train.py  # doctest: +SKIP
        >>> sampler = mp.BatchSampler(1000, 16, rank=ranks.rank, ranks=ranks.size)  # doctest: +SKIP
    """
    if not any(os.environ.get(name) for name in _STARTED_BY):
        raise RuntimeError("Data-parallel training needs several processes, and this one was started alone: start it "
                           "with msrun, such as msrun --worker_num=2 --local_worker_num=2 --join=True script.py.")
    init()
    ranks = Ranks(get_rank(), get_group_size())
    mindspore.set_auto_parallel_context(parallel_mode=mindspore.ParallelMode.DATA_PARALLEL, gradients_mean=True,
                                        device_num=ranks.size)
    return ranks


def gradient_bytes(parameters: Iterable[Parameter]) -> int:
    """Return how many bytes of gradients each process sends for one update of these Parameters.

    Args:
        parameters: those of the optimizer, such as ``net.trainable_params()``.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> mp.gradient_bytes(net.trainable_params())
        96
    """
    return sum(parameter.size * parameter.itemsize for parameter in parameters)
