"""Layers whose delta never runs: refused where the cell around them is known, found by `check_adapters` elsewhere."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from nets import Attention, config, inputs, randomise, state, unchanged

import mindpet_lite as mp


class ReadsWeights(nn.Cell):
    """A cell that calls one layer, reads the weight of another, and drops what a third returns."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out, self.unused = nn.Dense(6, 6), nn.Dense(6, 6), nn.Dense(6, 6)
        self.norm = nn.LayerNorm((6,))

    def construct(self, x):
        self.unused(x)
        return self.norm(ops.matmul(self.q(x), self.out.weight.T)), ops.argmax(x, -1)


class TiedHead(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q = nn.Embedding(12, 6), nn.Dense(6, 6)

    def construct(self, ids):
        return ops.matmul(self.q(self.embed(ids)), self.embed.embedding_table.T)


def test_layers_that_run_pass_and_nothing_changes(mode):
    net = mp.get_pet_model(Attention(), config(["to_q", "to_out.0", "blocks.1.0"], lora_dropout=0.5)).set_train()
    before, random_state = state(net), np.random.get_state()[1].tobytes()
    assert mp.check_adapters(net, inputs(5, 6)) == ["to_q", "to_out.0", "blocks.1.0"]
    assert state(net) == before and np.random.get_state()[1].tobytes() == random_state
    net.set_train(False)
    randomise(net)
    before = state(net)
    assert len(mp.check_adapters(net, inputs(5, 6))) == 3
    assert state(net) == before


def test_layers_whose_delta_does_not_reach_the_output_are_named(mode):
    net = mp.get_pet_model(ReadsWeights(), config(["q", "out", "unused"]))
    with unchanged(net), pytest.raises(ValueError, match="The deltas of out, unused do not reach the output"):
        mp.check_adapters(net, inputs(5, 6))
    assert mp.check_adapters(mp.get_pet_model(ReadsWeights(), config(["q"])), inputs(5, 6)) == ["q"]


def test_a_table_that_the_head_reads(mode):
    # The embedding itself is called, so its delta runs; merging is refused by no rule, but the output would change.
    ids = Tensor([[1, 2, 3]], ms.int32)
    net = mp.get_pet_model(TiedHead(), config(["embed", "q"]))
    with unchanged(net), pytest.raises(ValueError, match="The weights of embed are read by another cell too"):
        mp.check_adapters(net, ids)
    tokens = mp.get_pet_model(TiedHead(), config(["q"], trainable_token_indices={"embed": [2]}))
    with unchanged(tokens), pytest.raises(ValueError, match="The weights of embed are read by another cell too"):
        mp.check_adapters(tokens, ids)
    assert mp.check_adapters(mp.get_pet_model(TiedHead(), config(["q"])), ids) == ["q"]


def test_tokens_of_which_the_batch_has_none(pynative_mode):
    net = mp.get_pet_model(nn.SequentialCell(nn.Embedding(12, 6), nn.Dense(6, 6)),
                           config(["1"], trainable_token_indices={"0": [7]}))
    assert mp.check_adapters(net, Tensor([[7, 1]], ms.int32)) == ["0", "1"]
    with pytest.raises(ValueError, match="deltas of 0 do not reach .* or take a batch with those tokens"):
        mp.check_adapters(net, Tensor([[2, 1]], ms.int32))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_what_merges_passes(settings, mode):
    net = mp.get_pet_model(Attention().set_train(False), config(["to_q", "to_out.0", "blocks.1.0"], **settings))
    with unchanged(net):
        assert len(mp.check_adapters(net, inputs(5, 6))) == 3


def test_what_cannot_be_checked_is_refused(pynative_mode):
    with pytest.raises(ValueError, match="no adapted layer"):
        mp.check_adapters(Attention(), inputs(5, 6))
    net = mp.get_pet_model(Attention(), config(["to_q"]))
    with mp.adapters_disabled(net), pytest.raises(ValueError, match="leave the block before you check"):
        mp.check_adapters(net, inputs(5, 6))

    class Counts(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Dense(6, 6)

        def construct(self, x):
            return ops.argmax(self.q(x), -1)

    net = mp.get_pet_model(Counts(), config(["q"]))
    with unchanged(net), pytest.raises(ValueError, match="whose output is a float Tensor"):
        mp.check_adapters(net, inputs(5, 6))


@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(6, 2), lambda: nn.TransformerEncoderLayer(6, 2, 8),
                                  lambda: nn.TransformerDecoderLayer(6, 2, 8)],
                         ids=["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("targets", [["out_proj"], "all-linear", r".*out_proj"], ids=str)
def test_a_layer_that_its_parent_is_known_to_read_is_refused(make, targets):
    net = nn.SequentialCell(make())
    with unchanged(net), pytest.raises(ValueError, match=r"out_proj: nn.MultiheadAttention does not call out_proj"):
        mp.get_pet_model(net, config(targets))
    if type(net[0]) is not nn.MultiheadAttention:
        mp.get_pet_model(net, config("all-linear", exclude_modules=["out_proj"]))
    mp.get_pet_model(nn.SequentialCell(make()), mp.BitFitConfig())
