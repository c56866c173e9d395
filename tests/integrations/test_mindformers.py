"""MindFormers 2.1's own Llama and GLM2, its layers one by one, and its `mindformers.pet` beside ours."""
from __future__ import annotations

import importlib.util
import json

import mindspore as ms
import numpy as np
import pytest
import stand_ins
from mindspore import Tensor, nn, ops
from nets import gradient_function, inputs, numbers

import mindpet_lite as mp
from mindpet_lite.delta.hosts import host_of
from mindpet_lite.graph.adapters import deltas

pytestmark = [pytest.mark.integrations, pytest.mark.skipif(
    importlib.util.find_spec("mindformers") is None, reason="needs mindformers 2.1.0: make integrations")]

BLOCK = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0,
         "target_modules": ".*wq|.*wk|.*wv|.*wo"}
GLM_BLOCK = {**BLOCK, "target_modules": ".*query_key_value|.*dense|.*dense_h_to_4h|.*dense_4h_to_h"}
TYPES = dict.fromkeys(("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype",
                       "param_init_type"), "float32")
IDS = np.random.default_rng(0).integers(1, 40, (2, 9)).astype(np.int32)
X = inputs(2, 3, 8)


@pytest.fixture(scope="module", autouse=True)
def library():
    stand_ins.without_hyper_parallel()


def numbered(net):
    """Give a net's Parameters values that come from their place, and let it train."""
    for place, item in enumerate(net.get_parameters()):
        value = np.random.default_rng(place).standard_normal(item.shape) * 0.2
        item.set_data(Tensor((value + (item.ndim == 1)).astype(np.float32)))
    return net.set_train(True)


def llama():
    """Its own Llama; the slow form of its rotary embedding and norm, for which CPU has the kernels."""
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
    return numbered(LlamaForCausalLM(LlamaConfig(
        batch_size=2, seq_length=8, hidden_size=32, num_layers=2, num_heads=4, n_kv_heads=2, vocab_size=48,
        multiple_of=16, fused_rms_norm=False, use_flash_attention=False, use_rope_slice=True, use_past=False, **TYPES)))


def moved(net, seed=1):
    rng = np.random.default_rng(seed)
    for item in net.trainable_params():
        item.set_data(Tensor((item.asnumpy() + 0.1 * rng.standard_normal(item.shape)).astype(np.float32)))
    return net


def loss(net):
    return net(Tensor(IDS)).asnumpy()


def test_the_yaml_block_on_its_llama(mode, tmp_path):
    net = llama()
    before, base = loss(net), [(item, item.asnumpy().copy()) for item in net.get_parameters()]
    mp.get_pet_model(net, BLOCK)
    paths = [f"model.layers.{block}.attention.{name}" for block in (0, 1) for name in ("wq", "wk", "wv", "wo")]
    assert list(deltas(net)) == paths
    names = [f"{path}.mindpet_delta_lora_{part}" for path in paths for part in "ab"]
    assert [item.name for item in net.trainable_params()] == names
    assert np.array_equal(loss(net), before)
    step = nn.TrainOneStepCell(net, nn.Adam(net.trainable_params(), 1e-2)).set_train()
    losses = [float(step(Tensor(IDS)).asnumpy().mean()) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.01
    assert all(np.array_equal(item.asnumpy(), value) for item, value in base)
    y = loss(net)

    mp.save_adapter(net, tmp_path / "formers", format="mindformers")
    config = json.loads((tmp_path / "formers" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["target_modules"] == ["wk", "wo", "wq", "wv"]
    mp.save_adapter(net, tmp_path / "peft", format="peft")
    for folder in ("formers", "peft"):
        assert np.array_equal(loss(mp.load_adapter(llama(), tmp_path / folder).set_train(True)), y)
    with mp.adapters_disabled(net):
        assert np.array_equal(loss(net), before)
    mp.merge(net)
    np.testing.assert_allclose(loss(net), y, rtol=1e-5)
    assert [item.name for item in net.get_parameters()] == [item.name for item, _ in base]
    mp.unmerge(net)
    assert np.array_equal(loss(net), y)


def test_its_own_pet_beside_ours(mode, tmp_path):
    from mindformers.pet import LoraConfig, LoraModel
    theirs = LoraModel(LoraConfig(**{key: value for key, value in BLOCK.items() if key != "pet_type"}), llama())
    theirs = theirs.network.set_train(True)
    for name, item in theirs.parameters_and_names():
        item.name, item.requires_grad = name, "lora" in name
    moved(theirs)
    ms.save_checkpoint([{"name": name, "data": item} for name, item in theirs.parameters_and_names()
                        if "lora" in name], str(tmp_path / "theirs.ckpt"))
    ours = mp.load_adapter(mp.get_pet_model(llama(), BLOCK), tmp_path / "theirs.ckpt").set_train(True)
    own, other = ours.trainable_params(), theirs.trainable_params()
    assert [item.name for item in own] == [item.name.replace("_A", "_a").replace("_B", "_b") for item in other]
    assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(own, other))
    np.testing.assert_allclose(loss(ours), loss(theirs), rtol=1e-6)
    found = []
    for net, parameters in ((ours, own), (theirs, other)):
        found.append(ms.value_and_grad(net, None, ms.ParameterTuple(parameters))(Tensor(IDS))[1])
    for a, b in zip(*found):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=1e-3, atol=1e-6)
    assert max(np.abs(item.asnumpy()).max() for item in found[0]) > 1e-4


def test_all_linear_and_its_embedding(mode):
    net = llama()
    before = loss(net)
    mp.get_pet_model(net, mp.LoraConfig(4, 8, target_modules=["tok_embeddings", "w1", "w2", "lm_head"]))
    assert np.array_equal(loss(net), before)
    y = loss(moved(net))
    assert abs(y - before).max() > 1e-4
    mp.merge(net)
    np.testing.assert_allclose(loss(net), y, rtol=1e-5)
    assert len(deltas(mp.get_pet_model(llama(), mp.IA3Config(target_modules="all-linear")))) >= 14


@pytest.mark.parametrize("compute", ["float32", "float16"])
@pytest.mark.parametrize("settings", [{}, {"has_bias": False}, {"activation": "sigmoid"}, {"transpose_b": False}],
                         ids=str)
def test_linear_alone(settings, compute, mode):
    from mindformers.modules.layers import Linear
    net = numbered(nn.SequentialCell(Linear(8, 4, compute_dtype=getattr(ms, compute), **settings)))
    plain, before = net[0], net(X).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(2, 6, target_modules=["0"]))
    assert np.array_equal(net(X).asnumpy(), before) and net(X).dtype == ms.float32
    moved(net)
    weight = numbers(plain.weight) if settings.get("transpose_b", True) else numbers(plain.weight).T
    new = weight + 3 * numbers(net[0].mindpet_delta_lora_b) @ numbers(net[0].mindpet_delta_lora_a)
    wanted = numbers(X) @ new.T + (0 if plain.bias is None else numbers(plain.bias))
    if "activation" in settings:
        wanted = 1 / (1 + np.exp(-wanted))
    # float16 has 11 bits.
    bound = 1e-5 if compute == "float32" else 1e-2
    np.testing.assert_allclose(net(X).asnumpy(), wanted, rtol=bound, atol=bound)
    mp.merge(net)
    assert net[0] is plain
    np.testing.assert_allclose(net(X).asnumpy(), wanted, rtol=bound, atol=bound)


