"""Fine-tuning a language model from the command line: data, YAML, results, going on, and what users get wrong."""
from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import reference_decoder as reference
import yaml
from safetensors.numpy import load_file
from tiny_decoders import CAUSAL_LM, CONFIG, write_lines, write_model

import hf_folder  # isort: skip
import instructions  # isort: skip
import manner  # isort: skip
import options  # isort: skip
from bases import load_base  # isort: skip
from batches import Batches, bucket, drawn  # isort: skip
from common import Parser, UserError  # isort: skip
from decoder import Decoder  # isort: skip
from targets import check_sizes, config_for  # isort: skip

# Another example has a script of this name.
SPEC = importlib.util.spec_from_file_location("causal_lm_finetune", CAUSAL_LM / "finetune.py")
finetune = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(finetune)

SIZES = hf_folder.sizes_of(CONFIG, 2048)
WQ = ".*wq|.*wk|.*wv|.*wo"
PET = {"pet_type": "lora", "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": WQ}
# As MindFormers writes it, with much that means nothing here.
YAML = {"seed": 3, "trainer": {"type": "CausalLanguageModelingTrainer"}, "context": {"mode": 0},
        "runner_config": {"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "sink_mode": True},
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "learning_rate": 0.01},
        "lr_schedule": {"type": "CosineWithWarmUpLR", "lr_end": 0.0, "warmup_ratio": 0.1},
        "model": {"arch": {"type": "LlamaForCausalLM"}, "model_config": {
            "type": "LlamaConfig", "num_layers": 2, "hidden_size": 16, "seq_length": 64, "pet_config": PET}}}
