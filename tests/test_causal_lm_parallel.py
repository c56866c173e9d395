"""A language model tuned by two processes, which share the data or the layers: the losses and the adapter of one."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from jobs import run_job
from safetensors.numpy import load_file
from tiny_decoders import CAUSAL_LM, CONFIG, write_lines, write_model

import hf_folder  # isort: skip
from common import UserError  # isort: skip
from options import Settings, check_parallel  # isort: skip

SCRIPT = "import sys\nsys.path.insert(0, {!r})\nimport finetune\nsys.exit(finetune.main({!r}))\n"
ROWS = [{"instruction": f"say {word}", "output": word * 2} for word in ("a", "bc", "def", "gh", "i", "jkl", "m", "no")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, data, and a run of one process."""
    place = tmp_path_factory.mktemp("parallel")
    write_model(place / "model", hf_folder.sizes_of(CONFIG, 2048), CONFIG)
    write_lines(place / "data" / "train.jsonl", ROWS)
    write_lines(place / "data" / "heldout.jsonl", [{"instruction": "say p", "output": "pp"}] * 2)
    run(place, "one", 1, "--batch=4", "--clip-norm=0")
    return place


def run(place: Path, name: str, count: int, *flags: str) -> str:
    """Tunes the model in a folder of its own; returns what was printed."""
    (place / f"job_{name}").mkdir()
    argv = [f"--base={place / 'model'}", f"--data={place / 'data' / 'train.jsonl'}", f"--out={place / name}",
            "--steps=4", "--rank=2", "--lr=0.01", "--answer-length=3", "--lengths", "64", "--answers=1", *flags]
    done = run_job(SCRIPT.format(str(CAUSAL_LM), argv), place / f"job_{name}", count)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def results(place: Path, name: str) -> tuple[dict[str, np.ndarray], list[float], dict[str, float]]:
    """The adapter, the losses of the steps, and what was measured."""
    rows = [json.loads(line) for line in (place / name / "log.jsonl").read_text().splitlines()]
    return (load_file(place / name / "adapter" / "adapter_model.safetensors"), [row["loss"] for row in rows],
            json.loads((place / name / "results.json").read_text()))


@pytest.mark.parametrize(("parallel", "batch"), [("data", 2), ("tensor", 4)])
def test_two_processes_tune_what_one_does(place, parallel, batch):
    two = f"two_{parallel}"
    run(place, two, 2, f"--batch={batch}", "--clip-norm=0", f"--parallel={parallel}")
    (adapter, losses, measured), (own, found, also) = results(place, "one"), results(place, two)
    assert len(losses) == 4 and losses[-1] != losses[0]
    np.testing.assert_allclose(found, losses, rtol=1e-5, atol=1e-5)
    assert adapter.keys() == own.keys() and len(own) == 2 * 2 * 4
    for key, value in own.items():
        np.testing.assert_allclose(value, adapter[key], atol=1e-5, err_msg=key)
    for name in ("heldout_loss_before", "heldout_loss_after"):
        assert also[name] == pytest.approx(measured[name], rel=1e-5)
    answers = [json.loads((place / name / "answers.json").read_text()) for name in ("one", two)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("fields", "message"), [
    ({}, "clip_norm does not go with --parallel tensor: .*--clip-norm 0"),
    ({"clip_norm": 0.0, "save_every": 2}, "save_every .*no checkpoints"),
    ({"clip_norm": 0.0, "quantize": "nf4"}, "quantize .*weights as they are")])
def test_what_does_not_go_with_parts_of_layers(fields, message):
    with pytest.raises(UserError, match=message):
        check_parallel(Settings(parallel="tensor", **fields))
    check_parallel(Settings(parallel="data", **fields, calibrate=0))


def test_processes_do_not_choose_codes_of_their_own():
    with pytest.raises(UserError, match="calibrate does not go with --parallel data: .* --calibrate 0"):
        check_parallel(Settings(parallel="data", quantize="int8"))
    check_parallel(Settings(parallel="data"))
    check_parallel(Settings(quantize="int8"))
