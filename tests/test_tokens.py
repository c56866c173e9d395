"""Tokens that train: rows of both kinds of embedding, and of the layers that have the same table (tied weights)."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn, ops
from peft_models import base_model, close
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.graph.tree import set_parameter
from mindpet_lite.offline.merge import merge as merge_files

TOKENS = [5, 2]
IDS = np.array([[0, 2, 5, 2], [8, 5, 1, 3]])
KINDS = {"nn": (nn.Embedding, nn.Dense, "embedding_table"), "mint": (mint.nn.Embedding, mint.nn.Linear, "weight")}


class Net(nn.Cell):
    """A table, a layer, and an output layer that has the table too where `tied`."""

    def __init__(self, kind: str = "nn", tied: bool = True, seed: int = 0, bias: bool = True) -> None:
        super().__init__()
        table, dense, name = KINDS[kind]
        head = {"has_bias": bias} if kind == "nn" else {"bias": bias}
        self.embed_tokens, self.q, self.lm_head = table(9, 4), dense(4, 4), dense(4, 9, **head)
        self.k = dense(4, 4)
        rng = np.random.default_rng(seed)
        for item in self.get_parameters():
            item.set_data(Tensor(rng.standard_normal(item.shape), item.dtype))
        if tied:
            set_parameter(self.lm_head, "weight", getattr(self.embed_tokens, name))

    def construct(self, ids):
        return self.lm_head(ops.square(self.q(self.embed_tokens(ids))))


@pytest.fixture(autouse=True)
def embedding_of_mint(monkeypatch):
    """Stand in for mint's embedding, which has no kernel on the CPU."""
    def looked_up(ids, weight, padding_idx=None):
        return ops.gather(weight, ids, 0)

    def construct(self, ids):
        return ops.gather(self.weight, ids, 0)

    monkeypatch.setattr(mint.nn.functional, "embedding", looked_up)
    monkeypatch.setattr(mint.nn.Embedding, "construct", construct)


def adapted(net: nn.Cell, **settings) -> nn.Cell:
    return mp.get_pet_model(net, mp.LoraConfig(**{"lora_rank": 2, "lora_alpha": 4, "target_modules": ["q"],
                                                  "trainable_token_indices": TOKENS, **settings}))


def shaken(net: nn.Cell) -> nn.Cell:
    rng = np.random.default_rng(7)
    for item in net.trainable_params():
        item.set_data(Tensor(rng.standard_normal(item.shape), item.dtype))
    return net


def output(net: nn.Cell) -> np.ndarray:
    return net(Tensor(IDS, ms.int32)).asnumpy()


def rows(net: nn.Cell):
    return net.embed_tokens.mindpet_delta_lora_tokens


def values(net: nn.Cell) -> dict[str, np.ndarray]:
    return {item.name: item.asnumpy().astype(np.float64) for item in net.get_parameters()}


