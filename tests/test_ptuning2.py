"""P-Tuning v2: the encoder of all layers' prefixes, the Dense in an attention that exists, folding, MindPet's files."""
from __future__ import annotations

import inspect
import types

import mindspore as ms
import numpy as np
import pytest
import reference_prefix as reference
from cases_ptuning2 import parts_of
from mindspore import Parameter, Tensor, nn
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Model
from nets import TOLERANCE, inputs, load_values, numbers, randomise, unchanged
from safetensors.numpy import load_file
from test_prefix import Attention, attend, both_modes, train, values_of

import mindpet_lite as mp
from mindpet_lite.delta import PrefixEmbedding, PrefixEncoder, Ptuning2Config, prepend_prefix
from mindpet_lite.graph import TrainableParamsCheckPoint, fold_prefixes

ROWS, LAYERS, HEADS, CHANNELS, INNER = 3, 2, 2, 3, 5
WIDTH = HEADS * CHANNELS
OUT = LAYERS * 2 * WIDTH
MLP = ("dense_in.weight", "dense_in.bias", "dense_out.weight", "dense_out.bias")


def encoder(projection=True, dropout=0.0, **settings) -> PrefixEncoder:
    return PrefixEncoder(ROWS, LAYERS, HEADS, CHANNELS, projection, INNER, dropout, **settings)


def randomised(cell, seed=0):
    """Give what trains in a cell random values."""
    rng = np.random.default_rng(seed)
    for item in cell.trainable_params():
        item.set_data(Tensor(0.5 * rng.standard_normal(item.shape).astype(np.float32)).astype(item.dtype))
    return cell


