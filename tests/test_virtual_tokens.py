"""The methods of virtual tokens: what the layers compute, beside numpy from the papers, and what holds of all."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from host_layers import IDS, LAYERS, plain_net
from mindspore import Tensor, mint, nn
from nets import compile_count, gradient_function, numbers, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.hosts.embedding import EmbeddingHost, MintEmbeddingHost
from mindpet_lite.delta.parts import put
from mindpet_lite.graph.adapters import deltas

LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 3}
SETTINGS = {
    "prompt_tuning": ({}, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p_tuning": ({"encoder_hidden_size": 5}, {**LSTM, "encoder_num_layers": 2}, {"inference_mode": True}),
    "multitask_prompt_tuning": ({"num_tasks": 3, "num_ranks": 2},),
}
EVERY = [(name, index) for name, entries in SETTINGS.items() for index in range(len(entries))]
every_entry = pytest.mark.parametrize(("name", "index"), EVERY)
COUNT = 3


def adapted(name, index=0, host=EmbeddingHost, **more):
    config = METHODS[name](**{"num_virtual_tokens": COUNT, **SETTINGS[name][index], **more})
    net = mp.get_pet_model(plain_net(host), config)
    # inference_mode leaves the rows alone, and frozen: they train here, to test their gradients too
    for item in delta_of(net).delta_parameters().values():
        item.requires_grad = True
    return net


def delta_of(net):
    return deltas(net)["box.0"]


def randomise(net, seed=3):
    rng = np.random.default_rng(seed)
    for item in delta_of(net).delta_parameters().values():
        put(item, Tensor(rng.standard_normal(item.shape).astype(np.float32)))


# The papers, in float64

def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, w, u, b, d):
    """Return the states of an LSTM in one direction: gates i, f, g, o."""
    size, states = u.shape[1], []
    h, c = np.zeros(size), np.zeros(size)
    for row in x:
        gates = w.dot(row) + u.dot(h) + b + d
        i, f, g, o = (gates[size * k:size * (k + 1)] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.array(states)


def rows_of(name, values, tasks=(0,)):
    """Return the rows before each sequence, for what trains in float64."""
    short = {key.removeprefix(f"mindpet_delta_{name}_"): value for key, value in values.items()}
    if "task_cols" in short:
        return np.stack([short["prompt"] * (short["task_cols"][task] @ short["task_rows"][task]) for task in tasks])
    if "prompt" in short:
        return short["prompt"]
    rows = short["embedding"]
    for layer in range(sum(key.endswith("weight_ih") for key in short)):
        parts = [short[f"lstm.{layer}.{part}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        there, back = ([part[way] for part in parts] for way in (0, 1))
        rows = np.hstack([lstm(rows, *there), lstm(rows[::-1], *back)[::-1]])
    last = max(int(key.split(".")[1]) for key in short if key.startswith("mlp"))
    for layer in range(0, last + 1, 2):
        rows = rows @ short[f"mlp.{layer}.weight"].T + short[f"mlp.{layer}.bias"]
        rows = np.where(rows > 0, rows, 0) if layer < last else rows
    return rows


def slopes_of(name, values, weights, tasks=(0,)):
    """Return the gradients of sum(rows · weights), by central differences."""
    found = {key: np.zeros(value.shape) for key, value in values.items()}
    for key, value in values.items():
        for at in np.ndindex(*value.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = value.copy()
                moved[at] += step
                ends.append(np.sum(rows_of(name, {**values, key: moved}, tasks) * weights))
            found[key][at] = (ends[0] - ends[1]) / 2e-6
    return found


@every_entry
@pytest.mark.parametrize("host", [EmbeddingHost, MintEmbeddingHost], ids=lambda host: host.plain_name)
def test_output_and_gradients(name, index, host, mode):
    if host is MintEmbeddingHost and mode == "pynative":
        pytest.skip("CPU has no kernel for mint.nn.Embedding in PyNative mode")
    net, plain = adapted(name, index, host), plain_net(host)
    delta = delta_of(net)
    assert {key: item.shape for key, item in delta.delta_parameters().items()} == delta.shapes(plain.box[0],
                                                                                             delta.config)
    own = list(delta.delta_parameters().values())
    assert {id(item) for item in net.trainable_params()} == {id(item) for item in own}
    names = [item.name for item in net.get_parameters()]
    assert "box.0." + host.base_names[0] in names and len(set(names)) == len(names)
    assert all(item.name.startswith(f"box.0.mindpet_delta_{name}_") for item in own)
    randomise(net)
    values = {key: numbers(item) for key, item in delta.delta_parameters().items()}
    weights = np.random.default_rng(4).standard_normal((2, COUNT + IDS.shape[1], 4))
    y, _, found = gradient_function(net, own, IDS, weights)()
    rows = np.broadcast_to(rows_of(name, values), (2, COUNT, 4))
    np.testing.assert_allclose(y.asnumpy()[:, :COUNT], rows, rtol=1e-5, atol=1e-5)
    assert np.array_equal(y.asnumpy()[:, COUNT:], plain(IDS).asnumpy()), "the tokens' rows are the table's, exactly"
    for (key, slope), value in zip(slopes_of(name, values, weights[:, :COUNT].sum(0)).items(), found):
        np.testing.assert_allclose(value.asnumpy(), slope, rtol=1e-4, atol=1e-5, err_msg=key)


def load(net, name, path):
    """Load an adapter, with the warning that P-tuning's files have."""
    if name != "p_tuning":
        return mp.load_adapter(net, path)
    with pytest.warns(UserWarning, match="not the encoder"):
        return mp.load_adapter(net, path)


