"""Models of mindone 0.5 in small: transformers' and diffusers', with stand-ins for the operators that CPU lacks."""
from __future__ import annotations

import importlib.util

import pytest
from mindone_models import BERT, CASES, GPT2, LLAMA
from whole import go_through

import mindpet_lite as mp

pytestmark = [pytest.mark.integrations, pytest.mark.skipif(
    importlib.util.find_spec("mindone") is None, reason="needs mindone 0.5.0: make integrations")]


@pytest.fixture(scope="module", autouse=True)
def library():
    import mint_on_cpu
    mint_on_cpu.install()
    mint_on_cpu.mend_mindone()


@pytest.mark.parametrize("name", CASES)
def test_a_model_goes_through_all_steps(name, pynative_mode, tmp_path):
    make, call, inputs, targets, count = CASES[name]
    go_through(make, call, inputs, mp.LoraConfig(4, 8, target_modules=targets), tmp_path, count)


@pytest.mark.parametrize("name", ["llama", "llama-linear", "clip", "vae"])
def test_a_model_in_a_graph(name, graph_mode, tmp_path):
    """The other models' own forward fails in a graph on CPU; T5's runs partly in Python, where its gradient is cut."""
    make, call, inputs, targets, count = CASES[name]
    go_through(make, call, inputs, mp.LoraConfig(4, 8, target_modules=targets), tmp_path, count)


def test_peft_default_targets_are_found():
    for make, names in ((LLAMA, {"q_proj", "v_proj"}), (GPT2, {"c_attn"}), (BERT, {"query", "value"})):
        net = mp.get_pet_model(make(), mp.LoraConfig(4, 8))
        found = {path.rpartition(".")[2] for path, cell in net.cells_and_names() if hasattr(cell, "lora_rank")}
        assert found == names
