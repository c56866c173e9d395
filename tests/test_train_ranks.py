"""Data-parallel training in two processes: the numbers of one process with the same whole batch."""
from __future__ import annotations

import numpy as np
import pytest
from jobs import run_job

import mindpet_lite as mp
from mindpet_lite.train import gradient_bytes

JOB = '''
import sys

import mindspore as ms
import numpy as np
from mindspore import nn

import mindpet_lite as mp
from mindpet_lite.train import BatchSampler, GradientAccumulation, Ranks, TrainingState, init_data_parallel

ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
ranks = Ranks() if "alone" in sys.argv else init_data_parallel()
values = np.random.RandomState(0)
net = nn.SequentialCell(nn.Dense(6, 6), nn.Dense(6, 4))
for item in net.get_parameters():
    item.set_data(ms.Tensor(values.standard_normal(item.shape), ms.float32))
ms.set_seed(1)
mp.get_pet_model(net, mp.LoraConfig(3, 6, target_modules=["0", "1"]))
step = GradientAccumulation(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 0.05), 1, 0.5)
x, y = values.standard_normal((10, 6)).astype("f4"), values.standard_normal((10, 4)).astype("f4")
sampler = BatchSampler(10, 6 // ranks.size, seed=2, rank=ranks.rank, ranks=ranks.size)
for rows in sampler:
    step(ms.Tensor(x[rows]), ms.Tensor(y[rows]))
    if "dies" in sys.argv and ranks.rank == 1:
        raise ValueError("this process ends here")
    if sampler.step == 8:
        break
np.save(f"rank{ranks.rank}.npy", np.array({item.name: item.asnumpy() for item in net.trainable_params()}, dtype=object))
'''


def test_two_processes_train_as_one_with_the_same_batch(tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        done = run_job(JOB, tmp_path / name, count, *(["alone"] if count == 1 else []))
        assert done.returncode == 0, done.stdout
    one, first, second = (np.load(tmp_path / file, allow_pickle=True).item() for file in (
        "one/rank0.npy", "two/rank0.npy", "two/rank1.npy"))
    assert len(one) == 4 and list(one) == list(first) == list(second)
    for name, value in one.items():
        assert np.array_equal(first[name], second[name]), name
        np.testing.assert_allclose(first[name], value, rtol=1e-5, atol=1e-6)


def test_a_process_that_ends_ends_the_job_with_its_reason(tmp_path):
    done = run_job(JOB, tmp_path, 2, "dies")
    assert done.returncode != 0
    for text in ("ValueError: this process ends here", "Distributed job exited with exception"):
        assert text in done.stdout


def test_one_process_alone_is_told_how_to_start_several(monkeypatch):
    for name in ("MS_WORKER_NUM", "RANK_TABLE_FILE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="msrun --worker_num=2 --local_worker_num=2 --join=True script.py"):
        mp.init_data_parallel()


def test_the_gradients_of_what_trains_alone_travel():
    import mindspore as ms
    from mindspore import nn
    net = mp.get_pet_model(nn.SequentialCell(nn.Dense(6, 5)), mp.LoraConfig(3, 6, target_modules=["0"]))
    assert gradient_bytes(nn.Adam(net.trainable_params()).parameters) == (3 * 6 + 5 * 3) * 4
    assert gradient_bytes([ms.Parameter(ms.Tensor(np.zeros(7), ms.float16))]) == 14
