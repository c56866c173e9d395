"""Checkpoints of training: a run that was stopped, or killed, ends with the numbers of one that was not."""
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, amp, nn
from nets import Attention, config, inputs

import mindpet_lite as mp
from mindpet_lite.train import BatchSampler, GradientAccumulation, TrainingState

DATA = inputs(12, 3, 6).asnumpy()


class Loss(nn.Cell):
    """The mean square of the net's output."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, x):
        return (self.net(x) ** 2).mean()


def base() -> nn.Cell:
    """The same net each time, without the dropout, of which a state is not known."""
    ms.set_seed(0)
    net = Attention()
    net.to_out = nn.SequentialCell(net.to_out[0])
    return net


class Run:
    """A run with all that has a state: accumulation, averages, a loss scale, a schedule, random numbers."""

    def __init__(self, folder: Path, **options) -> None:
        np.random.seed(1)
        random.seed(2)
        self.net = mp.get_pet_model(base(), config(["to_q", "blocks.1.0"], modules_to_save=["to_out"]))
        optimizer = nn.AdamWeightDecay(self.net.trainable_params(), nn.cosine_decay_lr(0.0, 0.01, 20, 5, 4))
        self.ema = mp.DeltaEMA(self.net, 0.9)
        self.scaler = amp.DynamicLossScaler(64.0, 2, 3)
        self.step = GradientAccumulation(Loss(self.net), optimizer, 2, 1.0, self.scaler, self.ema)
        self.sampler = BatchSampler(len(DATA), 4, seed=7)
        self.state = TrainingState(folder, self.net, self.step, self.sampler, **options)

    def train(self, last: int) -> None:
        for rows in self.sampler:
            noise = np.random.standard_normal(DATA[rows].shape).astype(np.float32) * random.random()
            self.step(Tensor(DATA[rows] + noise))
            if self.sampler.step == last:
                return

    def numbers(self) -> dict[str, bytes]:
        return {name: item.asnumpy().tobytes() for name, item in self.state._parameters().items()} | {
            "numpy": np.random.random(3).tobytes(), "python": repr(random.random()).encode()}


# 5 is in the middle of a window of two.
@pytest.mark.parametrize("stop", [4, 5])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(stop, mode, tmp_path):
    whole = Run(tmp_path / "whole")
    start = whole.numbers()
    whole = Run(tmp_path / "whole")
    whole.train(9)
    expected = whole.numbers()
    first = Run(tmp_path / "run")
    first.train(stop)
    assert first.state.save() == tmp_path / "run" / f"checkpoint-{stop}"
    again = Run(tmp_path / "run")
    np.random.seed(9)
    assert again.state.resume() == stop
    again.train(9)
    assert again.numbers() == expected
    assert {"step.ema.updates", "loss_scaler.0.scale_value", "step.count", "step.optimizer.global_step",
            "net.to_q.mindpet_delta_lora_a", "net.to_out.0.weight"} <= expected.keys()
    changed = {name for name in expected if start[name] != expected[name]}
    assert {"loss_scaler.0.scale_value", "net.to_out.0.weight", "numpy", "python"} <= changed
    assert not any(name.startswith("net.to_k") for name in expected)


def test_a_checkpoint_is_an_adapter(tmp_path):
    run = Run(tmp_path)
    run.train(3)
    run.state.save()
    fresh = base()
    mp.load_adapter(fresh, tmp_path / "checkpoint-3")
    assert np.array_equal(fresh(inputs(2, 3, 6)).asnumpy(), run.net(inputs(2, 3, 6)).asnumpy())


def test_the_newest_are_kept_and_the_newest_is_read(tmp_path):
    run = Run(tmp_path, keep=2)
    assert run.state.checkpoints() == [] and run.state.resume() == 0
    (tmp_path / "checkpoint-99").mkdir()                # a folder of somebody else's
    for last in (8, 9, 10):
        run.train(last)
        run.state.save()
    run.state.save()                                    # once more at the same step: it stands there already
    assert [path.name for path in run.state.checkpoints()] == ["checkpoint-10", "checkpoint-9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9", "checkpoint-99"]
    assert Run(tmp_path).state.resume() == 10


def test_another_run_or_a_damaged_file_is_refused_and_nothing_changed(tmp_path):
    run = Run(tmp_path, settings={"rate": 0.1, "batch": 4})
    run.train(2)
    folder = run.state.save()
    other = Run(tmp_path, settings={"rate": 0.2, "batch": 4})
    before = {name: item.asnumpy().tobytes() for name, item in other.state._parameters().items()}
    with pytest.raises(ValueError, match="checkpoint-2 is of another run: rate was 0.1 and is 0.2. Give the settings"):
        other.state.resume()
    plain = nn.AdamWeightDecay(other.net.trainable_params())
    with pytest.raises(ValueError, match="step.adam_m.to_q.mindpet_delta_lora_a is missing in it.* and 41 more"):
        TrainingState(tmp_path, other.net, plain, other.sampler, settings={"rate": 0.1, "batch": 4}).resume()
    data = (folder / "training_state.safetensors").read_bytes()
    (folder / "training_state.safetensors").write_bytes(data[:-9])
    same = Run(tmp_path, settings={"rate": 0.1, "batch": 4})
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        same.state.resume()
    for one in (other, same):
        assert before == {name: item.asnumpy().tobytes() for name, item in one.state._parameters().items()}
        assert one.sampler.step == 0


def test_what_dropout_cannot_promise_is_said(tmp_path):
    run = Run(tmp_path)
    run.net.dropout = nn.Dropout(p=0.5)
    run.train(1)
    run.state.save()
    with pytest.warns(UserWarning, match=r"other dropout masks than it would have had \(dropout\)"):
        run.state.resume()


def test_a_net_in_which_nothing_trains_is_refused(tmp_path):
    net = base()
    mp.graph.freeze_modules(net, include=["*"])
    with pytest.raises(ValueError, match="Nothing in the net trains"):
        TrainingState(tmp_path, net, nn.SGD([ms.Parameter(Tensor([1.0]))]), BatchSampler(2, 1))


SCRIPT = """
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import mindpet_lite as mp
from mindpet_lite.train import BatchSampler, Interrupts, TrainingState

