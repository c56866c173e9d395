"""The base, or a checkpoint of the whole adapted net, loaded after injection; and what only settings may change."""
from __future__ import annotations

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from nets import numbers

import mindpet_lite as mp
from mindpet_lite.delta import LoRADense

IDS = Tensor([[1, 2, 3, 4]], ms.int32)
STARTS = {"DoRA": {"use_dora": True}, "DoRA of an embedding": {"use_dora": True, "target_modules": ["embed"]},
          "PiSSA": {"init_lora_weights": "pissa"}, "OLoRA": {"init_lora_weights": "olora"},
          "tokens": {"trainable_token_indices": {"embed": [1, 3]}}, "module": {"modules_to_save": ["head"]},
          "biases": {"bias": "all"}}
EXACT = {name for name in STARTS if name not in ("PiSSA", "OLoRA")}


class Net(nn.Cell):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embed, self.q, self.head = nn.Embedding(12, 8), nn.Dense(8, 8), nn.Dense(8, 4)
        randomise(self, seed)

    def construct(self, ids):
        return self.head(ops.tanh(self.q(self.embed(ids))))


def randomise(net: nn.Cell, seed: int) -> None:
    """Give what trains other values, as an optimizer does: in place."""
    rng = np.random.default_rng(seed)
    for parameter in net.trainable_params():
        ops.assign(parameter, Tensor(rng.standard_normal(parameter.shape) / 2, parameter.dtype))


def adapted(net: nn.Cell, **settings) -> nn.Cell:
    return mp.get_pet_model(net, mp.LoraConfig(**{"lora_rank": 2, "lora_alpha": 4, "target_modules": ["q"],
                                                  **settings}))


def output(net: nn.Cell) -> np.ndarray:
    return net(IDS).asnumpy()


def switched_off(net: nn.Cell) -> np.ndarray:
    with mp.adapters_disabled(net):
        return output(net)


def close(name: str, value: np.ndarray, expected: np.ndarray) -> bool:
    """PiSSA and OLoRA round when they take a part out of the weight."""
    return np.array_equal(value, expected) if name in EXACT else np.abs(value - expected).max() < 2e-6


@pytest.fixture
def base():
    net = Net(1)
    ms.save_checkpoint(net, "base.ckpt")
    return net


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STARTS)
def test_a_base_that_is_loaded_after_injection_is_where_the_adapter_starts(name, base, mode):
    right, net = output(base), adapted(Net(2), **STARTS[name])
    output(net)
    ms.load_checkpoint("base.ckpt", net)
    assert close(name, output(net), right)
    if name in EXACT:
        assert np.array_equal(switched_off(net), right)
    # Loaded twice, another base, and by hand: what is left of a weight is not taken for a weight.
    ms.load_checkpoint("base.ckpt", net)
    assert close(name, output(net), right)
    if not name.startswith("DoRA of"):
        other = Net(3)
        for parameter in net.get_parameters():
            if parameter.name in other.parameters_dict():
                parameter.set_data(Tensor(other.parameters_dict()[parameter.name].asnumpy()))
        assert close(name, output(net), output(other))


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("seed", [1, 3])
def test_a_checkpoint_of_the_whole_adapted_net_gives_its_output_bit_for_bit(name, seed, base, pynative_mode):
    source = adapted(Net(1), **STARTS[name])
    for trained in (False, True):
        if trained:
            randomise(source, 5)
        ms.save_checkpoint(source, "whole.ckpt")
        net = adapted(Net(seed), **STARTS[name])
        ms.load_checkpoint("whole.ckpt", net)
        assert np.array_equal(output(net), output(source))
        for ours, theirs in zip(net.get_parameters(), source.get_parameters()):
            assert np.array_equal(ours.asnumpy(), theirs.asnumpy()), ours.name
        # A checkpoint that is kept, and read by hand, is left as it is.
        again, values = adapted(Net(seed), **STARTS[name]), ms.load_checkpoint("whole.ckpt")
        for parameter in again.get_parameters():
            parameter.set_data(values[parameter.name])
        assert np.array_equal(output(again), output(source))
        assert all(np.array_equal(values[item.name].asnumpy(), item.asnumpy()) for item in source.get_parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["PiSSA", "module", "DoRA"])