class Sum(nn.Cell):
    """A layer of mcore, of whose two results the parts are added."""

    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def construct(self, x):
        y, bias = self.proj(x, None)
        return y if bias is None else y + bias


def mcore(kind, **settings):
    from mindformers.parallel_core.training_graph.tensor_parallel import layers, lora_layers
    from mindformers.parallel_core.transformer_config import TransformerConfig
    from mindformers.parallel_core.utils.init_method import init_method_normal
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2, compute_dtype="float32",
                               params_dtype="float32")
    make = getattr(layers, kind, None) or getattr(lora_layers, kind)
    return make(8, 4, config=config, init_method=init_method_normal(0.5, ms.float32), **settings)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"skip_bias_add": True}, {"transpose_b": False}], ids=str)
@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "LinearNoTP", "SequenceParallelLinear"])
def test_mcores_column_layers(kind, settings, graph_mode):
    """Its layers run in graph mode alone."""
    net = numbered(Sum(mcore(kind, **settings)))
    plain, before = net.proj, net(X).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(2, 6, target_modules=["proj"]))
    assert np.array_equal(net(X).asnumpy(), before)
    moved(net)
    weight = numbers(plain.weight) if settings.get("transpose_b", True) else numbers(plain.weight).T
    new = weight + 3 * numbers(net.proj.mindpet_delta_lora_b) @ numbers(net.proj.mindpet_delta_lora_a)
    wanted = numbers(X) @ new.T + (0 if plain.bias is None else numbers(plain.bias))
    np.testing.assert_allclose(net(X).asnumpy(), wanted, rtol=1e-5, atol=1e-5)
    mp.merge(net)
    assert net.proj is plain
    np.testing.assert_allclose(net(X).asnumpy(), wanted, rtol=1e-5, atol=1e-5)


class First(Sum):
    """One that is called with one input."""

    def construct(self, x):
        y, bias = self.proj(x)
        return y if bias is None else y + bias


