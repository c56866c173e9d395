"""The plan of the memory of training: counts beside real nets, lifetimes by hand, the command, and one measurement."""
from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mindspore import nn

import mindpet_lite as mp
from mindpet_lite import estimate as room
from mindpet_lite.cli import main
from mindpet_lite.estimate import estimate, unet
from mindpet_lite.estimate.cpu_operators import CpuOperators
from mindpet_lite.estimate.kernels import UNIT, Kernel, Memory, as_run, highest, tables_of
from mindpet_lite.estimate.layers import Lora
from mindpet_lite.estimate.plan import plan
from mindpet_lite.estimate.report import chosen, net_of

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "wukong"), str(ROOT / "benchmarks")]

from layers import Attend  # noqa: E402
from llama import Llama, Sizes  # noqa: E402
from unet import UNetModel  # noqa: E402

CONFIGS = ROOT / "examples" / "wukong"
UNET = yaml.safe_load((CONFIGS / "base" / "config.yaml").read_text(encoding="utf-8"))
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 300}
LLAMA_2 = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5}


def command(*arguments: str) -> int:
    return main(["estimate", *arguments])


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA_2), encoding="utf-8")
    return "config.json"


@pytest.mark.parametrize("changes, parameters", [
    ({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
      "num_key_value_heads": 8}, 68_976_648_192),
    ({"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}, 8_030_261_248),
    ({"intermediate_size": 14336, "num_key_value_heads": 8, "model_type": "mistral"}, 7_241_732_096),
    ({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8,
      "vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True}, 1_235_814_400)],
    ids=["2-70B", "3-8B", "Mistral-7B", "3.2-1B"])
def test_parameters_of_published_models(changes, parameters):
    tape = CpuOperators(1, lambda path: False, {})
    net_of({**LLAMA_2, **changes}).forward(tape, 1, 16, False)
    assert tape.bytes_of(False) == parameters


def test_qwen2_has_biases_that_its_config_does_not_say():
    # Qwen2-7B, whose card says 7.62 B parameters, and Qwen2-0.5B with its tied head, 0.49 B.
    sizes = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
             "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    report = estimate(sizes, 1, 16)
    assert report.kind == "Qwen2" and report.parameters == 7_615_616_512
    small = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    assert estimate(small, 1, 16).parameters == 494_032_768


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base(kind):
    net, config = Llama(Sizes(**SMALL), 8), mp.LoraConfig(3, 6, target_modules="all-linear")
    mp.quantize_base(net, kind, r"model\..*_proj")
    mp.get_pet_model(net, config)
    report = estimate(SMALL, 2, 8, lora_rank=3, target_modules="all-linear", quantize=kind)
    assert report.plans["LoRA"].weights == sum(
        item.size * item.itemsize for name, item in net.parameters_and_names()
        if not item.requires_grad and "scaling" not in name)
    plain = estimate(SMALL, 2, 8, lora_rank=3, target_modules="all-linear")
    assert report.plans["full"] == plain.plans["full"]
    assert report.plans["LoRA"].gradients == plain.plans["LoRA"].gradients


def test_weights_train_or_do_not():
    report = estimate(LLAMA_2, 1, 16)
    assert report.parameters == 6_738_415_616 and report.plans["LoRA"].weights == 4 * report.parameters
    assert report.plans["full"].weights == 4 * report.parameters and report.plans["full"].deltas == 0


def test_attention_goes_head_by_head_from_as_many_queries_as_in_the_example():
    assert unet.MANY == Attend.MANY


def test_parameters_of_wukongs_unet():
    config = yaml.safe_load((CONFIGS / "configs" / "wukong_full_lora.yaml").read_text(encoding="utf-8"))
    report = estimate(config, 3)
    assert (report.parameters, report.lora_parameters, len(report.lora_layers)) == (859_520_964, 797_184, 128)
    assert report.lora_rank == 4


@pytest.mark.parametrize("targets", [("to_q", "to_v"), "all-linear", r".*\.attn2\..*|time_embed\.0"])
def test_counts_are_those_of_the_unet(targets):
    net = UNetModel(**UNET["unet"])
    report = estimate(UNET, 2, lora_rank=3, target_modules=targets)
    assert report.parameters == sum(item.size for item in net.get_parameters())
    mp.get_pet_model(net, mp.LoraConfig(3, 6, target_modules=targets))
    assert report.lora_parameters == sum(item.size for item in net.trainable_params())
    assert set(report.lora_layers) == {path for path, cell in net.cells_and_names() if isinstance(cell, mp.LoRADense)}


@pytest.mark.parametrize("optimizer, kind", [("adamw", nn.AdamWeightDecay), ("adam", nn.Adam),
                                             ("momentum", lambda given: nn.Momentum(given, 0.1, 0.9)),
                                             ("sgd", nn.SGD)])
def test_counts_are_those_of_the_llama(optimizer, kind):
    net = Llama(Sizes(**SMALL), 8)
    report = estimate(SMALL, 2, 8, lora_rank=3, optimizer=optimizer)
    assert report.parameters == sum(item.size for item in net.get_parameters())
    mp.get_pet_model(net, mp.LoraConfig(3, 6, target_modules=report.lora_layers))
    trained = net.trainable_params()
    found = report.plans["LoRA"]
    assert found.deltas == found.gradients == sum(item.nbytes for item in trained)
    state = [item for item in kind(trained).get_parameters()
             if item.size > 1 and not any(item is other for other in trained)]
    assert found.optimizer == sum(item.nbytes for item in state)


def test_memory_is_held_from_its_writer_to_its_last_reader():
    a, b, c = (Memory(UNIT * size) for size in (1, 2, 4))
    steps = [Kernel("", (), (a,)), Kernel("", (a,), (b,)), Kernel("", (b,), (c,)), Kernel("", (c,), ())]
    assert highest(steps) == 6 * UNIT
    # A reader at the end is why `a` stays.
    assert highest([*steps[:3], Kernel("", (a, c), ())]) == 7 * UNIT
    assert highest(steps[:1]) == UNIT and highest([]) == 0
    assert Memory(1).size == UNIT and Memory(UNIT + 1).size == 2 * UNIT


def test_kernels_run_as_soon_as_what_they_read_is_there():
    a, b, c = (Memory(UNIT) for _ in range(3))
    first, second, last, early = (Kernel("first", (), (a,)), Kernel("second", (a,), (b,)),
                                  Kernel("last", (b,), (c,)), Kernel("early", (a,), ()))
    assert [kernel.kind for kernel in as_run([first, second, last, early])] == ["first", "second", "early", "last"]


def test_activations_of_a_chain_by_hand():
    def forward(tape):
        x = tape.input(128, 256)
        for number in range(3):
            x = tape.unary("Exp", tape.dense(x, str(number), 256, bias=False), "y")
        return tape.reduce("ReduceMean", x, 1)

    size, weight = 128 * 256 * 4, 256 * 256 * 4
    tape = CpuOperators(4, lambda path: path == "0.weight", {})
    kernels = tape.backward(forward(tape))
    assert [kernel.kind for kernel in kernels] == [
        "MatMul", "Exp", "MatMul", "Exp", "MatMul", "Exp", "Fill", "BroadcastTo", "ExpGrad", "MatMul", "ExpGrad",
        "MatMul", "ExpGrad", "MatMul", "AdamWeightDecay"]
    # At the last Exp: what all three wrote, what it reads, and the loss's gradient, which waits for nothing.
    assert highest(as_run(kernels)) == 5 * size
    full = plan(forward, None)
    assert full.weights == full.gradients == 3 * weight and full.optimizer == 6 * weight and full.deltas == 0
    # With LoRA on the last layer the others have no gradient: nothing of them is kept.
    adapted = plan(forward, {"2": Lora(4, 0.5)})
    assert adapted.deltas == 2 * 4 * 256 * 4 and adapted.weights == 3 * weight
    assert adapted.activations + adapted.gradients < full.activations + full.gradients


@pytest.mark.parametrize("own_bprop", [False, True])
def test_what_a_recomputed_block_keeps(own_bprop):
    def forward(tape):
        x = tape.dense(tape.input(128, 256), "0", 256, bias=False)
        for _ in range(3):
            with tape.recomputed(True):
                for _ in range(4):
                    x = tape.record([x], lambda reads: [tape.run("Exp", reads, reads[0].shape)], lambda reads, results,
                                    dy: [tape.run("ExpGrad", [dy, *results], dy.shape)], own_bprop)
        return tape.reduce("ReduceMean", x, 1)

    size = 128 * 256 * 4
    tape = CpuOperators(4, lambda path: True, {})
    kernels = tape.backward(forward(tape))
    # With a gradient of its own an operator's first result is read; nothing reads what is computed again.
    assert sum(kernel.copied for kernel in kernels) == (0 if own_bprop else 12)
    assert sum(kernel.kind == "ExpGrad" for kernel in kernels) == 12
    # What goes into the first two blocks, the results of the last, a gradient and what is made of it; or all results.
    assert highest(as_run(kernels)) == (12 + 2 if own_bprop else 2 + 4 + 2) * size


def test_tables_of_kernels():
    assert tables_of("Transpose", [(2, 3)], (3, 2)) == 48
    assert tables_of("Mul", [(2, 3), (3,)], (2, 3)) == 96
    assert tables_of("Mul", [(2, 3), ()], (2, 3)) == tables_of("Mul", [(2, 3), (2, 3)], (2, 3)) == 0
    assert tables_of("MatMul", [(2, 3), (4, 3)], (2, 4)) == 0


@pytest.mark.parametrize("config, seq", [(UNET, None), (SMALL, 64)], ids=["unet", "llama"])
def test_recomputing_takes_less_memory_and_more_tables(config, seq):
    plans = estimate(config, 4, seq).plans
    for name in ("LoRA", "full"):
        one, other = plans[name], plans[f"{name}, recompute"]
        assert other.tables > one.tables
        assert (one.weights, one.deltas, one.optimizer) == (other.weights, other.deltas, other.optimizer)
    assert plans["LoRA, recompute"].activations < plans["LoRA"].activations
    assert plans["LoRA"].device < plans["full"].device


def test_what_makes_a_plan_larger():
    def found(**changes):
        return estimate(SMALL, **{"batch": 2, "seq": 32, **changes}).plans["LoRA"]

    base = found()
    assert found(batch=4).activations > base.activations < found(seq=64).activations
    assert found(lora_rank=16).deltas == 2 * base.deltas
    assert found(lora_dropout=0.1).activations > base.activations
    half = found(dtype="float16")
    assert 2 * half.weights == base.weights and half.deltas == base.deltas and half.activations < base.activations


def test_the_command(config, capfd):
    assert command("--config", config, "--batch", "4", "--seq", "512") == 0
    output, errors = capfd.readouterr()
    first, _, head, *rows = output.splitlines()
    assert errors == "" and first == ("Llama of 6,738,415,616 parameters; LoRA of rank 8 on 128 layers, 8,388,608 "
                                      "parameters")
    assert head.split("  ")[0] == "GB" and head.endswith("LoRA  LoRA, recompute    full  full, recompute")
    assert rows[0].split()[2:] == ["26.95", "26.95", "26.95", "26.95"] and rows[1].split()[2:3] == ["0.03"]
    assert rows[9] == "" and [row.partition(":")[0] for row in rows[10:]] == [
        "model's weights", "gradients, optimizer", "activations", "on the device"]
    assert command("--config", config, "--batch", "4", "--seq", "512", "--lora-rank", "16", "--target-modules",
                   "q_proj,v_proj", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    plan = found["plans"]["LoRA, recompute"]
    assert found["lora_parameters"] == 8_388_608 and len(found["lora_layers"]) == 64
    parts = [plan[name] for name in ("weights", "deltas", "gradients", "optimizer", "activations")]
    assert plan["device"] == sum(parts) and plan["process"] == sum(parts) + plan["tables"] + plan["compiler"]


@pytest.mark.parametrize("changes, message", [
    ({"num_hidden_layers": None}, "config.json: the key num_hidden_layers is missing"),
    ({"hidden_size": "wide"}, "hidden_size must be a positive int, but is 'wide'"),
    ({"vocab_size": 0}, "vocab_size must be a positive int, but is 0"),
    ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers must be at most 10000"),
    ({"num_key_value_heads": 5}, "5 does not divide 32"), ({"num_attention_heads": 3}, "3 does not divide 4096"),
    ({"mlp_bias": 1}, "mlp_bias must be true or false"), ({"model_type": "gpt2"}, "but is 'gpt2'")])
def test_configs_that_are_refused(config, changes, message, capfd):
    values = {key: value for key, value in {**LLAMA_2, **changes}.items() if value is not None}
    Path(config).write_text(json.dumps(values), encoding="utf-8")
    assert command("--config", config, "--batch", "1", "--seq", "8") == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors.startswith("mindpet-lite: ") and errors.count("\n") == 1 and message in errors


@pytest.mark.parametrize("changes, message", [
    ({"num_heads": 5}, "5 does not divide 96"), ({"model_channels": 48}, "a multiple of 32, but is 48"),
    ({"image_size": 7}, "a multiple of 2, because"), ({"channel_mult": [1, "2"]}, "channel_mult must be a pos"),
    ({"channel_mult": 2}, "must be a list of positive ints"), ({"attention_resolutions": None}, "is missing")])
def test_unets_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        estimate({"unet": {**UNET["unet"], **changes}}, 1)


@pytest.mark.parametrize("option, value, message", [
    ("--config", "nowhere.json", "no config at nowhere.json"), ("--config", "nowhere.yaml", "nowhere.yaml"),
    ("--config", "other.json", "neither the config.json of a Llama nor a YAML with a block 'unet': its keys are a."),
    ("--config", "broken.json", "is not valid JSON"), ("--batch", "0", "--batch"), ("--seq", "-1", "--seq"),
    ("--lora-rank", "0", "--lora-rank"), ("--dtype", "int8", "--dtype"), ("--optimizer", "lion", "--optimizer"),
    ("--lora-dropout", "1", "'--lora-dropout': 1.0 is not in the range 0<=x<1"),
    ("--target-modules", "to_q,q_proj", "'to_q' hits no linear layer; the model's are self_attn.q_proj, "),
    ("--target-modules", ".*[", "is no regular expression")])
def test_errors_are_one_sentence(config, option, value, message, capfd):
    Path("other.json").write_text('{"a": 1}', encoding="utf-8")
    Path("broken.json").write_text("{", encoding="utf-8")
    given = {"--config": config, "--batch": "1", "--seq": "8", option: value}
    assert command(*(word for pair in given.items() for word in pair)) == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors.startswith("mindpet-lite: ") and errors.count("\n") == 1 and message in errors


def test_help_shows_an_example(capfd):
    assert command("--help") == 0 and ":\n    mindpet-lite estimate --config " in capfd.readouterr().out
    assert main(["--help"]) == 0 and "  estimate " in capfd.readouterr().out
    assert command("--batch", "1") == 2 and "Missing option '--config'" in capfd.readouterr().err


def test_a_llama_needs_a_length(config, capfd):
    assert command("--config", config, "--batch", "1") == 2
    assert "needs seq" in capfd.readouterr().err


def test_it_plans_without_mindspore():
    for path in Path(room.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        # Which know no MindSpore either.
        others = ("mindpet_lite.arguments", "mindpet_lite.names", "mindpet_lite.pet_block",
                  "mindpet_lite.formats.quantised")
        assert all(name.startswith(("mindpet_lite.estimate", *others)) or name.split(".")[0] in sys.stdlib_module_names
                   for name in names), path


MEASURE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from estimate import CASES, measured
print(json.dumps(measured(CASES["llama small"], "LoRA")))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process is read from /proc")
def test_a_measured_step(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEASURE, str(ROOT / "benchmarks")], cwd=tmp_path, text=True,
                          capture_output=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    from estimate import CASES, planned
    found = planned(CASES["llama small"])["LoRA"].process
    assert abs(json.loads(done.stdout) / found - 1) < 0.15


def test_all_linear_leaves_out_the_output_head():
    layers = ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert chosen("all-linear", layers) == layers[:1]