def test_a_base_and_then_what_trained_give_the_net_back(name, base, pynative_mode):
    source = adapted(Net(1), **STARTS[name])
    randomise(source, 5)
    ms.save_checkpoint([{"name": item.name, "data": item} for item in source.trainable_params()], "trained.ckpt")
    net = adapted(Net(2), **STARTS[name])
    for file in ("base.ckpt", "trained.ckpt"):
        ms.load_param_into_net(net, ms.load_checkpoint(file))
    assert np.array_equal(output(net), output(source))
    if name in EXACT:
        assert np.array_equal(switched_off(net), output(base))


@pytest.mark.parametrize("name", ["DoRA", "PiSSA", "tokens", "module"])
def test_a_base_under_what_has_trained_is_said_once_and_taken_by_hand(name, base, pynative_mode, capsys):
    net = adapted(Net(2), **STARTS[name])
    randomise(net, 5)
    values = {item.name: item.asnumpy().copy() for item in net.trainable_params()}
    ms.load_checkpoint("base.ckpt", net)
    with pytest.warns(UserWarning, match=rf"What {'head.weight, head.bias' if name == 'module' else '(q|embed)'} took "
                                         r"from the base is of the weights before.*refresh_base\(net\)"):
        mp.summary(net)
    with np.testing.suppress_warnings() as quiet:
        again = quiet.record(UserWarning)
        mp.save_adapter(net, "out")
        assert not again
    kept = {item.name for item in net.trainable_params() if np.array_equal(item.asnumpy(), values[item.name])}
    assert kept == ({name for name in values if "head" not in name} if name == "module" else set(values))
    assert mp.refresh_base(net) is net
    if name in ("module", "DoRA"):
        assert np.array_equal(switched_off(net), output(base))
    if name == "DoRA":
        # As LoRA on the new base.
        lora = adapted(Net(1))
        for item in lora.trainable_params():
            ops.assign(item, Tensor(values[item.name]))
        np.testing.assert_allclose(output(net), output(lora), atol=1e-6)
    if name == "tokens":
        assert np.array_equal(net.embed.mindpet_delta_lora_tokens.asnumpy(),
                              base.embed.embedding_table.asnumpy()[[1, 3]])
    if name == "PiSSA":
        assert close(name, output(net), output(base))
    mp.refresh_base(net)
    with mp.adapters_disabled(adapted(Net(1))) as other, pytest.raises(ValueError, match="leave the block"):
        mp.refresh_base(other)


@pytest.mark.parametrize("name", ["DoRA", "tokens"])
def test_a_copy_and_an_assignment_are_seen_at_the_next_call(name, base, pynative_mode):
    net = copy.deepcopy(adapted(Net(2), **STARTS[name]))
    ms.load_checkpoint("base.ckpt", net)
    assert np.array_equal(switched_off(net), output(base)) and np.array_equal(output(net), output(base))
    other = Net(3)
    for parameter in net.get_parameters():
        if parameter.name in other.parameters_dict():
            ops.assign(parameter, other.parameters_dict()[parameter.name])
    mp.merge(net)
    np.testing.assert_allclose(output(net), output(other), atol=1e-6)
    mp.unmerge(net)
    ms.load_checkpoint("base.ckpt", net)
    assert np.array_equal(output(net), output(base))