@every_entry
def test_file_and_folding(name, index, mode, tmp_path):
    net = adapted(name, index)
    randomise(net)
    full, has_encoder = net(IDS).asnumpy(), "mindpet_delta_p_tuning_embedding" in delta_of(net).delta_parameters()
    if has_encoder:
        with pytest.warns(UserWarning, match="not the encoder"):
            mp.save_adapter(net, tmp_path / "adapter")
    else:
        mp.save_adapter(net, tmp_path / "adapter")
    fresh = load(plain_net(EmbeddingHost), name, tmp_path / "adapter")
    if has_encoder:
        np.testing.assert_allclose(fresh(IDS).asnumpy(), full, rtol=1e-5, atol=1e-6)
        with unchanged(net), pytest.raises(ValueError, match="fold_prefixes"):
            mp.load_adapter(net, tmp_path / "adapter")
    else:
        assert np.array_equal(fresh(IDS).asnumpy(), full)
        load(net, name, tmp_path / "adapter")
    mp.save_adapter(net, tmp_path / "whole.ckpt", format="mindpet")
    again = mp.load_adapter(plain_net(EmbeddingHost), tmp_path / "whole.ckpt")
    assert np.array_equal(again(IDS).asnumpy(), full), "MindPet's format holds all that trains"
    assert delta_of(again).delta_parameters().keys() == delta_of(net).delta_parameters().keys()
    if has_encoder:
        mp.fold_prefixes(net)
        assert np.array_equal(net(IDS).asnumpy(), full)
        assert [item.name for item in net.trainable_params()] == ["box.0.mindpet_delta_p_tuning_prompt"]
        load(net, name, tmp_path / "adapter")
        np.testing.assert_allclose(net(IDS).asnumpy(), full, rtol=1e-5, atol=1e-6)