@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
def test_mcores_own_lora_beside_ours(kind, graph_mode):
    theirs = numbered(First(mcore(f"{kind}WithLoRA", lora_rank=2, lora_alpha=6)))
    ours = numbered(First(mcore(kind)))
    mp.get_pet_model(ours, mp.LoraConfig(2, 6, target_modules=["proj"]))
    names = {name.replace("proj.", ""): item for name, item in theirs.parameters_and_names()}
    pairs = [(ours.proj.weight, names["weight"]), (ours.proj.bias, names["bias"]),
             (ours.proj.mindpet_delta_lora_a, names["lora_A.weight"]),
             (ours.proj.mindpet_delta_lora_b, names["lora_B.weight"])]
    for own, other in pairs:
        own.set_data(Tensor(other.asnumpy()))
    np.testing.assert_allclose(ours(X).asnumpy(), theirs(X).asnumpy(), rtol=1e-6, atol=1e-6)
    weights = np.random.default_rng(0).standard_normal((2, 3, 4))
    slopes = [gradient_function(net, [pair[index] for pair in pairs[2:]], X, weights)()[2]
              for index, net in enumerate((ours, theirs))]
    for own, other in zip(*slopes):
        np.testing.assert_allclose(own.asnumpy(), other.asnumpy(), rtol=1e-4, atol=1e-5)


def test_pynatives_linear_and_its_own_lora(pynative_mode):
    from mindformers.pynative.layers.linear import Linear
    from mindformers.pynative.pet.lora_layer import LinearWithLoRA
    ours, theirs = numbered(nn.SequentialCell(Linear(8, 4, "float32"))), LinearWithLoRA(8, 4, "float32", lora_rank=2,
                                                                                       lora_alpha=6)
    before = ours(X).asnumpy()
    mp.get_pet_model(ours, mp.LoraConfig(2, 6, target_modules=["0"]))
    assert np.array_equal(ours(X).asnumpy(), before)
    moved(ours)
    for name, own in (("weight", ours[0].weight), ("bias", ours[0].bias), ("lora_a", ours[0].mindpet_delta_lora_a),
                      ("lora_b", ours[0].mindpet_delta_lora_b)):
        getattr(theirs, name).set_data(Tensor(own.asnumpy()))
    np.testing.assert_allclose(ours(X).asnumpy(), theirs(X).asnumpy(), rtol=1e-6, atol=1e-6)
    y = ours(X).asnumpy()
    mp.merge(ours)
    np.testing.assert_allclose(ours(X).asnumpy(), y, rtol=1e-5, atol=1e-5)


def test_vocabulary_parallel_embedding(graph_mode):
    net = numbered(nn.SequentialCell(mcore("VocabParallelEmbedding")))
    ids = Tensor(np.array([[1, 7, 0], [3, 3, 2]], np.int32))
    before = net(ids).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(2, 6, target_modules=["0"]))
    assert np.array_equal(net(ids).asnumpy(), before)
    y = moved(net)(ids).asnumpy()
    a, b = (numbers(item) for item in net.trainable_params())
    np.testing.assert_allclose(y, (numbers(net[0].weight) + 3 * (b @ a).T)[ids.asnumpy()], rtol=1e-5, atol=1e-5)
    mp.merge(net)
    np.testing.assert_allclose(net(ids).asnumpy(), y, rtol=1e-5, atol=1e-5)


def glm(monkeypatch):
    """Its own GLM2, with the form of its norm for which CPU has kernels."""
    from mindformers.models.glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration, glm2_modules
    monkeypatch.setattr(glm2_modules, "check_rmsnorm_big_kernel_valid", lambda: False)
    net = numbered(ChatGLM2ForConditionalGeneration(ChatGLM2Config(
        batch_size=2, num_layers=2, padded_vocab_size=48, hidden_size=32, ffn_hidden_size=64, kv_channels=8,
        num_attention_heads=4, seq_length=8, multi_query_attention=True, multi_query_group_num=2,
        use_flash_attention=False, use_past=False, **TYPES)))
    for _, cell in net.cells_and_names():
        if isinstance(cell, glm2_modules.ChatGLM2RMSNorm):
            # The library forgets it in this form.
            cell.cast = ops.Cast()
    return net


def test_the_yaml_block_on_its_glm2(monkeypatch, mode, tmp_path):
    ids, labels = Tensor(IDS[:, :8]), Tensor(IDS[:, 1:])
    net = glm(monkeypatch)
    before = net(ids, labels).asnumpy()
    mp.get_pet_model(net, GLM_BLOCK)
    assert {path.rpartition(".")[2] for path in deltas(net)} == {"query_key_value", "dense", "dense_h_to_4h",
                                                                 "dense_4h_to_h"} and len(deltas(net)) == 8
    assert np.array_equal(net(ids, labels).asnumpy(), before)
    y = moved(net)(ids, labels).asnumpy()
    assert abs(y - before).max() > 1e-4
    mp.save_adapter(net, tmp_path / "a", format="mindformers")
    again = mp.load_adapter(glm(monkeypatch), tmp_path / "a").set_train(True)
    assert np.array_equal(again(ids, labels).asnumpy(), y)
    mp.merge(net)
    np.testing.assert_allclose(net(ids, labels).asnumpy(), y, rtol=1e-5)


def test_layers_for_inference_are_no_hosts():
    from mindformers.parallel_core.inference.tensor_parallel import layers
    kind = layers.ColumnParallelLinear
    assert host_of(kind.__new__(kind)) is None