def test_layers_by_hand(base, pynative_mode):
    x, dense, other = Tensor(np.random.default_rng(0).standard_normal((3, 8)), ms.float32), nn.Dense(8, 8), Net(1).q
    layer = LoRADense.from_dense(dense, 2, 4, use_dora=True)
    layer.weight.set_data(other.weight)
    layer.bias.set_data(other.bias)
    assert np.array_equal(layer(x).asnumpy(), other(x).asnumpy())
    for make in (lambda: LoRADense(8, 8, 2, 4, init_lora_weights="pissa"),
                 lambda: LoRADense.from_dense(dense, 2, 4, init_lora_weights="olora")):
        with pytest.raises(ValueError, match="get_pet_model"):
            make()


def test_a_net_that_is_not_adapted_after_all_is_not_watched(pynative_mode):
    net = Net(1)
    with pytest.raises(ValueError, match="typo"):
        adapted(net, use_dora=True, modules_to_save=["typo"])
    assert all("set_data" not in vars(item) for item in net.get_parameters())
    adapted(net, modules_to_save=["head"], use_dora=True)
    mp.merge(net)
    assert all("set_data" not in vars(item) for item in net.get_parameters())


# What only settings may change

def scaled(alpha: float, **settings) -> nn.Cell:
    net = adapted(Net(1), lora_alpha=alpha, **settings)
    randomise(net, 5)
    return net


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_a_checkpoint_of_another_alpha_or_strength_leaves_what_the_settings_say(settings, mode):
    ms.save_checkpoint(scaled(4, **settings), "four.ckpt")
    net = adapted(Net(2), lora_alpha=16, **settings)
    with pytest.warns(UserWarning, match="another scaling.*adapt the net with those") as seen:
        ms.load_checkpoint("four.ckpt", net)
    assert seen[0].filename == __file__
    before = output(net)
    assert np.array_equal(before, output(scaled(16, **settings))) and net.q.settings()["lora_alpha"] == 16
    mp.save_adapter(net, "sixteen")
    assert np.array_equal(output(mp.load_adapter(Net(1), "sixteen")), before)
    with mp.adapters_disabled(net):
        ms.save_checkpoint(net, "off.ckpt")
    assert np.array_equal(output(net), before)
    mp.set_lora_scale(net, 0.5)
    half = output(net)
    with pytest.warns(UserWarning, match="another scaling"):
        ms.load_checkpoint("off.ckpt", net)
    assert np.array_equal(output(net), half) and net.q.strength == 0.5
    mp.merge(net)
    np.testing.assert_allclose(output(net), half, atol=2e-5)


NETS = {"LoRA": lambda: scaled(4), "DoRA": lambda: scaled(4, use_dora=True),
        "tokens": lambda: adapted(Net(1), trainable_token_indices={"embed": [1]}),
        "adapter": lambda: mp.get_pet_model(Net(1), mp.AdapterConfig(bottleneck_size=2, target_modules=["q"])),
        "low_rank": lambda: mp.get_pet_model(Net(1), mp.LowRankAdapterConfig(reduction_factor=4,
                                                                             target_modules=["q"]))}


@pytest.mark.parametrize("name", NETS)
def test_no_pattern_of_names_and_no_thaw_trains_a_scaling(name, mode):
    net = NETS[name]()
    for thaw in (lambda item: "lora" in item.name or "delta" in item.name or "adapter" in item.name,
                 lambda item: True):
        for item in net.get_parameters():
            item.requires_grad = thaw(item)
        held = {id(item) for item in net.trainable_params()}
        live = [item for item in net.get_parameters() if item.name.endswith(("scaling", "strength_factor"))]
        assert live and not any(id(item) in held or thaw is None for item in live)
        assert not any(word in item.name for item in live for word in ("lora", "delta", "adapter", "prefix", "bias"))
    before = [item.asnumpy().copy() for item in live]
    step = nn.TrainOneStepCell(net, nn.Momentum(list(net.trainable_params()), 0.1, 0.9, weight_decay=0.1))
    step(IDS)
    copied = copy.deepcopy(net)
    assert [item.asnumpy() for item in live] == before
    assert not any(item.name.endswith("scaling") for item in copied.trainable_params())


