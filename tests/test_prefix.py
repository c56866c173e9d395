"""Prefix-Tuning: the layer in an attention that one writes, the Dense in one that exists, folding, masks."""
from __future__ import annotations

import copy
import functools
import inspect
import warnings

import mindspore as ms
import numpy as np
import pytest
import reference_prefix as reference
from cases_prefix import parts_of
from mindspore import Parameter, Tensor, nn, ops
from nets import TOLERANCE, gradients_of, inputs, load_values, numbers, randomise, unchanged
from safetensors.numpy import load_file

import mindpet_lite as mp
from mindpet_lite.delta import (
    LoRADense,
    PrefixDense,
    PrefixLayer,
    PrefixTuningConfig,
    prefix_mask,
    prepend_prefix,
)
from mindpet_lite.graph import fold_prefixes

ROWS, WIDTH, HEADS = 4, 6, 2
SIZES = {"prefix_token_num": ROWS, "batch_size": 2, "num_heads": HEADS, "hidden_dim": WIDTH, "embed_dim": 5,
         "mid_dim": 7}
DENSE = {"prefix_token_num": ROWS, "embed_dim": 5, "mid_dim": 7, "dropout_rate": 0}


def attend(query, key, value, mask=None):
    """Return softmax(Q Kᵀ / √d) V over however many rows key and value have."""
    batch, length, width = query.shape
    q, k, v = (ops.transpose(ops.reshape(item, (batch, item.shape[1], HEADS, width // HEADS)), (0, 2, 1, 3))
               for item in (query, key, value))
    scores = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / (width // HEADS) ** 0.5
    if mask is not None:
        scores = scores + (1 - mask) * -1e9
    y = ops.matmul(ops.softmax(scores, -1), v)
    return ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (batch, length, width))


class Attention(nn.Cell):
    """An attention as it stands in a net, without any prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, WIDTH)

    def construct(self, x):
        return attend(self.to_q(x), self.to_k(x), self.to_v(x))


class WithLayer(Attention):
    """The same with a PrefixLayer, read in `construct`."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.prefix = PrefixLayer(**{**SIZES, "dropout_rate": 0, **settings})

    def construct(self, x):
        key = prepend_prefix(self.prefix.past_key_reparam, self.to_k(x))
        value = prepend_prefix(self.prefix.past_value_reparam, self.to_v(x))
        return attend(self.to_q(x), key, value)


class MindPetsWay(nn.Cell):
    """MindPet's documented example: the prefixes are kept in `__init__`."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, WIDTH)
        self.prefix = PrefixLayer(**{**SIZES, "dropout_rate": 0, **settings})
        self.past_key = self.prefix.past_key_reparam
        self.past_value = self.prefix.past_value_reparam

    def construct(self, x):
        key = ops.concat((self.past_key, self.to_k(x)), 0)
        value = ops.concat((self.past_value, self.to_v(x)), 0)
        return ops.matmul(ops.softmax(ops.matmul(x, ops.transpose(key, (1, 0))), -1), value)


class Net(nn.Cell):
    """Two blocks and a head."""

    def __init__(self, block, **settings) -> None:
        super().__init__()
        self.blocks = nn.CellList([block(**settings), block(**settings)])
        self.head = nn.Dense(WIDTH, 3)

    def construct(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def train(net, x, steps=50):
    target = Tensor(np.ones(net(x).shape, np.float32))
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 1e-2)).set_train()
    losses = [float(step(x, target).asnumpy()) for _ in range(steps)]
    net.set_train(False)
    return losses


def values_of(net):
    return {item.name: item.asnumpy().copy() for item in net.get_parameters()}


def both_modes(check):
    """Return what `check` gives in graph mode and in PyNative mode."""
    before = ms.get_context("mode")
    found = []
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        found.append(check())
    ms.set_context(mode=before)
    return found


# The layer in an attention that one writes

def test_defect_14_prefix_keys_and_values_differ_and_train(tmp_path):
    start = Net(WithLayer)
    x = inputs(2, 3, WIDTH)
    mp.freeze_delta(start, "prefix")
    layer = start.blocks[0].prefix
    assert not np.allclose(layer.past_key_reparam.asnumpy(), layer.past_value_reparam.asnumpy())

    def run():
        net = Net(WithLayer)
        load_values(net, start)
        mp.freeze_delta(net, "prefixtuning")
        keys = net.blocks[0].prefix.past_key_reparam.asnumpy()
        before = values_of(net)
        losses = train(net, x)
        moved = {name for name, value in values_of(net).items() if not np.array_equal(value, before[name])}
        assert moved == {item.name for item in net.trainable_params()}
        assert {name.split("prefix.", 1)[1] for name in moved} == {
            "mindpet_delta_prefixtuning_wte.embedding_table",
            *(f"mindpet_delta_prefixtuning_control_trans.{name}" for name in ("0.weight", "0.bias", "2.weight",
                                                                              "2.bias"))}
        assert not np.allclose(net.blocks[0].prefix.past_key_reparam.asnumpy(), keys)
        mp.save_adapter(net, tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert set(stored) == moved
        fresh = Net(WithLayer)
        load_values(fresh, start)
        mp.load_adapter(fresh, tmp_path / "adapter")
        assert np.array_equal(fresh(x).asnumpy(), net(x).asnumpy())
        return losses

    graph, pynative = both_modes(run)
    assert graph[-1] < 0.9 * graph[0]
    np.testing.assert_allclose(graph, pynative, rtol=1e-4)


def test_a_prefix_kept_in_init_trains_itself_and_says_so(tmp_path):
    x = inputs(3, WIDTH)
    with pytest.warns(UserWarning, match=r"past_key_reparam is read in MindPetsWay.__init__.*construct\(\)") as caught:
        start = Net(MindPetsWay)
    assert len(caught) == 2 and {item.filename for item in caught} == {__file__}

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net, fresh = Net(MindPetsWay), Net(MindPetsWay)
        for item in (net, fresh):
            load_values(item, start)
        mp.freeze_delta(net, "prefix", exclude=["head*"])
        before = values_of(net)
        losses = train(net, x)
        moved = {name for name, value in values_of(net).items() if not np.array_equal(value, before[name])}
        assert moved == {"head.weight", "head.bias",
                         *(f"blocks.{i}.past_{kind}" for i in (0, 1) for kind in ("key", "value"))}
        mp.freeze_delta(net, "prefix")
        mp.save_adapter(net, tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert set(stored) == {f"blocks.{i}.prefix.mindpet_delta_prefixtuning_{kind}" for i in (0, 1)
                               for kind in ("key", "value")}
        fresh.head = net.head
        mp.load_adapter(fresh, tmp_path / "adapter")
        assert np.array_equal(fresh(x).asnumpy(), net(x).asnumpy())
        return losses

    graph, pynative = both_modes(run)
    assert graph[-1] < graph[0]
    np.testing.assert_allclose(graph, pynative, rtol=1e-4)


def test_a_prefix_without_projection_may_be_kept_in_init():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cell = MindPetsWay(prefix_projection=False)
    assert cell.past_key is cell.prefix.mindpet_delta_prefixtuning_key
    assert cell.past_value is cell.prefix.mindpet_delta_prefixtuning_value


def test_reading_outside_a_cell_changes_nothing():
    layer = PrefixLayer(**SIZES)
    with warnings.catch_warnings(), unchanged(layer):
        warnings.simplefilter("error")
        assert layer.past_key_reparam.shape == layer.past_value_reparam.shape == (ROWS, WIDTH)


class CallsInInit(nn.Cell):
    """A net that runs once while another one is built."""

    def __init__(self, inner, x) -> None:
        super().__init__()
        inner(x)
        self.inner = inner


def test_a_forward_inside_another_init_is_a_forward(mode):
    inner = WithLayer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CallsInInit(inner, inputs(2, 3, WIDTH))
    assert inner.prefix.prefix_projection


class Named(PrefixLayer):
    """A subclass that adds nothing."""


class WithSubclass(WithLayer):
    def __init__(self) -> None:
        super().__init__()
        self.prefix = Named(**SIZES, dropout_rate=0)


def test_a_subclass_trains_too(mode):
    net = WithSubclass()
    mp.freeze_delta(net, "prefix")
    assert len(net.trainable_params()) == 5
    _, _, found = gradients_of(net, net.trainable_params(), inputs(2, 3, WIDTH), np.ones((2, 3, WIDTH)) * np.arange(6))
    assert all(np.any(item.asnumpy()) for item in found)


def test_signature_is_mindpets():
    parameters = inspect.signature(PrefixLayer).parameters
    assert list(parameters)[:7] == ["prefix_token_num", "batch_size", "num_heads", "hidden_dim", "embed_dim",
                                    "mid_dim", "dropout_rate"]
    assert (parameters["mid_dim"].default, parameters["dropout_rate"].default) == (512, 0.1)


def test_names_shapes_and_what_never_trains():
    layer = PrefixLayer(**SIZES)
    assert {item.name: item.shape for item in layer.get_parameters()} == {
        "mindpet_delta_prefixtuning_input_tokens": (4,),
        "mindpet_delta_prefixtuning_wte.embedding_table": (4, 5),
        "mindpet_delta_prefixtuning_control_trans.0.weight": (7, 5),
        "mindpet_delta_prefixtuning_control_trans.0.bias": (7,),
        "mindpet_delta_prefixtuning_control_trans.2.weight": (12, 7),
        "mindpet_delta_prefixtuning_control_trans.2.bias": (12,)}
    assert isinstance(layer.mindpet_delta_prefixtuning_wte, nn.Embedding)
    assert not layer.input_tokens.requires_grad
    net = nn.SequentialCell(layer)
    report = mp.freeze_delta(net, "prefixtuning")
    assert not layer.input_tokens.requires_grad and report.trainable == report.total == 4 * 5 + 35 + 7 + 84 + 12


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=["fp32", "fp16"])
def test_values_are_the_references(dtype, mode):
    layer = PrefixLayer(**SIZES, dropout_rate=0, param_init_type=dtype)
    randomise(layer.mindpet_delta_prefixtuning_control_trans)
    randomise(layer.mindpet_delta_prefixtuning_wte)
    expected = reference.mlp(*(numbers(item) for item in parts_of(layer)))
    key, value = layer()
    assert key.dtype == value.dtype == dtype
    np.testing.assert_allclose(numbers(key), expected[:, :WIDTH], **TOLERANCE[dtype])
    np.testing.assert_allclose(numbers(value), expected[:, WIDTH:], **TOLERANCE[dtype])
    assert np.array_equal(numbers(layer.past_key_reparam), numbers(key))
    assert np.array_equal(numbers(layer.past_value_reparam), numbers(value))


def test_bfloat16_parameters():
    layer = PrefixLayer(**SIZES, param_init_type=ms.bfloat16)
    assert {str(item.dtype) for item in layer.trainable_params()} == {"BFloat16"}


def test_dropout_works_in_training_only_and_is_not_there_at_0(mode):
    layer = PrefixLayer(**{**SIZES, "hidden_dim": 200}, dropout_rate=0.5).set_train(False)
    still = layer()[0].asnumpy()
    assert np.array_equal(still, layer()[0].asnumpy()) and np.all(still != 0)
    key, value = (item.asnumpy() for item in layer.set_train()())
    for dropped in (key, value):
        assert 0.4 < np.mean(dropped == 0) < 0.6
    np.testing.assert_allclose(key[key != 0], 2 * still[key != 0], rtol=1e-6)
    assert not PrefixLayer(**SIZES, dropout_rate=0).has_dropout


@pytest.mark.parametrize("name", ["prefix_token_num", "batch_size", "num_heads", "hidden_dim", "embed_dim", "mid_dim"])
def test_sizes_are_positive_ints(name):
    for value in (2.0, True, "2", None):
        with pytest.raises(TypeError, match=f"{name} must be a positive int"):
            PrefixLayer(**{**SIZES, name: value})
    for value in (0, -2):
        with pytest.raises(ValueError, match=f"{name} must be a positive int"):
            PrefixLayer(**{**SIZES, name: value})


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="multiple of batch_size, but got 4 and 3"):
        PrefixLayer(**{**SIZES, "batch_size": 3})
    for value in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="dropout_rate"):
            PrefixLayer(**SIZES, dropout_rate=value)
    with pytest.raises(TypeError, match="dropout_rate"):
        PrefixLayer(**SIZES, dropout_rate="0.1")
    with pytest.raises(TypeError, match="prefix_projection"):
        PrefixLayer(**SIZES, prefix_projection=1)
    with pytest.raises(TypeError, match="param_init_type"):
        PrefixLayer(**SIZES, param_init_type=ms.int32)


# Masks and rows

class Masking(nn.Cell):
    def __init__(self, visible) -> None:
        super().__init__()
        self.visible = visible

    def construct(self, mask):
        return prefix_mask(mask, 2, self.visible)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 3), (2, 1, 3, 3), (2, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype, visible", [(ms.float32, 1), (ms.float16, 0), (ms.int32, 1), (ms.bool_, True),
                                            (ms.bool_, False), (ms.float32, -0.5)], ids=str)
def test_masks_get_columns_on_the_left(shape, dtype, visible, mode):
    mask = Tensor(np.random.default_rng(0).integers(0, 2, shape)).astype(dtype)
    found = Masking(visible)(mask)
    assert found.dtype == dtype
    expected = np.concatenate([np.full((*shape[:-1], 2), visible), mask.asnumpy()], -1)
    assert np.array_equal(found.asnumpy(), expected)


def test_masks_that_are_none_are_refused(mode):
    for shape in ((3,), (1, 2, 1, 3, 3)):
        with pytest.raises(ValueError, match="attention_mask must have the axes"):
            Masking(1)(Tensor(np.ones(shape, np.float32)))
    with pytest.raises(ValueError, match="prefix_token_num must be a positive int"):
        prefix_mask(Tensor(np.ones((2, 3), np.float32)), 0, 1)


def test_rows_need_an_axis_for_the_sequence(mode):
    with pytest.raises(ValueError, match="the axes .*sequence, width.*shape is"):
        PrefixDense(6, 4, **DENSE)(inputs(6))
    with pytest.raises(ValueError, match="sequence"):
        prepend_prefix(inputs(2, 6), inputs(6))


# The Dense in an attention that exists

@pytest.mark.parametrize("projection", [True, False], ids=["MLP", "no MLP"])
def test_an_attention_with_injected_prefixes_is_the_references(projection, mode):
    net = mp.get_pet_model(Attention(), PrefixTuningConfig(target_modules=["to_k", "to_v"], **DENSE,
                                                           prefix_projection=projection))
    randomise(net)
    x, weights = inputs(2, 3, WIDTH), np.random.default_rng(1).standard_normal((2, 3, WIDTH))
    parts = {name: parts_of(getattr(net, name)) for name in ("to_k", "to_v")}
    values = {name: [numbers(item) for item in items] for name, items in parts.items()}
    prefix = {name: reference.mlp(*items) if projection else items[0] for name, items in values.items()}
    assert not np.allclose(prefix["to_k"], prefix["to_v"])
    w = {name: numbers(getattr(net, name).weight) for name in ("to_q", "to_k", "to_v")}
    b = {name: numbers(getattr(net, name).bias) for name in w}
    query = numbers(x) @ w["to_q"].T + b["to_q"]
    rows = {name: reference.dense(numbers(x), w[name], b[name], prefix[name]) for name in prefix}
    expected = reference.attention(query, rows["to_k"], rows["to_v"], HEADS)
    by = dict(zip(("to_q", "to_k", "to_v"),
                  reference.attention_gradients(query, rows["to_k"], rows["to_v"], HEADS, weights)))
    by_x, wanted = by["to_q"] @ w["to_q"], []
    for name in ("to_k", "to_v"):
        from_x, _, _, by_prefix = reference.dense_gradients(numbers(x), w[name], ROWS, by[name])
        by_x = by_x + from_x
        wanted += reference.mlp_gradients(*values[name][:4], by_prefix) if projection else [by_prefix]
    y, found_x, found = gradients_of(net, parts["to_k"] + parts["to_v"], x, weights)
    np.testing.assert_allclose(numbers(y), expected, **TOLERANCE[ms.float32])
    np.testing.assert_allclose(numbers(found_x), by_x, **TOLERANCE[ms.float32])
    for value, item in zip(found, wanted):
        np.testing.assert_allclose(numbers(value), item, rtol=1e-5, atol=1e-6 * max(1, np.abs(item).max()))


class Masked(Attention):
    """A causal self-attention whose mask is made for the sequence alone, and extended for the prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = Tensor(np.tril(np.ones((1, 1, 3, 3), np.float32)))

    def construct(self, x):
        return attend(self.to_q(x), self.to_k(x), self.to_v(x), prefix_mask(self.mask, ROWS, 1))


def test_a_masked_attention_takes_the_extended_mask(mode):
    net = mp.get_pet_model(Masked(), PrefixTuningConfig(target_modules=["to_k", "to_v"], **DENSE))
    randomise(net)
    x = inputs(2, 3, WIDTH)
    rows = [numbers(item(x)) for item in (net.to_q, net.to_k, net.to_v)]
    hidden = np.concatenate([np.zeros((3, ROWS), bool), np.triu(np.ones((3, 3), bool), 1)], -1)
    np.testing.assert_allclose(numbers(net(x)), reference.attention(*rows, HEADS, hidden), **TOLERANCE[ms.float32])


class Grouped(nn.Cell):
    """An attention with one head of keys and values for two of queries."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // HEADS
        self.to_q, self.to_k, self.to_v = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, half), nn.Dense(WIDTH, half)

    def construct(self, x):
        return attend(self.to_q(x), ops.tile(self.to_k(x), (1, 1, HEADS)), ops.tile(self.to_v(x), (1, 1, HEADS)))


@pytest.mark.parametrize("settings", [PrefixTuningConfig(target_modules=["to_k", "to_v"], **DENSE), mp.Ptuning2Config(
    target_modules=["to_k", "to_v"], pre_seq_len=ROWS, dropout_prob=0)], ids=["prefixtuning", "ptuning2"])
def test_fewer_heads_of_keys_than_of_queries(settings, mode):
    net = mp.get_pet_model(Grouped(), settings)
    randomise(net)
    x = inputs(2, 3, WIDTH)
    query, key, value = (numbers(item(x)) for item in (net.to_q, net.to_k, net.to_v))
    assert key.shape == (2, ROWS + 3, WIDTH // HEADS)
    wanted = reference.attention(query, *(np.tile(item, HEADS) for item in (key, value)), HEADS)
    np.testing.assert_allclose(numbers(net(x)), wanted, **TOLERANCE[ms.float32])


class RotaryEmbedding(nn.Cell):
    def construct(self, x):
        return x


class Turned(Attention):
    """An attention that turns queries and keys by their places."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = RotaryEmbedding()

    def construct(self, x):
        return attend(self.turn(self.to_q(x)), self.turn(self.to_k(x)), self.to_v(x))


def apply_rotary(x, freqs_cis):
    return x * freqs_cis


class TurnedByFunction(Attention):
    def construct(self, x):
        return attend(apply_rotary(self.to_q(x), 1), apply_rotary(self.to_k(x), 1), self.to_v(x))


class TurnedByHelper(Attention):
    """Nothing but what the helper does tells."""

    def construct(self, x):
        return attend(self.turned(self.to_q(x)), self.turned(self.to_k(x)), self.to_v(x))

    def turned(self, x):
        return helper(x)


def helper(x):
    angles = ops.arange(x.shape[1])[:, None]
    return x * ops.cos(angles) + x * ops.sin(angles)


def through(function):
    @functools.wraps(function)
    def wrapped(self, x):
        return function(self, x)
    return wrapped


class Inherited(TurnedByHelper):
    def construct(self, x):
        return super().construct(x)


class Kept(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.change = helper

    @through
    def construct(self, x):
        return attend(self.change(self.to_q(x)), self.change(self.to_k(x)), self.to_v(x))


class FromTheModel(Attention):
    """As transformers' Llama."""

    def construct(self, x, position_embeddings=None):
        return attend(self.to_q(x), self.to_k(x), self.to_v(x))


class Stored(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mask = Tensor(np.tril(np.ones((8, 8), np.float32)))

    def construct(self, x):
        seen = self.mask[: x.shape[1], : x.shape[1] + ROWS]
        return attend(self.to_q(x), self.to_k(x), self.to_v(x)) + 0 * seen[0, 0]


class Causal(Attention):
    def construct(self, x):
        return attend(self.to_q(x), self.to_k(x), self.to_v(x)) + 0 * ops.tril(ops.ones((3, 3)))[0, 0]


class Relative(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(8, HEADS)


class Fused(Attention):
    def construct(self, x):
        return ops.flash_attention_score(self.to_q(x), self.to_k(x), self.to_v(x), HEADS)


@pytest.mark.parametrize("attention, message", [
    (Turned, r"blocks.0 takes positions from the place of each key \(RotaryEmbedding\)"),
    (TurnedByFunction, r"takes positions from the place of each key \(apply_rotary, freqs_cis\)"),
    (TurnedByHelper, r"takes positions from the place of each key \(cos and sin\)"),
    (Inherited, "cos and sin"), (Kept, "cos and sin"),
    (FromTheModel, r"takes positions from the place of each key \(input position_embeddings\)"),
    (Stored, "makes its mask itself .a stored mask, cut from its first row and column"),
    (Causal, r"makes its mask itself \(tril\), without columns for a prefix"),
    (Relative, "relative_attention_bias"), (Fused, "is a fused one .flash_attention_score")])
@pytest.mark.parametrize("settings", [PrefixTuningConfig(target_modules=["to_k", "to_v"], **DENSE), mp.Ptuning2Config(
    target_modules=["to_k", "to_v"], pre_seq_len=ROWS)], ids=["prefixtuning", "ptuning2"])
def test_an_attention_that_a_prefix_would_shift_is_refused(attention, message, settings, tmp_path):
    net = Net(attention)
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.get_pet_model(net, settings)
    mp.save_adapter(mp.get_pet_model(Net(Attention), settings), "adapter")
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.load_adapter(net, "adapter")
    mp.get_pet_model(net, mp.LoraConfig(target_modules=["to_k", "to_v"], lora_rank=2))


class Absolute(Attention):
    """As transformers' BERT, which can have relative positions too."""

    def __init__(self) -> None:
        super().__init__()
        self.position_embedding_type = "absolute"

    def construct(self, x):
        if self.position_embedding_type == "relative_key":
            x = helper(x)
        return attend(self.to_q(x), self.to_k(x), self.to_v(x))


class Plain(Attention):
    """Names that sound like positions and are none."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_drop, self.position_embeddings = nn.Dropout(p=0.1), nn.Embedding(4, 6)
        self.mask = Tensor(np.tril(np.ones((8, 8), np.float32)))

    def construct(self, x):
        y = attend(self.to_q(x), self.to_k(x), self.to_v(x))
        keys, queries = ROWS + x.shape[1], x.shape[1]
        # As transformers' GPT-2 cuts its mask: from the right.
        rel_error = self.mask[keys - queries: keys, :keys]
        return self.pos_drop(y) + 0 * rel_error[0, 0]


@pytest.mark.parametrize("attention", [Absolute, Plain])
def test_names_that_mean_no_positions_of_keys_are_no_reason(attention):
    mp.get_pet_model(Net(attention), PrefixTuningConfig(target_modules=["to_k", "to_v"], **DENSE))


def test_names_of_injected_prefixes_stand_beside_the_weight():
    net = mp.get_pet_model(Net(Attention), PrefixTuningConfig(target_modules=["to_v"], **DENSE))
    assert [item.name for item in net.blocks[1].to_v.trainable_params()] == [
        f"blocks.1.to_v.mindpet_delta_prefixtuning_{name}"
        for name in ("wte.embedding_table", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight",
                     "control_trans.2.bias")]
    assert {path: item.name for path, item in net.parameters_and_names()} == {
        path: path for path, _ in net.parameters_and_names()}


def test_dropout_of_an_injected_prefix_works_in_training_only(mode):
    dense = nn.Dense(6, 200).set_train()
    layer = PrefixTuningConfig(**{**DENSE, "dropout_rate": 0.5}).adapt(dense)
    y = layer(inputs(2, 3, 6)).asnumpy()
    assert 0.4 < np.mean(y[:, :ROWS] == 0) < 0.6 and np.all(y[:, ROWS:] != 0)
    assert np.array_equal(y[0, :ROWS], y[1, :ROWS])
    assert np.all(layer.set_train(False)(inputs(2, 3, 6)).asnumpy() != 0)


def test_activation_and_precision_are_the_denses(mode):
    layer = PrefixDense(6, 4, **DENSE, activation="relu", has_bias=False, dtype=ms.float16)
    x = inputs(2, 3, 6, dtype=ms.float16)
    expected = np.maximum(numbers(x) @ numbers(layer.weight).T, 0)
    np.testing.assert_allclose(numbers(layer(x))[:, ROWS:], expected, **TOLERANCE[ms.float16])
    np.testing.assert_allclose(numbers(layer(x))[0, :ROWS], numbers(layer.prefix_rows()), rtol=1e-3)
    layer = PrefixDense(6, 4, **DENSE).to_float(ms.float16)
    x = inputs(2, 3, 6)
    y, expected = layer(x), numbers(x) @ numbers(layer.weight).T + numbers(layer.bias)
    assert y.dtype == ms.float16
    np.testing.assert_allclose(numbers(y)[:, ROWS:], expected, **TOLERANCE[ms.float16])
    # The prefix keeps the type of its own Parameters, also below an outer to_float().
    rows = nn.SequentialCell(layer).to_float(ms.float16)[0].prefix_rows()
    assert rows.dtype == ms.float32 and np.array_equal(rows.asnumpy().astype(np.float16), y.asnumpy()[0, :ROWS])


def test_config_from_yaml_and_its_refusals(tmp_path):
    (tmp_path / "pet.yaml").write_text("pet_config:\n  pet_type: prefixtuning\n  prefix_token_num: 4\n  mid_dim: 7\n"
                                       "  embed_dim: 5\n  dropout_rate: 0\n  target_modules: [to_k, to_v]\n")
    net = mp.get_pet_model(Net(Attention), str(tmp_path / "pet.yaml"))
    assert net.blocks[0].to_k.settings() == {**DENSE, "prefix_projection": True}
    with pytest.raises(ValueError, match="'all-linear' would lengthen every sequence"):
        PrefixTuningConfig(target_modules="all-linear")
    for field, value, error in (("prefix_token_num", 0, ValueError), ("mid_dim", 1.5, TypeError),
                                ("embed_dim", True, TypeError), ("dropout_rate", 1.0, ValueError),
                                ("prefix_projection", "yes", TypeError), ("param_init_type", ms.int8, TypeError)):
        with pytest.raises(error, match=field):
            PrefixTuningConfig(**{field: value})
    plain = Net(Attention)
    with unchanged(plain), pytest.raises(ValueError, match="Prefix-Tuning adapts nn.Dense, not Attention|no layer"):
        mp.get_pet_model(plain, PrefixTuningConfig(target_modules=["blocks.0"]))
    adapted = mp.get_pet_model(plain, PrefixTuningConfig(target_modules=["to_k"], **DENSE))
    with unchanged(adapted), pytest.raises(ValueError, match=r"blocks.0.to_k: a PrefixDense is adapted already\.\n"):
        mp.get_pet_model(adapted, PrefixTuningConfig(target_modules=["to_k", "to_v"]))


# Folding

def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


def by_hand():
    return Net(WithLayer, mid_dim=50)


def injected():
    return mp.get_pet_model(Net(Attention), PrefixTuningConfig(target_modules=["to_k", "to_v"],
                                                               **{**DENSE, "mid_dim": 50}))


@pytest.mark.parametrize("build", [by_hand, injected])
def test_folded_it_gives_the_same_bits_from_a_smaller_file(build, mode, tmp_path):
    net, x = build(), inputs(2, 3, WIDTH)
    randomise(net.blocks)
    for block in net.blocks:
        if hasattr(block, "prefix"):
            block.prefix.input_tokens.set_data(Tensor(np.arange(ROWS), ms.int32))
    before = net(x).asnumpy()
    mp.save_adapter(net, tmp_path / "whole")
    plain = {name: item for name, item in values_of(net).items() if "mindpet_delta" not in name}
    assert fold_prefixes(net) is net
    assert np.array_equal(net(x).asnumpy(), before)
    names = {name for name in values_of(net) if name not in plain}
    assert {name.rsplit("_", 1)[1] for name in names} <= {"key", "value", "prefix"} and len(names) == 4
    mp.save_adapter(net, tmp_path / "folded")
    assert set(tensors(tmp_path / "folded")) == names
    size = {kind: (tmp_path / kind / "adapter_model.safetensors").stat().st_size for kind in ("whole", "folded")}
    assert size["folded"] < size["whole"] / 3
    with unchanged(net):
        fold_prefixes(net)

    fresh = fold_prefixes(build())
    load_values(fresh, net)
    randomise(fresh.blocks, seed=5)
    assert not np.array_equal(fresh(x).asnumpy(), before)
    mp.load_adapter(fresh, tmp_path / "folded")
    assert np.array_equal(fresh(x).asnumpy(), before)
    unfolded = build()
    with unchanged(unfolded), pytest.raises(ValueError, match=r"have no MLP.*call fold_prefixes\(net\) first"):
        mp.load_adapter(unfolded, tmp_path / "folded")
    with unchanged(net), pytest.raises(ValueError, match="come from an MLP.*not folded"):
        mp.load_adapter(net, tmp_path / "whole")


def test_a_file_of_folded_prefixes_adapts_a_plain_net(mode, tmp_path):
    net, x = injected(), inputs(2, 3, WIDTH)
    mp.save_adapter(fold_prefixes(net), tmp_path / "folded")
    plain = Net(Attention)
    load_values(plain, net)
    mp.load_adapter(plain, tmp_path / "folded")
    assert np.array_equal(plain(x).asnumpy(), net(x).asnumpy())


def test_folding_leaves_dropout_out_and_keeps_what_trains(mode):
    layer = PrefixLayer(**SIZES, dropout_rate=0.5).set_train(False)
    key, value = (item.asnumpy() for item in layer())
    layer.set_train().fold()
    assert np.array_equal(layer.mindpet_delta_prefixtuning_key.asnumpy(), key)
    assert np.array_equal(layer.mindpet_delta_prefixtuning_value.asnumpy(), value)
    assert np.any(layer()[0].asnumpy() == 0)
    assert layer.mindpet_delta_prefixtuning_key.requires_grad
    assert not layer.past_key_reparam.asnumpy().all()
    frozen = PrefixLayer(**SIZES)
    for item in frozen.get_parameters():
        item.requires_grad = False
    frozen.fold()
    assert not frozen.trainable_params()
    with unchanged(frozen):
        frozen.fold()


def test_a_layer_folded_by_hand_is_seen_by_a_net_that_ran(graph_mode):
    net, x = WithLayer(), inputs(2, 3, WIDTH)
    before = net(x).asnumpy()
    net.prefix.fold()
    assert np.array_equal(net(x).asnumpy(), before)
    net.prefix.mindpet_delta_prefixtuning_key.set_data(Tensor(np.ones((ROWS, WIDTH), np.float32)))
    assert not np.allclose(net(x).asnumpy(), before)


def test_a_copied_net_is_folded_too(graph_mode):
    net, x = WithLayer(), inputs(2, 3, WIDTH)
    net(x)
    copied = copy.deepcopy(net)
    before = copied(x).asnumpy()
    fold_prefixes(copied)
    copied.prefix.mindpet_delta_prefixtuning_value.set_data(Tensor(np.ones((ROWS, WIDTH), np.float32)))
    assert not np.allclose(copied(x).asnumpy(), before)
    assert net.prefix.prefix_projection


def test_a_net_without_prefixes_has_nothing_to_fold():
    with pytest.raises(ValueError, match="no prefix to fold"):
        fold_prefixes(nn.SequentialCell(LoRADense(6, 4, 2, 4)))
    with pytest.raises(ValueError, match="no adapted layer"):
        fold_prefixes(nn.SequentialCell(nn.Dense(6, 4)))
    with pytest.raises(TypeError, match="net must be"):
        fold_prefixes("net")


# Files of MindPet's

def test_mindpets_checkpoint_is_refused_by_shape(tmp_path):
    net = Net(WithLayer)
    # MindPet's MLP gives one matrix that is both, so it has half of the outputs.
    entries = [{"name": item.name, "data": Parameter(item.asnumpy()[:WIDTH] if ".2." in item.name else item)}
               for item in net.get_parameters() if "mindpet_delta" in item.name]
    ms.save_checkpoint(entries, str(tmp_path / "mindpet.ckpt"))
    with unchanged(net), pytest.raises(ValueError, match=r"misshapen: blocks.0.prefix.*is \(12, 7\) in the net, "
                                                         r"\(6, 7\) in the file"):
        mp.load_adapter(net, tmp_path / "mindpet.ckpt")