class Transformer(nn.Cell):
    """A net of two attentions whose prefixes come from one encoder."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.encoder = encoder(**settings)
        self.blocks = nn.CellList([Attention() for _ in range(LAYERS)])
        self.head = nn.Dense(WIDTH, 3)

    def construct(self, x):
        past = self.encoder(x.shape[0], x.dtype)
        for index in range(LAYERS):
            block = self.blocks[index]
            # (2, batch, heads, rows, channels) -> (2, batch, rows, width)
            prefix = past[index].transpose((0, 1, 3, 2, 4)).reshape((2, x.shape[0], ROWS, WIDTH))
            key, value = block.to_k(x), block.to_v(x)
            x = x + attend(block.to_q(x), ms.ops.concat((prefix[0], key), 1), ms.ops.concat((prefix[1], value), 1))
        return self.head(x)


@pytest.mark.parametrize("projection", [True, False], ids=["MLP", "no MLP"])
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=["fp32", "fp16"])
def test_values_are_the_references(projection, dtype, mode):
    cell = randomised(encoder(projection))
    values = [numbers(item) for item in parts_of(cell)]
    rows = reference.mlp(*values) if projection else values[0]
    found = cell(4, dtype)
    assert isinstance(found, tuple) and len(found) == LAYERS
    for index, layer in enumerate(found):
        assert layer.shape == (2, 4, HEADS, ROWS, CHANNELS) and layer.dtype == dtype
        for kind in (0, 1):
            part = rows[:, (2 * index + kind) * WIDTH:(2 * index + kind + 1) * WIDTH]
            expected = part.reshape(ROWS, HEADS, CHANNELS).swapaxes(0, 1)
            for one in numbers(layer)[kind]:
                np.testing.assert_allclose(one, expected, **TOLERANCE[dtype])


def test_the_default_type_is_half_as_mindpets(mode):
    assert encoder()(2)[0].dtype == ms.float16
    assert encoder()(2, ms.bfloat16)[1].dtype == ms.bfloat16
    assert encoder(param_init_type=ms.float16)(2, ms.float32)[1].dtype == ms.float32
    assert {item.dtype for item in encoder(param_init_type=ms.bfloat16).trainable_params()} == {ms.bfloat16}


@pytest.mark.parametrize("projection", [True, False], ids=["MLP", "no MLP"])
def test_fifty_steps_are_the_same_in_both_modes_and_the_file_rebuilds_the_net(projection, tmp_path):
    start, x = Transformer(projection=projection), inputs(2, 4, WIDTH)

    def run():
        net, fresh = Transformer(projection=projection), Transformer(projection=projection)
        for item in (net, fresh):
            load_values(item, start)
        mp.freeze_delta(net, "ptuning2")
        before = values_of(net)
        losses = train(net, x)
        moved = {name for name, value in values_of(net).items() if not np.array_equal(value, before[name])}
        assert moved == {f"encoder.mindpet_delta_ptuning2_{name}"
                         for name in ("embedding.embedding_table", *(MLP if projection else ()))}
        mp.save_adapter(net, tmp_path / "adapter")
        assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == moved
        mp.load_adapter(fresh, tmp_path / "adapter")
        assert np.array_equal(fresh(x).asnumpy(), net(x).asnumpy())
        return losses

    graph, pynative = both_modes(run)
    assert graph[-1] < graph[0]
    np.testing.assert_allclose(graph, pynative, rtol=1e-4)


def test_signature_is_mindpets():
    parameters = inspect.signature(PrefixEncoder).parameters
    assert list(parameters)[:9] == ["pre_seq_len", "num_layers", "num_heads", "kv_channels", "prefix_projection",
                                    "projection_dim", "dropout_prob", "parallel_config", "out_perm"]
    assert (parameters["parallel_config"].default, parameters["out_perm"].default) == (None, (2, 0, 3, 1, 4))
    construct = inspect.signature(PrefixEncoder.construct).parameters
    assert list(construct) == ["self", "batch_size", "dtype"] and construct["dtype"].default == ms.float16
    assert list(inspect.signature(PrefixEmbedding).parameters)[:6] == [
        "vocab_size", "embedding_size", "data_parallel", "model_parallel", "vocab_emb_dp", "param_init"]


def test_names_shapes_and_what_never_trains():
    net = Transformer()
    own = [(path.removeprefix("encoder.mindpet_delta_ptuning2_"), item)
           for path, item in net.parameters_and_names() if path.startswith("encoder")]
    assert {name: item.shape for name, item in own} == {
        "prefix": (ROWS,), "embedding.embedding_table": (ROWS, OUT), "dense_in.weight": (INNER, OUT),
        "dense_in.bias": (INNER,), "dense_out.weight": (OUT, INNER), "dense_out.bias": (OUT,)}
    assert all(item.name == f"encoder.mindpet_delta_ptuning2_{name}" for name, item in own)
    assert isinstance(net.encoder.mindpet_delta_ptuning2_trans, nn.SequentialCell)
    assert net.encoder.mindpet_delta_ptuning2_trans[0] is net.encoder.mindpet_delta_ptuning2_dense_in
    report = mp.freeze_delta(net, "ptuning2")
    assert not net.encoder.mindpet_delta_ptuning2_prefix.requires_grad
    assert report.trainable == ROWS * OUT + 2 * INNER * OUT + INNER + OUT
    mp.freeze_modules(net, exclude=["*mindpet_delta*"])
    assert not net.encoder.mindpet_delta_ptuning2_prefix.requires_grad
    assert [name for name, _ in encoder(False).parameters_and_names()] == [
        "mindpet_delta_ptuning2_prefix", "mindpet_delta_ptuning2_embedding.embedding_table"]


def test_dropout_is_each_sequences_own_and_in_training_only(mode):
    cell = PrefixEncoder(20, 1, 4, 10, False, 5, 0.5).set_train(False)
    still = cell(2, ms.float32)[0].asnumpy()
    assert np.all(still != 0) and np.array_equal(still[:, 0], still[:, 1])
    dropped = cell.set_train()(2, ms.float32)[0].asnumpy()
    assert 0.4 < np.mean(dropped == 0) < 0.6 and not np.array_equal(dropped[:, 0] == 0, dropped[:, 1] == 0)
    np.testing.assert_allclose(dropped[dropped != 0], 2 * still[dropped != 0], rtol=1e-6)
    assert not encoder(dropout=0).has_dropout


def test_sizes_are_positive_ints():
    good = {"pre_seq_len": 3, "num_layers": 2, "num_heads": 2, "kv_channels": 3, "prefix_projection": True,
            "projection_dim": 5, "dropout_prob": 0.1}
    for name in ("pre_seq_len", "num_layers", "num_heads", "kv_channels", "projection_dim"):
        for value, error in ((1.0, TypeError), (True, TypeError), (0, ValueError), (-1, ValueError)):
            with pytest.raises(error, match=f"{name} must be a positive int"):
                PrefixEncoder(**{**good, name: value})
    for name, value, error in (("prefix_projection", "yes", TypeError), ("dropout_prob", 1, ValueError),
                               ("dropout_prob", -0.1, ValueError), ("dropout_prob", "0", TypeError),
                               ("param_init_type", ms.int32, TypeError)):
        with pytest.raises(error, match=name):
            PrefixEncoder(**{**good, name: value})
    assert PrefixEncoder(**{**good, "prefix_projection": False, "projection_dim": None}).delta_names


def test_the_order_of_the_axes(mode):
    usual = encoder()
    moved = encoder(out_perm=(2, 1, 0, 3, 4))
    load_values(moved, usual)
    for ours, theirs in zip(moved(4, ms.float32), usual(4, ms.float32)):
        assert np.array_equal(ours.asnumpy(), theirs.asnumpy().transpose(0, 3, 1, 2, 4))
    for value in ((0, 1, 2, 3, 4), (2, 0, 3, 1), (2, 2, 3, 1, 4)):
        with pytest.raises(ValueError, match="out_perm must be a permutation"):
            encoder(out_perm=value)


# Parallel strategies: on a machine without Ascend they can be set and read back.

def test_shard_sets_strategies_that_fit_the_operators():
    cell = encoder(dropout=0.1)
    assert cell.shard(2, 4) is cell
    for dense in (cell.mindpet_delta_ptuning2_dense_in, cell.mindpet_delta_ptuning2_dense_out):
        assert dense.matmul.in_strategy == ((1, 1), (4, 1)) and dense.bias_add.in_strategy == ((1, 4), (4,))
    assert cell.dropout.dropout.in_strategy == ((2, 1, 1),)
    assert cell.transpose.in_strategy == ((2, 1, 1, 1, 1),)
    assert cell.split_layers.in_strategy == cell.cast.in_strategy == ((1, 2, 1, 1, 1),)
    for values, error in (((0, 1), ValueError), ((1, 1.0), TypeError)):
        with pytest.raises(error, match="parallel must be a positive int"):
            cell.shard(*values)


def test_parallel_config_is_read():
    config = types.SimpleNamespace(data_parallel=2, model_parallel=3, vocab_emb_dp=False)
    cell = encoder(parallel_config=config)
    assert cell.mindpet_delta_ptuning2_embedding.gather.in_strategy == ((3, 1), (1, 1))
    assert cell.transpose.in_strategy == ((2, 1, 1, 1, 1),)
    assert cell.mindpet_delta_ptuning2_dense_in.matmul.in_strategy == ((1, 1), (3, 1))
    with pytest.raises(ValueError, match="vocab_size must be a multiple of model_parallel"):
        encoder(parallel_config=types.SimpleNamespace(data_parallel=1, model_parallel=2, vocab_emb_dp=False))
    with pytest.raises(TypeError, match="lacks vocab_emb_dp"):
        encoder(parallel_config=types.SimpleNamespace(data_parallel=1, model_parallel=2))


def test_embedding(mode):
    cell = PrefixEmbedding(4, 3, data_parallel=2, param_init="ones")
    assert cell.gather.in_strategy == ((1, 1), (2, 1))
    assert cell.embedding_table.name == "embedding_table" and cell.embedding_table.shape == (4, 3)
    cell.embedding_table.set_data(Tensor(np.arange(12, dtype=np.float32).reshape(4, 3)))
    assert np.array_equal(cell(Tensor([[3, 0]], ms.int32)).asnumpy(), [[[9, 10, 11], [0, 1, 2]]])
    with pytest.raises(TypeError, match="vocab_emb_dp"):
        PrefixEmbedding(4, 3, vocab_emb_dp=1)
    with pytest.raises(ValueError, match="param_init"):
        PrefixEmbedding(4, 3, param_init="no such")


# Folding and files

def test_folded_it_gives_the_same_bits_from_a_smaller_file(mode, tmp_path):
    net, x = Transformer(), inputs(2, 4, WIDTH)
    randomised(net.encoder)
    before = net(x).asnumpy()
    mp.save_adapter(net, tmp_path / "whole")
    fold_prefixes(net)
    assert np.array_equal(net(x).asnumpy(), before)
    assert [name.rpartition("ptuning2_")[2] for name, _ in net.encoder.parameters_and_names()] == [
        "prefix", "embedding.embedding_table"]
    mp.save_adapter(net, tmp_path / "folded")
    for how in ("folded", "never projected"):
        fresh = fold_prefixes(Transformer()) if how == "folded" else Transformer(projection=False)
        load_values(fresh, net)
        randomised(fresh.encoder, 7)
        mp.load_adapter(fresh, tmp_path / "folded")
        assert np.array_equal(fresh(x).asnumpy(), before)
    unfolded = Transformer()
    with unchanged(unfolded), pytest.raises(ValueError, match=r"call fold_prefixes\(net\) first"):
        mp.load_adapter(unfolded, tmp_path / "folded")
    with unchanged(net), pytest.raises(ValueError, match="come from an MLP"):
        mp.load_adapter(net, tmp_path / "whole")


@pytest.mark.parametrize("projection", [True, False], ids=["MLP", "no MLP"])
def test_injected_prefixes_fold_and_load(projection, mode, tmp_path):
    config = Ptuning2Config(target_modules=["to_k", "to_v"], pre_seq_len=ROWS, prefix_projection=projection,
                            projection_dim=INNER, dropout_prob=0)
    base, x = nn.SequentialCell(Attention()), inputs(2, 4, WIDTH)
    net = nn.SequentialCell(Attention())
    load_values(net, base)
    mp.get_pet_model(net, config)
    randomise(net)
    before = net(x).asnumpy()
    assert not np.allclose(before, base(x).asnumpy())
    assert np.array_equal(fold_prefixes(net)(x).asnumpy(), before)
    mp.save_adapter(net, tmp_path / "folded")
    mp.load_adapter(base, tmp_path / "folded")
    assert np.array_equal(base(x).asnumpy(), before)


def test_injected_keys_and_values_have_prefixes_of_their_own(mode):
    net = mp.get_pet_model(Attention(), {"pet_type": "ptuning2", "pre_seq_len": ROWS, "dropout_prob": 0,
                                         "target_modules": ["to_k", "to_v"]})
    randomise(net)
    x = inputs(2, 4, WIDTH)
    rows = {}
    for name in ("to_k", "to_v"):
        layer = getattr(net, name)
        rows[name] = reference.dense(numbers(x), numbers(layer.weight), numbers(layer.bias),
                                     numbers(parts_of(layer)[0]))
        np.testing.assert_allclose(numbers(layer(x)), rows[name], **TOLERANCE[ms.float32])
    query = numbers(x) @ numbers(net.to_q.weight).T + numbers(net.to_q.bias)
    np.testing.assert_allclose(numbers(net(x)), reference.attention(query, rows["to_k"], rows["to_v"], HEADS),
                               **TOLERANCE[ms.float32])
    key = prepend_prefix(net.to_k.prefix_rows(), x)
    assert np.array_equal(key.asnumpy()[1, :ROWS], numbers(parts_of(net.to_k)[0]).astype(np.float32))


@pytest.mark.parametrize("projection", [True, False], ids=["MLP", "no MLP"])
def test_mindpets_checkpoint_loads(projection, tmp_path):
    trained, net = Transformer(projection=projection), Transformer(projection=projection)
    randomised(trained.encoder)
    # MindPet's freeze_delta makes the ids trainable too, so its checkpoints hold them.
    entries = [{"name": item.name, "data": item} for item in trained.encoder.get_parameters()]
    assert len(entries) == (6 if projection else 2)
    ms.save_checkpoint(entries, str(tmp_path / "mindpet.ckpt"))
    mp.load_adapter(net, tmp_path / "mindpet.ckpt")
    for ours, theirs in zip(net.encoder.get_parameters(), trained.encoder.get_parameters()):
        assert ours.asnumpy().tobytes() == theirs.asnumpy().tobytes()
    again = Transformer(projection=projection)
    assert not any("mindpet_delta" in name for name in ms.load_param_into_net(
        again, ms.load_checkpoint(str(tmp_path / "mindpet.ckpt")))[0])


def test_checkpoints_of_a_training_run_hold_what_trains(tmp_path):
    net, other = Transformer(), Transformer()
    mp.freeze_delta(net, "ptuning2")
    data = NumpySlicesDataset((np.ones((4, 4, WIDTH), np.float32), np.ones((4, 4, 3), np.float32)), shuffle=False)
    Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), 1e-2)).train(
        1, data.batch(2), callbacks=[TrainableParamsCheckPoint(tmp_path)], dataset_sink_mode=False)
    path = tmp_path / "DELTA_CKP-1_2.ckpt"
    assert {name for name in ms.load_checkpoint(str(path)) if name != "mindpet_lite"} == {
        f"encoder.mindpet_delta_ptuning2_{name}" for name in ("embedding.embedding_table", *MLP)}
    mp.load_adapter(other, path)
    assert all(np.array_equal(ours.asnumpy(), theirs.asnumpy()) for ours, theirs in
               zip(other.encoder.get_parameters(), net.encoder.get_parameters()))


def test_config_and_its_refusals():
    assert mp.get_pet_model(nn.SequentialCell(Attention()), Ptuning2Config(
        target_modules=["to_k"]))[0].to_k.settings() == {
        "pre_seq_len": 128, "prefix_projection": False, "projection_dim": 128, "dropout_prob": 0.01}
    with pytest.raises(ValueError, match="'all-linear' would lengthen every sequence"):
        Ptuning2Config(target_modules="all-linear")
    for field, value, error in (("pre_seq_len", 0, ValueError), ("pre_seq_len", "8", TypeError),
                                ("dropout_prob", 1.0, ValueError), ("prefix_projection", 1, TypeError),
                                ("param_init_type", ms.int8, TypeError)):
        with pytest.raises(error, match=field):
            Ptuning2Config(**{field: value})
    with pytest.raises(ValueError, match="projection_dim"):
        Ptuning2Config(prefix_projection=True, projection_dim=0)
    net = nn.SequentialCell(Parameterised())
    with unchanged(net), pytest.raises(ValueError, match="P-Tuning v2 adapts nn.Dense, not Parameterised"):
        mp.get_pet_model(net, Ptuning2Config(target_modules=["0"]))


class Parameterised(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(3, np.float32)), name="weight")