folder, last = sys.argv[1], int(sys.argv[2])
ms.set_context(mode=ms.GRAPH_MODE)
ms.set_seed(0)
values = np.random.default_rng(0)
net = nn.SequentialCell(nn.Dense(6, 6), nn.Dense(6, 6))
for item in net.get_parameters():
    item.set_data(Tensor(values.standard_normal(item.shape), ms.float32))
mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0", "1"]))
step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 0.01))
data = values.standard_normal((12, 6)).astype(np.float32)
sampler = BatchSampler(12, 4)
state = TrainingState(folder, net, step, sampler)
state.resume()
with Interrupts() as interrupts:
    for rows in sampler if sampler.step < last else ():
        step(Tensor(data[rows]), Tensor(data[rows][:, ::-1].copy()))
        print(sampler.step, flush=True)
        stopped = interrupts.number
        if sampler.step % 20 == 0 or stopped:
            state.save()
        if stopped or sampler.step == last:
            break
mp.save_adapter(net, folder + "/adapter")
sys.exit(interrupts.exit_code)
"""


def start(folder: Path, last: int, cwd: Path) -> subprocess.Popen:
    (cwd / "train.py").write_text(SCRIPT)
    return subprocess.Popen([sys.executable, "train.py", str(folder), str(last)], cwd=cwd, stdout=subprocess.PIPE,
                            text=True)


def stop_at(process: subprocess.Popen, step: int, number: int) -> int:
    """Send a signal when a step was printed; return the exit code."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(step):
            os.kill(process.pid, number)
            break
    process.stdout.read()
    return process.wait()


def test_killed_twice_and_interrupted_twice_a_run_ends_with_the_same_bytes(tmp_path):
    whole = start(tmp_path / "whole", 600, tmp_path)
    assert whole.wait() == 0
    folder = tmp_path / "run"
    assert stop_at(start(folder, 600, tmp_path), 55, signal.SIGKILL) == -signal.SIGKILL
    # Steps of a millisecond are over before MindSpore's handler, which makes a SIGTERM of it, is replaced.
    assert stop_at(start(folder, 600, tmp_path), 142, signal.SIGINT) in (130, 143)
    assert stop_at(start(folder, 600, tmp_path), 301, signal.SIGTERM) == 143
    stopped = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert stopped >= 301
    process = start(folder, 600, tmp_path)
    assert stop_at(process, 455, signal.SIGKILL) == -signal.SIGKILL
    assert start(folder, 600, tmp_path).wait() == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json",
                 "checkpoint-600/training_state.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "checkpoint-580", "checkpoint-600"]
