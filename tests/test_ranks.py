"""Several processes: what trains starts with the values of rank 0, and stays the same on all ranks."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from jobs import run_job
from mindspore import nn, ops

import mindpet_lite as mp
from mindpet_lite.graph import ranks

JOB = '''
import warnings

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.communication import get_rank, init

import mindpet_lite as mp

ms.set_context(device_target="CPU")
rank = int(__import__("os").environ["RANK_ID"])


def base(width=4):
    values = np.random.RandomState(0)
    net = nn.SequentialCell(nn.Dense(6, 6), nn.Dense(6, width))
    for item in net.get_parameters():
        item.set_data(ms.Tensor(values.standard_normal(item.shape), ms.float32))
    return net


def adapted(net, **fields):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        mp.get_pet_model(net, mp.LoraConfig(3, 6, **fields))
    return [str(item.message) for item in found]


result = {"early": adapted(base(), target_modules=["0"])}
init()
for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
    ms.set_context(mode=mode)
    ms.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True)
    net = base()
    net[1] = nn.Dense(6, 4)                        # a new head, another one on each rank
    said = adapted(net, target_modules=["0"], modules_to_save=["1"])
    start = {item.name: item.asnumpy().copy() for item in net.trainable_params()}
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Momentum(net.trainable_params(), 0.1, 0.9))
    data = np.random.RandomState(rank + 1)         # each rank has its own samples
    for _ in range(3):
        step(ms.Tensor(data.standard_normal((5, 6)), ms.float32), ms.Tensor(data.standard_normal((5, 4)), ms.float32))
    end = {item.name: item.asnumpy() for item in net.trainable_params()}
    result[mode] = {"said": said, "start": start, "end": end}

plain = base(width=4 + rank)
try:
    adapted(plain, target_modules=["1"])
except ValueError as error:
    result["refused"] = str(error), [type(cell).__name__ for cell in plain]
for kind in ("stand_alone", "semi_auto_parallel"):
    ms.reset_auto_parallel_context()
    ms.set_auto_parallel_context(parallel_mode=kind)
    same, other, half = base(), base(width=4 + rank), base()
    said = adapted(same, target_modules=["0"]), adapted(other, target_modules=["1"])
    adapted(half, target_modules=["0", "1"], param_init_type=ms.bfloat16)
    result[kind] = {"said": said, "same": same[0].mindpet_delta_lora_a.asnumpy(),
                    "half": half[1].mindpet_delta_lora_a.astype(ms.float32).asnumpy()}
np.save(f"rank{rank}.npy", np.array(result, dtype=object))
'''


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> list[dict]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("job")
    done = run_job(JOB, folder, 2)
    files = [folder / f"rank{rank}.npy" for rank in (0, 1)]
    assert all(path.exists() for path in files), done.stdout
    return [np.load(path, allow_pickle=True).item() for path in files]


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_data_parallel_training_starts_and_ends_alike_without_a_seed(job, mode):
    first, second = (rank[mode] for rank in job)
    assert list(first["start"]) == ["0.mindpet_delta_lora_a", "0.mindpet_delta_lora_b", "1.weight", "1.bias"]
    for when in ("start", "end"):
        for name, value in first[when].items():
            assert np.array_equal(value, second[when][name]), (when, name)
    assert np.any(first["start"]["0.mindpet_delta_lora_a"]) and np.any(first["start"]["1.weight"])
    assert all(np.any(first["end"][name] != value) for name, value in first["start"].items())
    assert len(first["said"]) == 1 and "all 2 processes with the values of rank 0 (4 Parameters" in first["said"][0]
    assert second["said"] == []


def test_different_layers_are_refused_where_gradients_are_averaged_and_said_elsewhere(job):
    for rank in job:
        text, kinds = rank["refused"]
        assert "adapt different layers" in text and "the net is unchanged" in text and kinds == ["Dense", "Dense"]
        for kind in ("stand_alone", "semi_auto_parallel"):
            assert len(rank[kind]["said"][1]) == 1 and "Each keeps the values" in rank[kind]["said"][1][0]


@pytest.mark.parametrize("kind", ["stand_alone", "semi_auto_parallel"])
def test_other_parallel_modes_start_alike_too(job, kind):
    for part in ("same", "half"):
        assert np.any(job[0][kind][part]) and np.array_equal(job[0][kind][part], job[1][kind][part])


def test_a_job_that_is_not_initialised_is_said(job):
    for rank in job:
        assert len(rank["early"]) == 1 and "init() was not called" in rank["early"][0]


def test_a_process_that_does_not_answer_is_an_error_and_the_net_is_unchanged(monkeypatch):
    def silent(self, x):
        raise RuntimeError("Launch kernel failed, name:Default/AllGather-op1")

    for name, value in (("get_group_size", lambda: 2), ("get_rank", lambda: 0)):
        monkeypatch.setattr(ranks, name, value)
    monkeypatch.setattr(ranks.GlobalComm, "INITED", True)
    monkeypatch.setattr(ops.AllGather, "__call__", silent)
    net = nn.SequentialCell(nn.Dense(4, 4))
    with pytest.raises(RuntimeError, match="did not answer.*the net is unchanged.*get_pet_model"):
        mp.get_pet_model(net, mp.LoraConfig(2, target_modules=["0"]))
    assert type(net[0]) is nn.Dense and net[0].weight.requires_grad