def test_a_scaling_that_was_assigned_is_written_again(mode, capsys):
    for call in (mp.summary, lambda net: mp.save_adapter(net, "out"), mp.merge, lambda net: mp.set_lora_scale(net, 1)):
        net = scaled(4)
        before = output(net)
        ops.assign(net.q.scaling, Tensor(7.0, ms.float32))
        with pytest.warns(UserWarning, match="The scaling of q was not what the settings say"):
            call(net)
        np.testing.assert_allclose(output(net), before, atol=1e-5)


def test_checkpoints_with_the_old_names_load(pynative_mode):
    source = scaled(4)
    entries = [{"name": item.name.replace("q.scaling", "q.lora_scaling"), "data": item}
               for item in source.get_parameters()]
    ms.save_checkpoint(entries, "old.ckpt")
    net = adapted(Net(2), lora_alpha=4)
    missing, unread = ms.load_param_into_net(net, ms.load_checkpoint("old.ckpt"))
    assert (missing, unread) == (["q.scaling"], ["q.lora_scaling"])
    assert np.array_equal(output(net), output(source)) and float(numbers(net.q.scaling)) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("settings", [{"modules_to_save": ["head"]}, {"bias": "all"}], ids=["module", "biases"])
def test_a_value_that_is_loaded_without_a_base_is_the_adapters(settings, by_hand, base, pynative_mode):
    source = adapted(Net(1), **settings)
    randomise(source, 5)
    values = {item.name: item for item in source.trainable_params() if "lora" not in item.name}
    net = adapted(Net(1), **settings)
    if by_hand:
        for item in net.trainable_params():
            if item.name in values:
                item.set_data(Tensor(values[item.name].asnumpy()))
    else:
        ms.save_checkpoint([{"name": name, "data": item} for name, item in values.items()], "part.ckpt")
        ms.load_param_into_net(net, ms.load_checkpoint("part.ckpt"))
    assert np.array_equal(switched_off(net), output(base)) and not np.array_equal(output(net), output(base))
    mp.save_adapter(net, "out")
    assert np.array_equal(output(mp.load_adapter(Net(1), "out")), output(net))


# A start that takes a part out of the base

class Shared(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Dense(8, 8, has_bias=False), nn.Dense(8, 8, has_bias=False)
        self.k.weight = self.q.weight

    def construct(self, x):
        return self.q(x) + 2 * self.k(x)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("targets", [["q"], ["q", "k"]])
def test_no_part_is_taken_out_of_a_weight_that_another_layer_uses(start, targets, pynative_mode):
    net, x = Shared(), Tensor(np.eye(8), ms.float32)
    before, weight = net(x).asnumpy(), net.q.weight.asnumpy()
    with pytest.raises(ValueError, match="takes a part out of the weight, which stands at q.weight, k.weight.*of its "
                                         "own"):
        adapted(net, target_modules=targets, init_lora_weights=start)
    assert np.array_equal(net(x).asnumpy(), before) and np.array_equal(net.q.weight.asnumpy(), weight)


@pytest.mark.parametrize("name", ["PiSSA", "OLoRA"])
def test_loading_into_a_net_with_a_start_takes_nothing_out_again(name, base, pynative_mode):
    net = adapted(Net(2), **STARTS[name])
    randomise(net, 5)
    mp.save_adapter(net, "out")
    # Another residual, as from a checkpoint of the net in training.
    ops.assign(net.q.weight, base.q.weight)
    before = output(net)
    mp.load_adapter(net, "out")
    assert np.array_equal(net.q.weight.asnumpy(), base.q.weight.asnumpy()) and np.array_equal(output(net), before)


# MindSpore's other ways to load

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["DoRA", "PiSSA", "OLoRA", "tokens"])
def test_a_base_by_load_state_dict(name, base, mode):
    net = adapted(Net(2), **STARTS[name])
    output(net)
    net.load_state_dict(base.state_dict(), strict=False)
    assert close(name, output(net), output(base))
    net.q.weight.assign_value(Net(3).q.weight)
    net.q.bias.assign_value(Net(3).q.bias)
    other = Net(1)
    other.q = Net(3).q
    assert close(name, output(net), output(other))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_a_state_dict_of_another_alpha_leaves_what_the_settings_say(settings, mode):
    net = adapted(Net(2), lora_alpha=16, **settings)
    with pytest.warns(UserWarning, match="another scaling"):
        net.load_state_dict(scaled(4, **settings).state_dict(), strict=False)
    assert np.array_equal(output(net), output(scaled(16, **settings)))


