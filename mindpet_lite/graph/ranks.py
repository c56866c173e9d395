"""Parameters that start alike in all processes of a distributed job."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.communication import GlobalComm, get_group_size, get_rank

from mindpet_lite.arguments import warn_user
from mindpet_lite.delta.parts import put
from mindpet_lite.delta.values import to_numpy


def same_on_all_ranks(parameters: Sequence[Parameter]) -> None:
    """Give every process the values of rank 0; do nothing where there is one process.

    Each process draws its own start of a new Parameter. Data-parallel training averages gradients, not values, so
    different starts would stay different. All processes must call this; rank 0 warns that it happened.

    Where the processes hold Parameters of other names, shapes or types, as with layers placed by hand, no value can
    be shared: in data-parallel mode that is an error, else every process warns and keeps its own values.

    Raises:
        ValueError: in data-parallel mode the processes hold different Parameters. Nothing is changed.
        RuntimeError: another process did not answer. Nothing is changed.
    """
    size = get_group_size()
    if size == 1:
        return
    if not GlobalComm.INITED:
        warn_user(f"This is one of {size} processes, but mindspore.communication.init() was not called, so each "
                  f"process draws its own start of the new Parameters. Call init() before the net is adapted.")
        return
    rank = get_rank()
    if not _same_layout(parameters, size):
        text = (f"The {size} processes adapt different layers: the names, shapes or types of what trains are not the "
                f"same on all of them.")
        if mindspore.get_auto_parallel_context("parallel_mode") == mindspore.ParallelMode.DATA_PARALLEL:
            raise ValueError(f"{text} Data-parallel training needs the same net and config on every process; the net "
                             f"is unchanged.")
        warn_user(f"{text} Each keeps the values that it drew: where processes share a layer, give them one seed.")
        return
    values = [to_numpy(parameter) for parameter in parameters]
    data = b"".join(value.tobytes() for value in values)
    # int32 is what all backends can send.
    sent = np.frombuffer(data + bytes(-len(data) % 4), np.int32)
    received = _collective(lambda: ops.Broadcast(0)((Tensor(sent),))[0]).tobytes() if data else b""
    if rank == 0:
        warn_user(f"What trains starts on all {size} processes with the values of rank 0 ({len(parameters)} "
                  f"Parameters were broadcast).")
        return
    start = 0
    for parameter, value in zip(parameters, values):
        own = np.frombuffer(received[start:start + value.nbytes], value.dtype).reshape(value.shape)
        put(parameter, Tensor(own.copy()).astype(parameter.dtype))
        start += value.nbytes


def _same_layout(parameters: Sequence[Parameter], size: int) -> bool:
    """Tell whether all processes hold Parameters of the same names, shapes and types, in one order."""
    layout = repr([(item.name, tuple(item.shape), str(item.dtype)) for item in parameters])
    digest = np.frombuffer(hashlib.sha256(layout.encode()).digest(), np.int32)
    gathered = _collective(lambda: ops.AllGather()(Tensor(digest))).reshape(size, -1)
    return bool((gathered == gathered[0]).all())


def _collective(operator: Callable[[], Tensor]) -> np.ndarray:
    """Return what an operator over all processes gives."""
    try:
        # PyNative mode raises only where the value is asked for.
        return operator().asnumpy()
    except RuntimeError as error:
        raise RuntimeError("Another process did not answer when the start of the new Parameters was to be made the "
                           "same on all of them; the net is unchanged. Every process of the job must call "
                           "get_pet_model, at about the same time and with the same config: see the other processes' "
                           "logs for an error there.") from error
