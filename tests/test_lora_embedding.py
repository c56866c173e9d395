"""LoRA on nn.Embedding: what the laws do not ask; PEFT's numbers."""
from __future__ import annotations

import inspect

import mindspore as ms
import numpy as np
import pytest
from cases_lora_embedding import reference_of
from mindspore import Tensor, nn
from nets import MERGED, TOLERANCE, gradients_of, numbers, randomise, unchanged
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.delta import LoRAEmbedding

IDS = Tensor(np.array([[1, 3, 0], [6, 3, 5]], np.int32))


class Holder(nn.Cell):
    """A net around one embedding."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.layer = layer

    def construct(self, ids):
        return self.layer(ids)


def table(dtype=ms.float32) -> Tensor:
    return Tensor(np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)).astype(dtype)


def randomised(**settings) -> LoRAEmbedding:
    layer = LoRAEmbedding(7, 4, **{"lora_rank": 2, "lora_alpha": 5, "embedding_table": table(), **settings})
    randomise(layer)
    return layer


# Signature, names, start

def test_signature():
    assert list(inspect.signature(LoRAEmbedding).parameters) == [
        "vocab_size", "embedding_size", "lora_rank", "lora_alpha", "lora_dropout", "lora_a_init", "lora_b_init",
        "param_init_type", "compute_dtype", "use_rslora", "embedding_kwargs"]


@pytest.mark.parametrize("how", ["by hand", "injected"])
def test_names_shapes_and_start_are_pefts(how):
    if how == "by hand":
        net = Holder(LoRAEmbedding(400, 50, 8, 16, embedding_table="ones"))
    else:
        net = mp.get_pet_model(Holder(nn.Embedding(400, 50, embedding_table="ones")),
                               mp.LoraConfig(lora_rank=8, lora_alpha=16, target_modules=["layer"]))
    layer = net.layer
    assert isinstance(layer, nn.Embedding) and layer.weight is layer.embedding_table
    assert [item.name for item in net.get_parameters()] == [
        "layer.embedding_table", "layer.mindpet_delta_lora_embedding_a", "layer.mindpet_delta_lora_embedding_b",
        "layer.scaling"]
    a, b = layer.mindpet_delta_lora_embedding_a.asnumpy(), layer.mindpet_delta_lora_embedding_b.asnumpy()
    assert a.shape == (8, 400) and b.shape == (50, 8)
    assert not a.any() and abs(b.std() - 1) < 0.15 and abs(b.mean()) < 0.15
    assert layer.settings() == {"lora_rank": 8, "lora_alpha": 16}
    assert "lora_rank=8" in repr(net) and "vocab_size=400" in repr(net)


def test_a_config_can_say_how_the_factors_start():
    net = mp.get_pet_model(Holder(nn.Embedding(7, 4)), mp.LoraConfig(
        lora_rank=2, lora_a_init="ones", lora_b_init="zeros", target_modules=["layer"]))
    assert (net.layer.mindpet_delta_lora_embedding_a.asnumpy() == 1).all()
    assert not net.layer.mindpet_delta_lora_embedding_b.asnumpy().any()


def test_names_stand_beside_the_tables_where_path_and_name_differ():
    net = Holder(nn.Embedding(7, 4))
    net.layer.embedding_table.name = "model.words.embedding_table"
    mp.get_pet_model(net, mp.LoraConfig(target_modules=["layer"], lora_rank=2))
    assert [item.name for item in net.trainable_params()] == ["model.words.mindpet_delta_lora_embedding_a",
                                                              "model.words.mindpet_delta_lora_embedding_b"]


# Dropout

@pytest.mark.parametrize("value, error", [(0.1, ValueError), (1, ValueError), ("0", TypeError), (False, TypeError)])
def test_a_dropout_by_hand_is_refused(value, error):
    with pytest.raises(error, match="lora_dropout"):
        LoRAEmbedding(7, 4, 2, 5, lora_dropout=value)


def test_no_dropout_by_hand_is_fine():
    assert LoRAEmbedding(7, 4, 2, 5, 0, embedding_table=table())(IDS).shape == (2, 3, 4)


def test_a_configs_dropout_does_not_apply(mode):
    net = mp.get_pet_model(Holder(nn.Embedding(7, 4)), mp.LoraConfig(lora_dropout=0.5, target_modules=["layer"],
                                                                     lora_rank=2))
    randomise(net)
    assert np.array_equal(net.set_train()(IDS).asnumpy(), net.set_train(False)(IDS).asnumpy())


# What it computes

@pytest.mark.parametrize("ids, use_one_hot", [
    (IDS, False), (IDS.astype(ms.int64), False), (Tensor(3, ms.int32), False), (IDS, True),
    (Tensor(3, ms.int32), True)],
    ids=["int32", "int64", "one id", "int32 by one-hot", "one id by one-hot"])
def test_ids_of_any_type_and_shape(ids, use_one_hot, mode):
    layer = randomised(use_one_hot=use_one_hot)
    y = layer(ids)
    expected, _, _ = reference_of(layer, ids.asnumpy(), np.ones(y.shape))
    assert y.shape == (*ids.shape, 4)
    np.testing.assert_allclose(y.asnumpy(), expected, **TOLERANCE[ms.float32])


@pytest.mark.parametrize("use_one_hot", [False, True], ids=["gather", "one-hot"])
def test_padding_is_shown_but_not_learnt(use_one_hot, mode):
    layer = randomised(padding_idx=3, use_one_hot=use_one_hot)
    weights = np.random.default_rng(0).standard_normal((2, 3, 4))
    expected, by, _ = reference_of(layer, IDS.asnumpy(), weights)
    parameters = list(layer.delta_parameters().values())
    y, _, found = gradients_of(layer, parameters, IDS, weights)
    np.testing.assert_allclose(y.asnumpy(), expected, **TOLERANCE[ms.float32])
    a = found[0].asnumpy()
    assert not a[:, 3].any() and a[:, 1].all()
    for parameter, gradient in zip(parameters, found):
        np.testing.assert_allclose(gradient.asnumpy(), by[parameter], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["compute_dtype", "to_float", "outer to_float"])
@pytest.mark.parametrize("use_one_hot", [False, True], ids=["gather", "one-hot"])
def test_computes_in_the_type_asked_for_and_returns_what_the_dtype_rule_says(how, use_one_hot, mode):
    layer = randomised(use_one_hot=use_one_hot, **({"compute_dtype": ms.float16} if how == "compute_dtype" else {}))
    net = Holder(layer)
    if how == "to_float":
        layer.to_float(ms.float16)
    elif how == "outer to_float":
        net.to_float(ms.float16)
    y = layer(IDS)
    expected, _, _ = reference_of(layer, IDS.asnumpy(), np.ones(y.shape))
    assert y.dtype == (ms.float32 if how == "compute_dtype" else ms.float16)
    assert layer.embedding_table.dtype == ms.float32
    assert 1e-5 < np.abs(numbers(y) - expected).max() < 1e-2
    assert layer.cost() == ""


@pytest.mark.parametrize("use_one_hot", [False, True], ids=["gather", "one-hot"])
def test_a_table_in_half_precision(use_one_hot, mode):
    layer = randomised(use_one_hot=use_one_hot, embedding_table=table(ms.float16), dtype=ms.float16,
                       param_init_type=ms.float16)
    y = layer(IDS)
    expected, _, _ = reference_of(layer, IDS.asnumpy(), np.ones(y.shape))
    assert y.dtype == ms.float16
    np.testing.assert_allclose(numbers(y), expected, **TOLERANCE[ms.float16])
    net = Holder(layer)
    mp.merge(net)
    assert net.layer.embedding_table.dtype == ms.float16
    np.testing.assert_allclose(numbers(net(IDS)), numbers(y), **MERGED[ms.float16])


def test_padding_merges_as_it_is_shown(mode):
    net = Holder(randomised(padding_idx=3))
    before = net(IDS).asnumpy()
    mp.merge(net)
    assert type(net.layer) is nn.Embedding and net.layer.padding_idx == 3
    np.testing.assert_allclose(net(IDS).asnumpy(), before, **MERGED[ms.float32])


# Refusals

class OwnEmbedding(nn.Embedding):
    def construct(self, ids):
        return super().construct(ids) * 2


@pytest.mark.parametrize("cell, message", [
    (nn.EmbeddingLookup(7, 4), "LoRA adapts nn.Dense, not EmbeddingLookup; besides Dense it knows .*nn.Embedding"),
    (OwnEmbedding(7, 4), "OwnEmbedding overrides nn.Embedding.construct"),
    (LoRAEmbedding(7, 4, 2, 5), "a LoRAEmbedding is adapted already"),
], ids=lambda item: type(item).__name__)
def test_what_is_no_plain_embedding_is_refused(cell, message):
    net = Holder(cell)
    with unchanged(net), pytest.raises(ValueError, match=f"layer: {message}"):
        mp.get_pet_model(net, mp.LoraConfig(target_modules=["layer"]))


@pytest.mark.parametrize("settings, error, message", [
    ({"lora_rank": 1.5}, TypeError, "lora_rank"), ({"lora_alpha": float("inf")}, ValueError, "lora_alpha"),
    ({"lora_a_init": Tensor(np.zeros((7, 2), np.float32))}, ValueError, r"lora_a_init.*\(2, 7\).*\(7, 2\)"),
    ({"lora_b_init": "norml"}, ValueError, "norml.*normal"), ({"padding_idx": 9}, ValueError, "padding_idx"),
    ({"table": "ones"}, TypeError, "table")])
def test_bad_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        LoRAEmbedding(7, 4, **{"lora_rank": 2, "lora_alpha": 5, **settings})


def test_a_rank_above_the_tables_warns():
    with pytest.warns(UserWarning, match="lora_rank 5 .*= 4"):
        LoRAEmbedding(7, 4, 5, 5)


# PEFT's files, damaged

def damaged(change, folder):
    """Write an adapter of an embedding and a Dense whose tensors `change` has changed."""
    net = nn.SequentialCell(nn.Embedding(7, 4), nn.Dense(4, 3))
    mp.save_adapter(mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, target_modules=["0", "1"])), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors, "base_model.model.0.")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, message", [
    (lambda tensors, key: tensors.pop(key + "lora_embedding_B"), "0 lacks lora_embedding_B"),
    (lambda tensors, key: tensors.update({key + "lora_A.weight": np.zeros((2, 4), np.float32)}), "0 has lora_A"),
    (lambda tensors, key: tensors.update({key + "lora_embedding_A": np.zeros((7, 2), np.float32)}), "0: .*rank 2"),
    (lambda tensors, key: tensors.update({key + "lora_embedding_A": np.zeros((2, 8), np.float32)}), r"\(2, 8\)"),
    (lambda tensors, key: tensors.update({"base_model.model.1.lora_C.weight": np.zeros((3, 4), np.float32)}),
     "1.lora_C.weight is no tensor of a LoRA layer")])
def test_damaged_files_are_refused(change, message, tmp_path):
    damaged(change, tmp_path / "adapter")
    net = nn.SequentialCell(nn.Embedding(7, 4), nn.Dense(4, 3))
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.load_adapter(net, tmp_path / "adapter")