@every_entry
def test_training_is_the_same_in_both_modes(name, index):
    values, losses, before = None, [], ms.get_context("mode")
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        net = adapted(name, index)
        values = values or {item.name: item.asnumpy().copy() for item in net.get_parameters()}
        for item in net.trainable_params():
            put(item, Tensor(values[item.name]))
        step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 1e-1))
        target = Tensor(np.full((2, COUNT + 3, 4), 0.5, np.float32))
        losses.append([float(step.set_train()(IDS, target).asnumpy()) for _ in range(6)])
        assert np.array_equal(net.box[0].embedding_table.asnumpy(), values["box.0.embedding_table"])
    ms.set_context(mode=before)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_cannot_be_is_refused(name):
    net = adapted(name)
    with unchanged(net):
        with pytest.raises(ValueError, match="no table of a plain layer can hold"):
            mp.merge(net)
        with pytest.raises(ValueError, match="cannot shorten one again"), mp.adapters_disabled(net):
            pass
        with pytest.raises(ValueError, match="cannot shorten one again"):
            mp.set_lora_scale(net, 0.5)
        with pytest.raises(ValueError, match="adapted already"):
            mp.get_pet_model(net, METHODS[name](target_modules=["box.0"]))
    plain = plain_net(EmbeddingHost)
    with unchanged(plain):
        with pytest.raises(ValueError, match="token_dim is 8, but the rows of the table have 4"):
            mp.get_pet_model(plain, METHODS[name](token_dim=8))
    for fields, message in (({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive int"),
                            ({"num_transformer_submodules": 2}, "prompts of its own for a decoder"),
                            ({"token_dim": -1}, "token_dim must be a positive int")):
        with pytest.raises(ValueError, match=message):
            METHODS[name](**fields)
    dense = nn.SequentialCell(nn.Dense(3, 4))
    with unchanged(dense), pytest.raises(ValueError, match="the net has no embedding"):
        mp.get_pet_model(dense, METHODS[name]())


# Where the table is found

class Tables(nn.Cell):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Embedding(9, 4))

    def construct(self, x):
        return x


def test_the_table_is_found_in_the_net(tmp_path):
    class Says(Tables):
        def get_input_embeddings(self):
            return self.second

    config = mp.PromptTuningConfig(num_virtual_tokens=COUNT)
    for net, path in ((Tables("anything"), "anything"), (Tables("wpe", "wte"), "wte"),
                      (Says("first", "second"), "second"), (nn.SequentialCell(mint.nn.Embedding(9, 4)), "0")):
        assert list(deltas(mp.get_pet_model(net, config))) == [path]
        mp.save_adapter(net, tmp_path / path)
    for net in (Tables("one", "other"), Tables("wte", "embed_tokens")):
        with unchanged(net):
            with pytest.raises(ValueError, match=f"the net has {', '.join(path for path in net._cells)}. Name it"):
                mp.get_pet_model(net, config)
            with pytest.raises(ValueError, match="name_map={'prompt_embeddings': path}"):
                mp.load_adapter(net, tmp_path / "anything")
    net = mp.load_adapter(Tables("one", "other"), tmp_path / "0", name_map={"prompt_embeddings": "other"})
    assert list(deltas(net)) == ["other"]
    # A file of ours says it beside its hashes.
    net = mp.get_pet_model(Tables("one", "other"), mp.PromptTuningConfig(target_modules=["other"]))
    mp.save_adapter(net, tmp_path / "said")
    assert list(deltas(mp.load_adapter(Tables("one", "other"), tmp_path / "said"))) == ["other"]


def test_two_tables_have_a_file_of_our_own(tmp_path):
    net = mp.get_pet_model(Tables("one", "other"), mp.PromptTuningConfig(target_modules=["one", "other"]))
    mp.save_adapter(net, tmp_path / "both")
    assert list(deltas(mp.load_adapter(Tables("one", "other"), tmp_path / "both"))) == ["one", "other"]


# Starts

def test_rows_start_as_those_of_tokens():
    table = plain_net(EmbeddingHost).box[0].embedding_table.asnumpy()
    for name in ("prompt_tuning", "multitask_prompt_tuning"):
        text = adapted(name, 0, prompt_tuning_init="TEXT", init_token_ids=[6, 1])
        assert np.array_equal(next(iter(delta_of(text).delta_parameters().values())).asnumpy(), table[[6, 1, 6]])
        sampled = adapted(name, 0, prompt_tuning_init="SAMPLE_VOCAB")
        rows = next(iter(delta_of(sampled).delta_parameters().values())).asnumpy()
        assert all(any(np.array_equal(row, token) for token in table) for row in rows)
        with pytest.raises(ValueError, match="init_token_ids has 8, but the table has rows 0 to 7"):
            adapted(name, 0, prompt_tuning_init="TEXT", init_token_ids=[8])
        for wrong in ({"prompt_tuning_init": "TEXT"}, {"init_token_ids": [1]}):
            with pytest.raises(ValueError, match="tokenize the text with the model's tokenizer"):
                METHODS[name](**wrong)
        with pytest.raises(ValueError, match="must be one of RANDOM, SAMPLE_VOCAB, TEXT"):
            METHODS[name](prompt_tuning_init="text")
    with pytest.raises(TypeError, match="init_token_ids"):
        mp.PromptTuningConfig(prompt_tuning_init="TEXT", init_token_ids=["a"])


def test_rows_of_tokens_are_taken_again_from_a_base_that_is_loaded_later():
    net = adapted("prompt_tuning", 0, prompt_tuning_init="TEXT", init_token_ids=[2])
    new = np.random.default_rng(9).standard_normal((8, 4)).astype(np.float32)
    ms.load_param_into_net(net, {"box.0.embedding_table": ms.Parameter(Tensor(new), name="box.0.embedding_table")})
    assert np.array_equal(delta_of(net).mindpet_delta_prompt_tuning_prompt.asnumpy(), new[[2, 2, 2]])


def test_a_target_task_starts_from_source_tasks(tmp_path):
    source = adapted("multitask_prompt_tuning")
    randomise(source)
    shared, cols, rows = (item.asnumpy() for item in delta_of(source).delta_parameters().values())
    mp.save_adapter(source, tmp_path / "source")
    path = str(tmp_path / "source" / "adapter_model.safetensors")

    def started(**settings):
        settings = {"num_ranks": 2, "num_tasks": 1, "prompt_tuning_init_state_dict_path": path, **settings}
        return [item.asnumpy() for item in delta_of(adapted("multitask_prompt_tuning", 0, **settings)
                                                    ).delta_parameters().values()]

    for start, wanted in (({"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": 2},
                           [shared, cols[2:], rows[2:]]),
                          ({"prompt_tuning_init": "AVERAGE_SOURCE_TASKS"},
                           [shared, cols.mean(0, keepdims=True), rows.mean(0, keepdims=True)]),
                          ({"prompt_tuning_init": "ONLY_SOURCE_SHARED", "num_tasks": 5}, [shared])):
        for value, own in zip(wanted, started(**start)):
            assert np.array_equal(value, own)
    for wrong, message in (({"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "num_tasks": 3}, "num_tasks=1"),
                           ({"prompt_tuning_init": "ONLY_SOURCE_SHARED", "num_virtual_tokens": 4}, "num_virtual_tok"),
                           ({"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": 3}, "tasks 0 to 2"),
                           ({"prompt_tuning_init": "RANDOM"}, "go together"),
                           ({"prompt_tuning_init": "ONLY_SOURCE_SHARED", "prompt_tuning_init_task": 1}, "is for")):
        with pytest.raises(ValueError, match=message):
            started(**wrong)
    mp.save_adapter(adapted("prompt_tuning"), tmp_path / "other")
    with pytest.raises(ValueError, match="lacks prefix_task_cols"):
        started(prompt_tuning_init="ONLY_SOURCE_SHARED",
                prompt_tuning_init_state_dict_path=str(tmp_path / "other" / "adapter_model.safetensors"))
    with pytest.raises(FileNotFoundError):
        started(prompt_tuning_init="ONLY_SOURCE_SHARED", prompt_tuning_init_state_dict_path="nowhere.safetensors")


def test_wrong_settings_of_the_encoder():
    for fields, message in (({"encoder_reparameterization_type": "GRU"}, "must be one of MLP, LSTM"),
                            ({"encoder_dropout": 0.1}, "are of the LSTM"),
                            ({"encoder_num_layers": 3}, "are of the LSTM"),
                            ({**LSTM, "encoder_dropout": 1.0}, r"must be in \[0, 1\)")):
        with pytest.raises(ValueError, match=message):
            mp.PromptEncoderConfig(**fields)


def test_dropout_between_the_layers_of_the_lstm(mode):
    net = adapted("p_tuning", 1, encoder_dropout=0.5)
    plain = adapted("p_tuning", 1)
    for ours, theirs in zip(net.trainable_params(), plain.trainable_params()):
        put(ours, Tensor(theirs.asnumpy()))
    net.set_train(False)
    assert np.array_equal(net(IDS).asnumpy(), plain(IDS).asnumpy())
    net.set_train()
    first, second = net(IDS).asnumpy(), net(IDS).asnumpy()
    assert not np.array_equal(first, second) and np.array_equal(first[:, COUNT:], second[:, COUNT:])
    mp.fold_prefixes(net)
    np.testing.assert_allclose(net(IDS).asnumpy(), plain(IDS).asnumpy(), rtol=1e-5, atol=1e-6)


# Tasks

def test_tasks_switch_without_a_compile(mode):
    net = adapted("multitask_prompt_tuning")
    randomise(net)
    layer = net.box[0]
    values = {key: numbers(item) for key, item in delta_of(net).delta_parameters().items()}

    def check(*tasks):
        rows = np.broadcast_to(rows_of("multitask_prompt_tuning", values, tasks), (2, COUNT, 4))
        np.testing.assert_allclose(net(IDS).asnumpy()[:, :COUNT], rows, rtol=1e-5, atol=1e-6)

    check(0)
    with compile_count() as compiled:
        layer.set_task_ids(2)
        check(2)
    assert not compiled
    layer.set_task_ids([1, 0])
    check(1, 0)
    with compile_count() as compiled:
        layer.set_task_ids(Tensor([2, 1]))
        check(2, 1)
        deltas(net)
        check(2, 1)
    assert not compiled
    given = layer(IDS, Tensor(np.array([0, 2], np.int32))).asnumpy()[:, :COUNT]
    np.testing.assert_allclose(given, rows_of("multitask_prompt_tuning", values, (0, 2)), rtol=1e-5, atol=1e-6)
    for wrong in (3, [0, -1], []):
        with pytest.raises(ValueError):
            layer.set_task_ids(wrong)
    with pytest.raises(TypeError, match="an entry of task_ids"):
        layer.set_task_ids(1.0)
    layer.set_task_ids([0, 1, 2])
    with pytest.raises(ValueError, match="one task for all sequences or one for each"):
        net(IDS)
    layer.set_task_ids(1)
    check(1)
    assert "task_ids" not in " ".join(item.name for item in net.trainable_params())


def test_gradients_of_the_tasks_of_a_batch(mode):
    net = adapted("multitask_prompt_tuning")
    randomise(net)
    net.box[0].set_task_ids([2, 0])
    values = {key: numbers(item) for key, item in delta_of(net).delta_parameters().items()}
    weights = np.random.default_rng(4).standard_normal((2, COUNT + 3, 4))
    function = gradient_function(net, list(delta_of(net).delta_parameters().values()), IDS, weights)
    for tasks in ((2, 0), (1, 1)):
        net.box[0].set_task_ids(tasks)
        slopes = slopes_of("multitask_prompt_tuning", values, weights[:, :COUNT], tasks)
        for slope, value in zip(slopes.values(), function()[2]):
            np.testing.assert_allclose(value.asnumpy(), slope, rtol=1e-4, atol=1e-5)


# Types and masks

@pytest.mark.parametrize("name", SETTINGS)
def test_types(name, mode):
    net = plain_net(EmbeddingHost)
    net.box[0].embedding_table.set_dtype(ms.float16)
    mp.get_pet_model(net, METHODS[name](num_virtual_tokens=COUNT, **SETTINGS[name][0]))
    assert {item.dtype for item in net.trainable_params()} == {ms.float32}
    assert net(IDS).dtype == ms.float16
    half = adapted(name, 0, param_init_type=ms.float16)
    assert {item.dtype for item in half.trainable_params()} == {ms.float16}
    assert half(IDS).dtype == ms.float32


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.int32, ms.bool_])
def test_prompt_mask(dtype, mode):
    padding = Tensor(np.array([[1, 1, 0], [1, 1, 1]])).astype(dtype)
    found = mp.prompt_mask(padding, 2, visible=1)
    assert found.dtype == dtype
    assert np.array_equal(found.asnumpy(), np.array([[1, 1, 1, 1, 0], [1] * 5]).astype(found.asnumpy().dtype))
    causal = Tensor(np.tril(np.ones((2, 1, 3, 3)))).astype(dtype)
    found = mp.prompt_mask(causal, 2, visible=1, hidden=0)
    assert found.dtype == dtype and np.array_equal(found.asnumpy(), np.broadcast_to(np.tril(np.ones((5, 5))),
                                                                                   (2, 1, 5, 5)))


def test_prompt_mask_that_is_added_and_wrong_ones():
    added = Tensor(np.triu(np.full((1, 1, 3, 3), -np.inf), 1).astype(np.float32))
    found = mp.prompt_mask(added, 2, visible=0, hidden=float("-inf")).asnumpy()
    assert np.array_equal(found[0, 0], np.triu(np.full((5, 5), -np.inf), 1))
    for mask, more in ((added, {}), (added[0, 0], {"hidden": 1}), (added[:, :, :2], {"hidden": 1})):
        with pytest.raises(ValueError, match="mask of padding|as many queries as keys"):
            mp.prompt_mask(mask, 2, visible=0, **more)


def test_ids_of_one_sequence():
    net = adapted("prompt_tuning")
    assert net(IDS[0]).shape == (COUNT + 3, 4)
    assert LAYERS[EmbeddingHost][1] is IDS