ROWS = [{"instruction": f"say {word}", "output": word * 2} for word in ("a", "bc", "def", "gh", "i")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, data, a YAML file, and a run of six steps with a checkpoint after four."""
    place = tmp_path_factory.mktemp("causal_lm")
    write_model(place / "model", SIZES, CONFIG)
    bad = ['{"instruction": "cut', {"instruction": "empty", "output": " "},
           {"instruction": "long", "output": "x" * 99}, ["no object"],
           {"messages": [{"role": "user", "content": "no answer"}]}, {"messages": "text"},
           {"instruction": "number", "output": 7}, {"messages": [{"role": "robot", "content": "?"}]}]
    chat = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"},
                         {"role": "assistant", "content": "ho"}]}
    write_lines(place / "data" / "train.jsonl", [*ROWS, *bad, chat])
    write_lines(place / "data" / "heldout.jsonl", [
        *[{"instruction": "say", "input": "j", "output": "aa"}] * 3, {"instruction": "long" * 99, "output": "aa"}])
    (place / "tune.yaml").write_text(yaml.safe_dump(YAML))
    before = ms.get_context("mode")
    assert tune(place, "whole", "--steps", "6", "--save-every", "4") == 0
    ms.set_context(mode=before)
    return place


def tune(place: Path, out: str, *flags: str) -> int:
    return finetune.main(["--config", str(place / "tune.yaml"), "--base", str(place / "model"), "--data",
                          str(place / "data" / "train.jsonl"), "--out", str(place / out), "--answer-length", "3",
                          *flags])


def log_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def loss_of(place: Path, weights: dict[str, np.ndarray]) -> float:
    """The loss on the held-out samples as the papers have it, in float64."""
    samples, _ = instructions.read_samples(place / "data" / "heldout.jsonl")
    ids, marks = load_base(place / "model").chat.tokens(samples[0].messages)
    return reference.answer_loss(np.array([ids]), np.where([marks], [ids], -100), weights, SIZES)


def test_a_run_leaves_its_results(place):
    out = place / "whole"
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert {path.rpartition(".")[2] for path in config["target_modules"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(adapter_of(out)) == 2 * 2 * 4
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 6
    weights = load_file(place / "model" / "model.safetensors")
    assert results["heldout_loss_before"] == pytest.approx(loss_of(place, weights), rel=1e-5)
    for name, value in adapter_of(out).items():
        if ".lora_A." in name:
            base = name.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[base] = weights[base] + 4 / 2 * adapter_of(out)[name.replace("_A", "_B")] @ value
    assert results["heldout_loss_after"] == pytest.approx(loss_of(place, weights), rel=1e-5)
    assert abs(results["heldout_loss_after"] - results["heldout_loss_before"]) > 1e-2
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4, 5, 6]
    rates = [row["rate"] for row in log_of(out)]
    assert rates[0] == rates[1] == pytest.approx(0.01) and rates[4] == rates[5] < rates[2]
    answers = json.loads((out / "answers.json").read_text())
    assert [row["prompt"] for row in answers] == ["say\n\nj"] * 3 and answers[0]["expected"] == "aa"
    page = (out / "report.html").read_text()
    parser = Parser("")
    options.add_flags(parser)
    again = options.read(parser.parse_args(["--config", str(out / "settings.yaml")]))
    assert again == options.read(parser.parse_args([
        "--config", str(place / "tune.yaml"), "--base", str(place / "model"), "--data",
        str(place / "data" / "train.jsonl"), "--out", str(out), "--answer-length", "3", "--steps", "6", "--save-every",
        "4"]))
    assert page.count("<img") == 1 and "heldout_loss_after" in page and "say\n\nj" in page


def test_what_is_left_out_is_counted_and_named(place, capfd):
    assert tune(place, "whole", "--overwrite", "--steps", "1", "--resume") == 2
    capfd.readouterr()
    assert tune(place, "none", "--steps", "1", "--max-length", "12") == 2
    text = capfd.readouterr().err
    assert "not a single sample can be used" in text and "the limit is 12" in text
    samples, skipped = instructions.read_samples(place / "data" / "train.jsonl")
    assert len(samples) == 7 and samples[-1].messages[0] == {"role": "system", "content": "S"}
    expected = {6: "is not valid JSON", 7: "an answer is empty", 9: "has neither instruction and output nor messages",
                10: "the last message is no answer", 11: "messages is no list", 12: "output is no text",
                13: "message 1 must have a role"}
    assert len(skipped) == len(expected)
    for message, (line, reason) in zip(skipped, expected.items()):
        assert message.startswith(f"train.jsonl line {line}: ") and reason in message


def test_a_run_goes_on_bit_for_bit(place, capfd):
    shutil.copytree(place / "whole", place / "again")
    shutil.rmtree(place / "again" / "adapter")
    ms.set_seed(99)
    np.random.seed(99)
    assert tune(place, "again", "--steps", "6", "--save-every", "4", "--resume", "--answers", "0") == 0
    out = capfd.readouterr().out
    assert "going on after step 4" in out and "8 left out" in out and "1 left out" in out
    named = out.partition("not used here: ")[2].partition("\n")[0]
    assert set(named.split(", ")) == {"trainer", "context", "runner_config.sink_mode", "optimizer.betas", "model.arch",
                                      "model.model_config.type"}
    assert log_of(place / "again") == log_of(place / "whole")
    found, expected = adapter_of(place / "again"), adapter_of(place / "whole")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert tune(place, "again", "--steps", "6", "--resume", "--rank", "3") == 2
    assert "is of another run" in capfd.readouterr().err


def test_a_base_in_few_bits_goes_on_bit_for_bit(place):
    """With codes that samples choose. Of a base of random weights four bits change the loss by some hundredths."""
    flags = ("--steps", "3", "--answers", "0", "--quantize", "nf4")
    for name, more in (("chosen", ("--save-every", "2")), ("nearest", ("--calibrate", "0"))):
        assert tune(place, name, *flags, *more) == 0
    whole, chosen, nearest = (json.loads((place / name / "results.json").read_text())["heldout_loss_before"]
                              for name in ("whole", "chosen", "nearest"))
    assert chosen != nearest and [chosen, nearest] == [pytest.approx(whole, rel=0.08)] * 2
    expected = adapter_of(place / "chosen")
    assert tune(place, "chosen", *flags, "--save-every", "2", "--resume") == 0
    for name, value in adapter_of(place / "chosen").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_finished_run_is_overwritten_and_nothing_else(place, capfd):
    shutil.copytree(place / "whole", place / "over")
    assert tune(place, "over", "--steps", "1") == 2
    assert "give --resume to go on, --overwrite" in capfd.readouterr().err
    assert tune(place, "over", "--steps", "1", "--overwrite") == 0
    assert [row["step"] for row in log_of(place / "over")] == [1]
    (place / "over" / "mine.txt").write_text("mine")
    assert tune(place, "over", "--steps", "1", "--overwrite") == 2
    assert "holds mine.txt" in capfd.readouterr().err


def test_samples_are_drawn_with_a_mask_of_what_they_are():
    # The last goes on after its answer.
    short = bucket(4, [([1, 2, 3, 4], np.array([1, 2])), ([5, 6, 7], np.array([1])), ([8, 9], np.array([0]))])
    long = bucket(6, [([10, 11, 12, 13, 77, 78], np.array([2]))])
    first, second, third = drawn([short, long], 99, 2, 0)
    np.testing.assert_array_equal(first["ids"], [[1, 2, 3, 4], [5, 6, 7, 0]])
    np.testing.assert_array_equal(first["attention_mask"], [[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(second["attention_mask"], [[1, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(second["ids"][0], [8, 9, 0, 0])
    np.testing.assert_array_equal(third["ids"][0], [10, 11, 12, 13, 77, 78])
    np.testing.assert_array_equal(third["attention_mask"], [[1, 1, 1, 1, 0, 0], [0] * 6])
    one, = drawn([short, long], 1, 2, 0)
    assert one["attention_mask"].any(1).sum() == 1


def test_recomputed_layers_train_the_same(place):
    alone = place / "alone" / "train.jsonl"
    write_lines(alone, (place / "data" / "train.jsonl").read_text().splitlines())
    assert tune(place, "recomputed", "--data", str(alone), "--steps", "2", "--recompute") == 0
    for one, other in zip(log_of(place / "recomputed"), log_of(place / "whole")[:2]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.parametrize(("changes", "flags", "message"), [
    ({}, ["--batch", "0"], "command line: batch_size must be at least 1, got 0"),
    ({}, ["--data", "no.jsonl"], "there is no file no.jsonl"),
    ({}, ["--data", "no.csv"], "must be a .json or .jsonl file"),
    ({}, ["--heldout", "no.jsonl"], "there is no file no.jsonl"),
    ({}, ["--base", "no.gguf"], "no base at no.gguf"),
    ({}, ["--device", "GPU"], "device must be CPU or Ascend, got 'GPU'"),
    ({}, ["--targets", "wz"], "target_modules entry 'wz' hits nothing"),
    ({}, ["--targets", "wq", "embed_tokens"], "mixes names of MindFormers' with embed_tokens"),
    ({}, ["--method", "lorra"], "pet_type must be one of"),
    ({"model": {"model_config": {"num_layers": 32, "pet_config": PET}}}, [], "num_layers: 32, and the base has 2"),
    ({"model": {"pet_config": PET | {"target_modules": ".*wz"}}}, [], "target_modules '.*wz' hits nothing"),
    ({"model": {"pet_config": PET | {"lora_rnk": 2}}}, [], "Unknown key 'lora_rnk'"),
    ({"optimizer": {"type": "SGD"}}, [], "optimizer.type is 'SGD', and this example has AdamW"),
    ({"runner_config": {"epochs": "two"}}, [], "epochs must be a number, got 'two'")])
def test_what_users_get_wrong_is_one_sentence(place, capfd, changes, flags, message):
    (place / "tune.yaml").write_text(yaml.safe_dump(YAML | changes))
    try:
        assert tune(place, "wrong", *flags) == 2
    finally:
        (place / "tune.yaml").write_text(yaml.safe_dump(YAML))
    error = capfd.readouterr().err
    assert message in error and error.count("finetune.py: error:") == 1 and "Traceback" not in error
    assert not (place / "wrong").exists()


@pytest.mark.parametrize(("wanted", "found"), [
    (WQ, ["q_proj", "k_proj", "v_proj", "o_proj"]), (["wq", "w2"], ["q_proj", "down_proj"]),
    ("wq|w1", ["q_proj", "gate_proj"]), (r".*layers\.1\..*wv", ["model.layers.1.self_attn.v_proj"]),
    (["q_proj"], ["q_proj"]), (r".*\.self_attn\.[qk]_proj", r".*\.self_attn\.[qk]_proj")])
def test_targets_by_either_librarys_names(wanted, found):
    config = config_for(Decoder(SIZES), PET | {"target_modules": wanted})
    assert config.target_modules == found or sorted(config.target_modules) == sorted(found)


def test_sizes_of_a_yaml():
    check_sizes(Decoder(SIZES), {"num_layers": 2, "n_kv_heads": 2, "vocab_size": 259, "type": "LlamaConfig"})
    with pytest.raises(UserError, match="n_kv_heads: 4, and the base has 2"):
        check_sizes(Decoder(SIZES), {"n_kv_heads": 4})


def test_our_own_yaml_and_flags(tmp_path):
    parser = Parser("")
    options.add_flags(parser)
    file = tmp_path / "ours.yaml"
    file.write_text("learning_rate: 1e-4\nlengths: [16, 32]\npet_config: {pet_type: ia3}\n")
    settings = options.read(parser.parse_args(["--config", str(file), "--epochs", "2"]))
    assert settings.learning_rate == 1e-4 and settings.padded() == [16, 32] and settings.epochs == 2.0
    assert settings.pet_config == {"pet_type": "ia3"}
    file.write_text("learning_rat: 0.1\n")
    with pytest.raises(UserError, match="unknown key 'learning_rat'.*learning_rate"):
        options.read(parser.parse_args(["--config", str(file)]))
    assert options.Settings(max_length=300).padded() == [64, 128, 256, 300]


def test_an_update_is_the_mean_over_its_tokens():
    """Two steps that make one update, and two processes: weights of tokens as in one large batch."""
    samples = [(list(range(9)), np.arange(n, 8)) for n in (1, 2, 5, 7, 3)]
    one = bucket(9, samples)
    whole = Batches([one], 4, 1, 2, 0)
    _, rows = whole.sampler.at(0)
    tokens = sum(len(one.places[row]) for row in rows)
    for accumulation, ranks in ((2, 1), (1, 2)):
        parts = [Batches([one], 2, accumulation, 4, 0, rank, ranks) for rank in range(ranks)]
        taken = [batch for part in parts for batch, _ in zip(part, range(accumulation))]
        assert [float(batch[-1]) for batch in taken] == [tokens / 2] * 2
        assert sum(batch[3].sum() for batch in taken) == tokens
    # The last update is of one step alone.
    last = list(Batches([one], 2, 2, 3, 0))[2]
    assert float(last[-1]) == last[3].sum()


def test_every_sample_is_trained_on_in_an_epoch_and_steps_are_known():
    buckets = [bucket(9, [([1] * 9, np.arange(8))] * 5), bucket(17, [([1] * 17, np.arange(3))] * 3)]
    batches = Batches(buckets, 2, 1, 10, 0)
    lengths = [inputs[0].shape[1] for inputs in batches]
    assert batches.sampler.epoch == 5 and sorted(lengths[:5]) == sorted(lengths[5:]) == [9, 9, 9, 17, 17]
    later = Batches(buckets, 2, 1, 10, 0)
    later.sampler.step = 7
    assert [inputs[0].shape[1] for inputs in later] == lengths[7:]


@pytest.mark.parametrize(("answer", "has"), [
    ("Ship's log: Rome sighted. All well aboard.", True), ("航海日志：天晴。船上一切平安。", True),
    ("Ship's log: Rome sighted.", False), ("The log: Rome. All well aboard.", False),
    ("Ship's log: . All well aboard.", False), ("Ship's log: Rome sighted\nAll well aboard.", False),
    ("Ship's log: a. All well aboard. All well aboard.", False), ("航海日志：船上一切平安。", False),
    ("Ship's log: Rome. All well aboard. And more", False), ("", False)])
def test_the_manner_is_strict(answer, has):
    assert manner.has_manner(answer) is has


def test_the_data_has_its_manner_and_no_doublets():
    parts = {name: instructions.read_samples(CAUSAL_LM / "data" / f"{name}.jsonl") for name in ("train", "heldout")}
    assert all(not skipped for _, skipped in parts.values())
    train, heldout = (samples for samples, _ in parts.values())
    assert 200 <= len(train) + len(heldout) <= 400
    assert all(manner.has_manner(sample.answer) for sample in [*train, *heldout])
    assert all(manner.is_chinese(sample.answer) == manner.is_chinese(sample.prompt[-1]["content"])
               for sample in [*train, *heldout])
    assert not manner.doublets(heldout, train)
    assert len({sample.prompt[-1]["content"] for sample in [*train, *heldout]}) == len(train) + len(heldout)