def test_an_optimizer_of_a_scaling_is_refused(pynative_mode):
    net = scaled(4)
    with pytest.raises(ValueError, match="it holds q.scaling, which the settings say.*net.get_parameters"):
        mp.check_optimizer(net, nn.Adam(list(net.get_parameters()), 1e-2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["module", "biases"])
def test_a_base_in_several_files_is_one_base(name, base, pynative_mode):
    held = {item.name: item for item in base.get_parameters()}
    net = adapted(Net(2), **STARTS[name])
    for part in (["embed.embedding_table", "q.weight"], ["q.bias"], ["head.weight", "head.bias"]):
        ms.save_checkpoint([{"name": item, "data": held[item]} for item in part], "part.ckpt")
        ms.load_param_into_net(net, ms.load_checkpoint("part.ckpt"))
    assert np.array_equal(output(net), output(base)) and np.array_equal(switched_off(net), output(base))
    # What the base gave already, another file gives the adapter.
    ms.save_checkpoint([{"name": "head.bias", "data": Tensor(np.ones(4, np.float32))}], "part.ckpt")
    ms.load_param_into_net(net, ms.load_checkpoint("part.ckpt"))
    assert np.array_equal(switched_off(net), output(base)) and not np.array_equal(output(net), output(base))


def put_by_hand(net: nn.Cell, values: dict[str, np.ndarray]) -> None:
    for item in net.get_parameters():
        if item.name in values:
            item.set_data(Tensor(values[item.name]))


@pytest.mark.parametrize("name", ["PiSSA", "OLoRA", "module"])
def test_a_base_and_an_adapter_by_one_helper_are_two(name, base, pynative_mode):
    source = adapted(Net(1), **STARTS[name])
    randomise(source, 5)
    net = adapted(Net(2), **STARTS[name])
    put_by_hand(net, {item.name: item.asnumpy() for item in base.get_parameters()})
    put_by_hand(net, {item.name: item.asnumpy() for item in source.trainable_params()})
    assert np.array_equal(output(net), output(source))


def test_an_adapter_with_a_residual_start_loads_onto_its_base_without_a_word(base, pynative_mode, recwarn):
    net = adapted(Net(1), init_lora_weights="pissa")
    mp.save_adapter(net, "out")
    mp.load_adapter(Net(1), "out", strict_base=True)
    assert not recwarn.list


@pytest.mark.filterwarnings("error")
def test_a_base_without_the_first_layer_is_one(base, pynative_mode):
    held = {item.name: item for item in base.get_parameters()}
    net = adapted(Net(2), target_modules=["embed", "q"], modules_to_save=["head"])
    ms.save_checkpoint([{"name": name, "data": held[name]} for name in ("q.weight", "head.weight", "head.bias")],
                       "part")
    ms.load_param_into_net(net, ms.load_checkpoint("part.ckpt"))
    off = switched_off(net)
    assert np.array_equal(off, output(net))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["head"]}, {"bias": "all"}])
def test_a_parameter_that_was_written_to_by_slices(settings, pynative_mode):
    net = adapted(Net(2), **settings)
    net.head.bias[:] = Tensor(np.ones(4, np.float32))
    trained = output(net)
    with mp.adapters_disabled(net):
        assert not np.array_equal(output(net), trained)
    assert np.array_equal(output(net), trained)