def reference(net: nn.Cell, strength: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the output, and the gradient of its sum of squares for the trained rows."""
    held = {path.rpartition(".")[2] if "delta" in path else path: item.asnumpy().astype(np.float64)
            for path, item in net.parameters_and_names()}
    table = next(value for path, value in held.items() if path in ("embed_tokens.embedding_table",
                                                                   "embed_tokens.weight"))
    trained, plain = table.copy(), table
    trained[TOKENS] += strength * (held["mindpet_delta_lora_tokens"] - table[TOKENS])
    tied = not any(path == "lm_head.weight" for path in held)
    head = trained if tied else held["lm_head.weight"]
    weight = held["q.weight"] + 2 * strength * held["mindpet_delta_lora_b"] @ held["mindpet_delta_lora_a"]
    x = trained[IDS]
    inner = x @ weight.T + held["q.bias"]
    hidden = inner ** 2
    y = hidden @ head.T + held["lm_head.bias"]
    slope = ((2 * y) @ head * 2 * inner) @ weight
    gradient = np.zeros_like(plain)
    np.add.at(gradient, IDS, slope)
    if tied:
        gradient += np.einsum("abv,abd->vd", 2 * y, hidden)
    return y, strength * gradient[TOKENS]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "of its own"])
@pytest.mark.parametrize("kind", KINDS)
def test_start_numbers_gradients_strength_and_merge(kind, tied, mode):
    plain = output(Net(kind, tied))
    net = adapted(Net(kind, tied))
    assert np.array_equal(output(net), plain)
    assert [item.name for item in net.trainable_params()] == [
        "embed_tokens.mindpet_delta_lora_tokens", "q.mindpet_delta_lora_a", "q.mindpet_delta_lora_b"]
    shaken(net)
    expected, slope = reference(net)
    trained = output(net)
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-5)

    def loss(ids):
        return net(ids).square().sum()

    gradient = ms.grad(loss, None, [rows(net)])(Tensor(IDS, ms.int32))
    np.testing.assert_allclose(gradient[0].asnumpy(), slope, rtol=1e-4, atol=1e-4)
    with mp.adapters_disabled(net):
        assert np.array_equal(output(net), plain)
    mp.set_lora_scale(net, 0.5)
    np.testing.assert_allclose(output(net), reference(net, 0.5)[0], rtol=1e-5, atol=1e-5)
    mp.set_lora_scale(net, 1)
    report = mp.summary(net)
    assert [row[0] for row in report.rows] == ["embed_tokens", "q"]
    copied = copy.deepcopy(net)
    before = values(net)
    mp.merge(net)
    assert type(net.lm_head) is KINDS[kind][1] and type(net.embed_tokens) is KINDS[kind][0]
    np.testing.assert_allclose(output(net), expected, rtol=1e-5, atol=1e-5)
    ms.save_checkpoint(net, "merged.ckpt")
    fresh = Net(kind, tied, seed=3)
    ms.load_param_into_net(fresh, ms.load_checkpoint("merged.ckpt"))
    assert np.array_equal(output(fresh), output(net))
    mp.unmerge(net)
    assert np.array_equal(output(net), trained) and np.array_equal(output(copied), trained)
    assert values(net).keys() == before.keys() and all(np.array_equal(values(net)[name], before[name])
                                                       for name in before)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "of its own"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_the_rows_once_and_give_the_net_back(kind, tied, pynative_mode):
    net = shaken(adapted(Net(kind, tied)))
    mp.save_adapter(net, "out")
    assert set(load_file("out/adapter_model.safetensors")) == {
        "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"}
    for other in KINDS:
        loaded = mp.load_adapter(Net(other, tied), "out")
        np.testing.assert_allclose(output(loaded), output(net), rtol=1e-6, atol=1e-6)
    mp.save_adapter(loaded, "again")
    again, first = (load_file(f"{name}/adapter_model.safetensors") for name in ("again", "out"))
    assert all(np.array_equal(again[name], first[name]) for name in first | again)
    mp.load_adapter(net, "out")
    with pytest.raises(ValueError, match="MindPet's files have no place for tokens that train"):
        mp.save_adapter(net, "a.ckpt", format="mindpet")


@pytest.mark.parametrize("library, follows", [(None, True), ("transformers.models.llama.modeling_llama", True),
                                              ("mine", False)])
def test_a_tied_layer_follows_where_peft_lets_it(library, follows, pynative_mode):
    folder = Path("theirs")
    folder.mkdir()
    save_file({"base_model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 4), np.float32),
               "base_model.model.q.lora_A.weight": np.zeros((2, 4), np.float32),
               "base_model.model.q.lora_B.weight": np.zeros((4, 2), np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "lora_dropout": 0.0,
        "trainable_token_indices": {"embed_tokens": TOKENS},
        "auto_mapping": library and {"parent_library": library, "base_model_class": "Net"}}))
    net, table = mp.load_adapter(Net(), folder), Net().embed_tokens.embedding_table.asnumpy()
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    head = table.copy()
    head[TOKENS] = 1 if follows else head[TOKENS]
    np.testing.assert_allclose(net.lm_head(Tensor(x)).asnumpy(), x @ head.T + net.lm_head.bias.asnumpy(), atol=1e-5)
    assert (net.embed_tokens(Tensor([[5]], ms.int32)).asnumpy() == 1).all()
    if not follows:
        with pytest.raises(ValueError, match="is used at lm_head.weight too"):
            mp.merge(net)
    mp.save_adapter(net, "again")
    np.testing.assert_array_equal(output(mp.load_adapter(Net(), "again")), output(net))


@pytest.mark.parametrize("dtype", [ms.float16])
def test_half_precision_starts_as_its_base(dtype, mode):
    net = Net().to_float(dtype) if dtype == ms.float16 else Net()
    for item in net.get_parameters():
        item.set_dtype(dtype)
    plain = net(Tensor(IDS, ms.int32)).astype(ms.float32).asnumpy()
    adapted(net)
    assert np.array_equal(net(Tensor(IDS, ms.int32)).astype(ms.float32).asnumpy(), plain)


def test_an_embedding_with_the_same_table_follows_too(mode):
    class Two(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.other, self.q = nn.Embedding(9, 4), mint.nn.Embedding(9, 4), nn.Dense(4, 4)
            set_parameter(self.other, "weight", self.embed_tokens.embedding_table)

        def construct(self, ids):
            return self.q(self.embed_tokens(ids)) + self.other(ids)

    net = adapted(Two())
    rows(net).set_data(ops.ones((2, 4), ms.float32))
    net(Tensor(IDS, ms.int32))
    assert np.array_equal(net.other(Tensor(TOKENS, ms.int32)).asnumpy(), np.ones((2, 4)))
    mp.merge(net)
    assert np.array_equal(net.embed_tokens.embedding_table.asnumpy()[TOKENS], np.ones((2, 4)))
    assert type(net.other) is mint.nn.Embedding


class Reading(Net):
    """The net itself holds the table."""

    def __init__(self):
        super().__init__(tied=False)
        set_parameter(self, "table", self.embed_tokens.embedding_table)


class MyDense(nn.Dense):
    def construct(self, x):
        return super().construct(x) * 2


def overridden() -> nn.Cell:
    net = Net()
    net.lm_head = MyDense(4, 9)
    set_parameter(net.lm_head, "weight", net.embed_tokens.embedding_table)
    return net


def of_norm(**settings) -> nn.Cell:
    net = Net("mint")
    net.embed_tokens = mint.nn.Embedding(9, 4, **settings)
    return net


@pytest.mark.parametrize("make, settings, message", [
    (Net, {"target_modules": ["q", "lm_head"]}, "embed_tokens: lm_head has the same weight"),
    (Net, {"modules_to_save": ["lm_head"]}, "embed_tokens: lm_head has the same weight"),
    (Reading, {}, "has the same table as its weight .tied weights., and is no layer"),
    (overridden, {}, "but MyDense overrides Dense.construct"),
    (lambda: of_norm(max_norm=1.0), {}, "max_norm=1.0 rewrites rows"),
    (lambda: of_norm(scale_grad_by_freq=True), {}, "scale_grad_by_freq=True scales gradients"),
    (lambda: of_norm(padding_idx=2), {}, "token 2 is the padding_idx"),
    (lambda: mp.get_pet_model(Net(), mp.LoraConfig(2, 4, target_modules=["lm_head"])), {}, "is adapted already"),
    (Net, {"trainable_token_indices": {"q": [1]}}, "names 'q', but the net has no embedding there")])
def test_what_cannot_follow_is_refused(make, settings, message, pynative_mode):
    net = make()
    before, cells = values(net), [cell for _, cell in net.cells_and_names()]
    with pytest.raises(ValueError, match=message):
        adapted(net, **settings)
    assert [cell for _, cell in net.cells_and_names()] == cells and values(net).keys() == before.keys()


def test_a_layer_that_follows_is_not_adapted_again(pynative_mode):
    net = adapted(Net())
    before = output(net)
    for settings in ({"target_modules": ["lm_head"]}, {"target_modules": ["k"], "modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match="lm_head"):
            mp.get_pet_model(net, mp.LoraConfig(2, 4, **settings))
        assert np.array_equal(output(net), before)


@pytest.mark.interop
def test_pefts_numbers_of_a_tied_llama(shared, mode):
    for name in ("torch", "peft", "transformers"):
        pytest.importorskip(name, reason="pip install 'mindpet_lite[interop]'")
    import peft
    import torch
    import transformers
    folder = shared / "fixtures" / "peft" / "llama_tiny" / "base"
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    Path("base").mkdir()
    save_file(weights, "base/model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))

    def logits(model, ids):
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.numpy()

    ids = np.array([[5, 9, 153, 7, 5, 2, 8, 11]])
    torch.manual_seed(0)
    tuned = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained("base"), peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 9, 153]}))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 3)
    tuned.save_pretrained("theirs")

    def tied():
        net = base_model(shared, "llama_tiny")
        set_parameter(net.lm_head, "weight", net.model.embed_tokens.embedding_table)
        return net

    net, wanted = mp.load_adapter(tied(), "theirs"), logits(tuned, ids)
    close(net(Tensor(ids, ms.int32)).asnumpy(), wanted, 1e-5)
    mp.save_adapter(net, "again")
    close(logits(peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("base"), "again"),
                 ids), wanted, 1e-5)
    # And one that began here.
    ours = mp.get_pet_model(tied(), mp.LoraConfig(2, 4, target_modules=["q_proj"], trainable_token_indices=[5, 9]))
    shaken(ours)
    mp.save_adapter(ours, "ours")
    close(logits(peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("base"), "ours"),
                 ids), ours(Tensor(ids, ms.int32)).asnumpy(), 1e-5)
    merge_files(Path("base"), Path("ours"), Path("merged"), quiet=True)
    close(logits(transformers.AutoModelForCausalLM.from_pretrained("merged"), ids),
          ours(Tensor(ids, ms.int32)).asnumpy(), 1e-5)
    mp.merge(net)
    close(net(Tensor(ids, ms.int32)).asnumpy(), wanted, 1e-5)


def test_names_where_the_table_has_the_heads(pynative_mode):
    net = Net()
    net.embed_tokens.embedding_table.name = "lm_head.weight"
    adapted(net)
    assert [item.name for item in net.get_parameters() if "tokens" in item.name or "scaling" in item.name] == [
        "lm_head.mindpet_delta_lora_tokens", "lm_head.scaling", "q.scaling"]


def test_a_table_of_a_model_that_is_not_of_transformers_is_said(pynative_mode):
    test_files = {"base_model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 4), np.float32),
                  "base_model.model.q.lora_A.weight": np.zeros((2, 4), np.float32),
                  "base_model.model.q.lora_B.weight": np.zeros((4, 2), np.float32)}
    Path("theirs").mkdir()
    save_file(test_files, "theirs/adapter_model.safetensors")
    Path("theirs/adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "lora_dropout": 0.0,
        "trainable_token_indices": {"embed_tokens": TOKENS}, "auto_mapping": {"parent_library": "mine"}}))
    with pytest.warns(UserWarning, match="rows of a table that another layer has too.*set auto_mapping to null"):
        mp.load_adapter(Net(), "theirs")


# ensure_weight_tying: one weight stays one

def tying(net: nn.Cell, **settings) -> nn.Cell:
    return adapted(net, trainable_token_indices=None, ensure_weight_tying=True, **settings)


@pytest.mark.parametrize("entry", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_weight_that_is_saved_by_one_name_trains_as_one(entry, kind, mode):
    net, name = Net(kind), KINDS[kind][2]
    before = output(net)
    tying(net, modules_to_save=[entry])
    table = net.lm_head.weight
    assert getattr(net.embed_tokens, name) is table and table.requires_grad

    def loss(ids):
        return net(ids).square().sum()

    # Both uses of it: the embedding's alone has gradients for the ids of the batch only.
    assert ms.grad(loss, None, [table])(Tensor(IDS, ms.int32))[0].asnumpy()[[4, 6, 7]].any()
    shaken(net)
    trained = output(net)
    with mp.adapters_disabled(net):
        assert np.array_equal(output(net), before)
    mp.save_adapter(net, "out")
    loaded = mp.load_adapter(Net(kind), "out")
    assert loaded.lm_head.weight is getattr(loaded.embed_tokens, name) and np.array_equal(output(loaded), trained)
    mp.merge(loaded)
    np.testing.assert_allclose(output(loaded), trained, rtol=1e-5, atol=1e-5)
    # Without it the two part.
    parted = adapted(Net(kind), trainable_token_indices=None, modules_to_save=[entry])
    assert parted.lm_head.weight is not getattr(parted.embed_tokens, name)


@pytest.mark.parametrize("ensure", [True, False])
def test_pefts_file_says_whether_a_tied_weight_stays_one(ensure, pynative_mode):
    table = np.random.default_rng(5).standard_normal((9, 4)).astype(np.float32)
    Path("theirs").mkdir()
    save_file({"base_model.model.embed_tokens.weight": table,
               "base_model.model.q.lora_A.weight": np.zeros((2, 4), np.float32),
               "base_model.model.q.lora_B.weight": np.zeros((4, 2), np.float32)}, "theirs/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "lora_dropout": 0.0,
              "modules_to_save": ["embed_tokens"], "ensure_weight_tying": ensure}
    Path("theirs/adapter_config.json").write_text(json.dumps(config))
    net = mp.load_adapter(Net(), "theirs")
    assert np.array_equal(net.embed_tokens.embedding_table.asnumpy(), table)
    assert np.array_equal(net.lm_head.weight.asnumpy(), table) == ensure
    mp.save_adapter(net, "again")
    again = mp.load_adapter(Net(), "again")
    assert np.array_equal(output(again), output(net))
    assert json.loads(Path("again/adapter_config.json").read_text())["ensure_weight_tying"] == ensure
    Path("theirs/adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": "yes"}))
    with pytest.raises(ValueError, match="ensure_weight_tying must be true or false"):
        mp.load_adapter(Net(), "theirs")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_adapter_for_both_layers_of_a_tied_weight_is_refused(target, pynative_mode):
    with pytest.raises(ValueError, match="embed_tokens.embedding_table and lm_head.weight are one weight"):
        tying(Net(), target_modules=["q", target])
    tying(Net(tied=False), target_modules=["q", target])
    mp.save_adapter(adapted(Net(tied=False), trainable_token_indices=None, target_modules=["q", target]), "out")
    config = json.loads(Path("out/adapter_config.json").read_text())
    Path("out/adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": True}))
    mp.load_adapter(Net(tied=False), "out")
    with pytest.raises(ValueError, match="are one weight .tied weights., whose adapters ensure_weight_tying makes one"):
        mp.load_adapter(Net(), "out")


def test_tokens_are_one_in_any_case(pynative_mode):
    one, other = (shaken(adapted(Net(), ensure_weight_tying=ensure)) for ensure in (True, False))
    assert np.array_equal(output(one), output(other)) and type(one.lm_head) is type(other.lm_head)


@pytest.mark.parametrize("ensure", [True, False])
def test_merging_files_into_a_tied_base(ensure):
    table = np.random.default_rng(5).standard_normal((9, 4)).astype(np.float32)
    for folder in ("base", "adapter"):
        Path(folder).mkdir()
    save_file({"model.embed_tokens.weight": table * 2, "model.layers.0.q_proj.weight": np.eye(4, dtype=np.float32)},
              "base/model.safetensors")
    Path("base/config.json").write_text(json.dumps({"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"],
                                                    "vocab_size": 9}))
    layer = "base_model.model.model.layers.0.q_proj"
    save_file({"base_model.model.model.embed_tokens.weight": table,
               f"{layer}.lora_A.weight": np.ones((2, 4), np.float32),
               f"{layer}.lora_B.weight": np.ones((4, 2), np.float32)}, "adapter/adapter_model.safetensors")
    Path("adapter/adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "lora_dropout": 0.0,
        "modules_to_save": ["embed_tokens"], "ensure_weight_tying": ensure}))
    if ensure:
        merge_files(Path("base"), Path("adapter"), Path("out"), quiet=True)
        assert np.array_equal(load_file("out/model.safetensors")["model.embed_tokens.weight"], table)
    else:
        with pytest.raises(ValueError, match="one weight for its embedding and its output layer"):
            merge_files(Path("base"), Path("adapter"), Path("out"), quiet=True)
