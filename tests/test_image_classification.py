"""Classifying pictures: reading weights, the nets against float64 numpy, the branch, a whole run, users' errors."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch_files
from mindspore import Tensor, nn
from nets import gradient_function, numbers
from PIL import Image
from reference_conv import Convolution, padding_of, without_groups

from mindpet_lite import (
    LoraConfig,
    adapters_disabled,
    get_pet_model,
    load_adapter,
    merge,
    save_adapter,
    set_lora_scale,
    unmerge,
)

HERE = Path(__file__).resolve().parent.parent / "examples" / "image_classification"
sys.path.append(str(HERE))

import frozen_head  # noqa: E402
import image_folder  # noqa: E402
import image_nets  # noqa: E402
import image_operators  # noqa: E402
import image_run  # noqa: E402
import torch_file  # noqa: E402
from branch import WithBranch  # noqa: E402
from efficientnet_lite import EPS, EfficientNetLite  # noqa: E402
from image_common import UserError  # noqa: E402
from vgg import STAGES, VGG  # noqa: E402


def script(name: str):
    """A script, which other examples have of the same name."""
    spec = importlib.util.spec_from_file_location(f"image_classification_{name}", HERE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


TRAIN, PREDICT = script("train"), script("predict")
TINY = {"stages": ((1, 3, 1, 1, 4), (2, 5, 2, 2, 6)), "stem": 4, "head": 8}


def tiny(classes: int, size: int) -> EfficientNetLite:
    """A net of the same code, with numbers in everything."""
    return filled(EfficientNetLite(classes, size, **TINY)).set_train(False)


def filled(net: nn.Cell) -> nn.Cell:
    """A net with random numbers in everything."""
    rng = np.random.default_rng(0)
    for name, item in net.parameters_and_names():
        if name.rpartition(".")[2] not in ("scaling", "strength_factor"):
            value = 0.4 * rng.standard_normal(item.shape)
            item.set_data(Tensor(np.abs(value) + 0.5 if name.endswith("moving_variance") else value, item.dtype))
    return net


def convolved(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """A convolution in numpy, padded as TensorFlow does; of each channel alone where the weight is so."""
    kernel = weight.shape[2:]
    if weight.shape[1] != x.shape[1]:
        weight = without_groups(weight, x.shape[1], x.shape[1])
    pads = padding_of(x.shape[2:], kernel, (stride,) * 2, (1, 1), "same", 0)
    return Convolution(x, kernel, (stride,) * 2, (1, 1), pads).forward(weight)


def reference(net: EfficientNetLite, x: np.ndarray) -> np.ndarray:
    """What the net gives, from the paper, in float64."""
    values = {name: numbers(item) for name, item in net.parameters_and_names()}

    def layer(x: np.ndarray, conv: str, norm: str, stride: int = 1, acts: bool = True) -> np.ndarray:
        y = convolved(x, values[f"{conv}.weight"], stride)
        mean, variance, gamma, beta = (values[f"{norm}.{name}"].reshape(-1, 1, 1) for name in (
            "moving_mean", "moving_variance", "gamma", "beta"))
        y = (y - mean) / np.sqrt(variance + EPS) * gamma + beta
        return y.clip(0, 6) if acts else y

    x = layer(x, "_conv_stem", "_bn0", 2)
    strides = [stride if first == 0 else 1 for count, _, stride, *_ in TINY["stages"] for first in range(count)]
    for number, stride in enumerate(strides):
        path, y = f"_blocks.{number}.", x
        if f"{path}_expand_conv.weight" in values:
            y = layer(y, path + "_expand_conv", path + "_bn0")
        y = layer(y, path + "_depthwise_conv", path + "_bn1", stride)
        y = layer(y, path + "_project_conv", path + "_bn2", acts=False)
        x = x + y if stride == 1 and x.shape == y.shape else y
    return layer(x, "_conv_head", "_bn1").mean((2, 3)) @ values["_fc.weight"].T + values["_fc.bias"]


@pytest.mark.parametrize("size", [16, 15])
def test_efficientnet_is_the_papers(mode, size):
    net, x = tiny(5, size), np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    np.testing.assert_allclose(net(Tensor(x)).asnumpy(), reference(net, x.astype(np.float64)), rtol=1e-4, atol=1e-4)


def test_efficientnet_lite0_has_the_sizes_of_the_weights():
    net = EfficientNetLite()
    assert sum(item.size for name, item in net.parameters_and_names()) == 4_694_073 - 49  # of num_batches_tracked
    assert len(net._blocks) == 16 and net._blocks[15]._project_conv.weight.shape == (320, 1152, 1, 1)


@pytest.mark.parametrize(("kernel", "stride", "size", "alone"), [
    (3, 1, 5, True), (5, 2, 7, True), (5, 2, 8, True), (3, 2, 8, False), (3, 2, 9, False)])
def test_operators_written_out_are_the_convolution(graph_mode, kernel, stride, size, alone):
    layer = image_operators.convolution(4, 4, kernel, stride, 4 if alone else 1, size)
    plain = nn.Conv2d(4, 4, kernel, stride, pad_mode="same", group=4 if alone else 1, has_bias=False)
    assert type(layer) is not nn.Conv2d
    plain.weight.set_data(layer.weight)
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((2, 4, size, size)).astype(np.float32))
    weights = rng.standard_normal(plain(x).shape).astype(np.float32)
    results = [gradient_function(one, [one.weight], x, weights)() for one in (layer, plain)]
    for found, expected in zip(*([y, by_x, by_weight[0]] for y, by_x, by_weight in results)):
        np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-4, atol=1e-5)


def test_vgg_has_mindcvs_names_and_the_papers_values(mode):
    whole = {"features": [0, 3, 6, 8, 11, 13, 16, 18], "classifier": [0, 3, 6]}
    stages = [len(stage) for stage in STAGES["vgg11"]]
    net = VGG(((2,), (2,), (2, 2), (2, 2), (2, 2)), 3, 32, width=4)
    assert stages == [1, 1, 2, 2, 2]
    assert [name for name, _ in net.parameters_and_names()] == [
        f"{part}.{number}.{one}" for part, all_of in whole.items() for number in all_of for one in ("weight", "bias")]
    net = VGG(((4,), (5, 6)), 3, 8, width=7).set_train(False)
    get_pet_model(net, LoraConfig(lora_rank=2, lora_alpha=4, target_modules=rf"(.*\.)?({VGG.targets})",
                                  modules_to_save=[VGG.head_path]))
    assert sum(1 for name, _ in net.parameters_and_names() if name.endswith("lora_a")) == 5
    filled(net)
    values = {name: numbers(item) for name, item in net.parameters_and_names()}

    def weight(path: str) -> np.ndarray:
        own = values[f"{path}.weight"]
        if f"{path}.mindpet_delta_lora_a" not in values:
            return own
        a, b = (values[f"{path}.mindpet_delta_lora_{name}"] for name in "ab")
        scale = values[f"{path}.scaling"]
        return own + scale * (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(own.shape)

    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    y = x
    for number in (0, 3, 5):
        y = convolved(y, weight(f"features.{number}"), 1) + values[f"features.{number}.bias"].reshape(-1, 1, 1)
        y = y.clip(0)
        if number != 3:
            y = y.reshape(*y.shape[:2], y.shape[2] // 2, 2, -1, 2).max((3, 5))
    y = y.reshape(2, -1)
    for number in (0, 3, 6):
        y = y @ weight(f"classifier.{number}").T + values[f"classifier.{number}.bias"]
        y = y.clip(0) if number != 6 else y
    np.testing.assert_allclose(net(Tensor(x, ms.float32)).asnumpy(), y, rtol=1e-4, atol=1e-4)


class Plain(nn.Cell):
    """A net that is not linear, with a layer of its own that LoRA may adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Dense(12, 4)

    def construct(self, x: Tensor) -> Tensor:
        return self.dense(x.reshape(x.shape[0], 12)).tanh()


def test_a_branch_is_saved_scaled_and_merged_like_any_other(mode, tmp_path):
    net, other = WithBranch(Plain(), 12, 4), WithBranch(Plain(), 12, 4)
    for item, value in zip(other.get_parameters(), net.get_parameters()):
        item.set_data(value)
    x = np.random.default_rng(0).standard_normal((3, 3, 2, 2)).astype(np.float32)
    base = net.net(Tensor(x)).asnumpy()
    get_pet_model(net, LoraConfig(lora_rank=2, lora_alpha=6, target_modules=["branch"]))
    np.testing.assert_array_equal(net(Tensor(x)).asnumpy(), base)
    assert [item.name for item in net.trainable_params()] == [
        "branch.mindpet_delta_lora_a", "branch.mindpet_delta_lora_b"]
    b = np.random.default_rng(1).standard_normal((4, 2)).astype(np.float32)
    net.branch.mindpet_delta_lora_b.set_data(Tensor(b))
    beside = x.reshape(3, 12) @ numbers(net.branch.mindpet_delta_lora_a).T @ b.T
    for scale in (1.0, 0.5):
        set_lora_scale(net, scale)
        np.testing.assert_allclose(net(Tensor(x)).asnumpy(), base + scale * 3 * beside, rtol=1e-5, atol=1e-5)
    with adapters_disabled(net):
        np.testing.assert_array_equal(net(Tensor(x)).asnumpy(), base)
    set_lora_scale(net, 1.0)
    load_adapter(other, save_adapter(net, tmp_path / "branch"))
    expected = net(Tensor(x)).asnumpy()
    np.testing.assert_array_equal(other(Tensor(x)).asnumpy(), expected)
    merge(other)
    assert type(other.branch) is nn.Dense
    product = 3 * b @ numbers(net.branch.mindpet_delta_lora_a)
    np.testing.assert_allclose(other.branch.weight.asnumpy(), product, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other(Tensor(x)).asnumpy(), expected, rtol=1e-5, atol=1e-5)
    unmerge(other)
    np.testing.assert_array_equal(other(Tensor(x)).asnumpy(), expected)


# Reading torch's files


def test_tensors_of_torchs_files(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a.weight": rng.standard_normal((3, 4)).astype(np.float32), "b": np.array(7),
               "c": rng.standard_normal((2, 3, 1, 1)).astype(np.float32)}
    found = torch_file.read_tensors(torch_files.save(tmp_path / "old.pth", tensors))
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    row = np.arange(6, dtype=np.float32)
    pickled = torch_files.state_dict({"x": torch_files.tensor("0", b"FloatStorage", 6, (2, 2), (1, 2), 1)})
    for write in (torch_files.old_file, torch_files.zip_file):
        found = torch_file.read_tensors(write(tmp_path / "x.pth", pickled, {"0": row}))
        np.testing.assert_array_equal(found["x"], [[1, 3], [2, 4]])


@pytest.mark.parametrize(("pickled", "message"), [
    (torch_files.calls("os", "system", "touch PWNED"), "names 'os.system'"),
    (torch_files.calls("builtins", "eval", "open('PWNED', 'w')"), "names 'builtins.eval'"),
    (torch_files.calls("torch._utils", "_rebuild_tensor", "touch PWNED"), "names 'torch._utils._rebuild_tensor'"),
    (b"\x80\x02(cos\nsystem\n" + torch_files.text("touch PWNED") + b"o.", "names 'os.system'"),
    (b"\x80\x02(" + torch_files.text("touch PWNED") + b"ios\nsystem\n.", "instruction INST"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch PWNED\x85R.", "instruction SHORT_BINUNICODE"),
    (b"\x80\x02ctorch\nFloatStorage\n}" + torch_files.text("a") + b"Nsb.", "changes something that is no dict"),
    (b"\x80\x02ccollections\nOrderedDict\n(Ktt\x81.", "it"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNt", "damaged"),
    (b"\x80\x02]q\x00.", "something else than tensors"), (b"\x80\x02}q\x00.", "something else than tensors"),
    (b"\x80\x02K\x01.", "something else than tensors"), (b"0", "instruction POP"), (b"\x80\x02h\x05.", "damaged"),
    *[(torch_files.state_dict({"x": torch_files.tensor("0", b"FloatStorage", 6, shape, strides, offset)}),
       "reaches beyond its numbers") for shape, strides, offset in (
        ((7,), (1,), 0), ((2, 3), (3, 2), 0), ((6,), (1,), 1), ((2,), (-1,), 3), ((2**30, 2**30), (0, 0), 0),
        ((-1,), (1,), 0), ((2,), (1, 1), 0), ((6,), (2**30,), 0))]])
def test_a_file_that_does_more_than_hold_tensors_is_refused(tmp_path, pickled, message):
    for write in (torch_files.old_file, torch_files.zip_file):
        path = write(tmp_path / "x.pth", pickled, {"0": np.zeros(6, np.float32)} if b"Float" in pickled else {})
        with pytest.raises(torch_file.Refused, match=message):
            torch_file.read_tensors(path)
        with pytest.raises(UserError, match="cannot be used"):
            image_nets.read_weights(path)
    assert not (tmp_path / "PWNED").exists()


def test_a_file_cut_short_is_refused(tmp_path):
    whole = torch_files.save(tmp_path / "x.pth", {"a": np.ones(5, np.float32)}).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "x.pth").write_bytes(whole[:length])
        with pytest.raises(torch_file.Refused):
            torch_file.read_tensors(tmp_path / "x.pth")


def test_weights_fill_the_net_they_are_of(tmp_path):
    net, other = tiny(5, 16), EfficientNetLite(3, 16, **TINY)
    names = {name: image_nets.pytorch_name(name) for name, _ in net.parameters_and_names()}
    tensors = {names[name]: item.asnumpy() for name, item in net.parameters_and_names()}
    tensors["_bn0.num_batches_tracked"] = np.array(3)
    image_nets.fill(other, torch_files.save(tmp_path / "x.pth", tensors), "_fc")
    for name, item in other.parameters_and_names():
        if not name.startswith("_fc"):
            np.testing.assert_array_equal(item.asnumpy(), tensors[names[name]])
    ms.save_checkpoint(net, str(tmp_path / "x.ckpt"))
    image_nets.fill(EfficientNetLite(3, 16, **TINY), tmp_path / "x.ckpt", "_fc")
    with pytest.raises(UserError, match=r"_fc.weight is \(5, 8\) there, \(3, 8\) here"):
        image_nets.fill(other, tmp_path / "x.pth")
    with pytest.raises(UserError, match="_bn1.bias is in the net only"):
        image_nets.fill(other, torch_files.save(tmp_path / "y.pth", {
            name: value for name, value in tensors.items() if name != "_bn1.bias"}))
    with pytest.raises(UserError, match="there is no file of weights"):
        image_nets.fill(other, tmp_path / "none.pth")


# A whole run

COLOURS = {"blue": (40, 60, 220), "green": (30, 180, 60), "red": (210, 40, 50)}


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    """Squares of a colour and some noise, in all kinds of files."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
            picture = Image.fromarray(pixels)
            (picture.convert("RGBA") if number % 2 else picture).save(folder / name / f"{number}.png")
        (folder / name / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "train", 6, 0)
    write_pictures(folder / "heldout", 9, 1)
    torch_files.save(folder / "tiny.pth", {
        image_nets.pytorch_name(name): item.asnumpy() for name, item in tiny(5, 32).parameters_and_names()})
    return folder


@pytest.fixture
def tiny_nets(monkeypatch, graph_mode):
    """Of the net's name, one with few channels."""
    monkeypatch.setattr(image_nets, "EfficientNetLite", lambda classes, size: EfficientNetLite(classes, size, **TINY))


def run(pictures: Path, out: Path, *flags: str) -> int:
    return TRAIN.main(["--data", str(pictures / "train"), "--weights", str(pictures / "tiny.pth"), "--size", "32",
                       "--out", str(out), *flags])


def test_a_run_trains_saves_and_predicts(pictures, tiny_nets, tmp_path, capfd):
    out = tmp_path / "run"
    assert run(pictures, out, "--epochs", "30", "--rank", "2", "--branch", "2", "--lr", "0.02") == 0
    results = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31)) and rows[-1]["loss"] < rows[0]["loss"] / 2
    assert results["accuracy_after"] >= 0.9 and results["trained"] < results["total"]
    assert Image.open(out / "predictions.png").width > 8 * 128
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and "branch" in " ".join(config["target_modules"]) and config["modules_to_save"] == [
        "net._fc"]
    net, settings = image_run.load_run(out, None)
    _, asked = image_folder.read_folder(pictures / "heldout", 1, settings.classes)
    # Nothing of the base has moved, BatchNorm's statistics least of all.
    base = dict(tiny(5, 32).parameters_and_names())
    for name, item in net.net.parameters_and_names():
        if name in base and not name.startswith("_fc."):
            np.testing.assert_array_equal(item.asnumpy(), base[name].asnumpy(), err_msg=name)
    capfd.readouterr()
    paths = [str(path) for path in asked.paths]
    assert PREDICT.main([*paths, "--run", str(out)]) == 0
    lines = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    assert [line[2] for line in lines] == paths
    right = [line[0] == settings.classes[label] for line, label in zip(lines, asked.labels)]
    assert sum(right) / len(right) == results["accuracy_after"]
    assert run(pictures, out) == 2 and "already: give another --out, or --overwrite" in capfd.readouterr().err
    assert PREDICT.main(["none.png", "--run", str(out)]) == 2 and "no picture none.png" in capfd.readouterr().err
    assert PREDICT.main([paths[0], "--run", str(pictures)]) == 2 and "has no settings.json" in capfd.readouterr().err


def test_before_training_the_net_is_the_nearest_class_mean(pictures, tiny_nets):
    settings = image_run.ImageSettings(pictures / "train", pictures, weights=pictures / "tiny.pth", size=32, rank=2,
                                       classes=tuple(COLOURS))
    net = image_run.adapted_net(settings).set_train(False)
    _, seen = image_folder.read_folder(pictures / "train", 2)
    _, asked = image_folder.read_folder(pictures / "heldout", 1)
    known, unknown = (image_folder.load(one.paths, 32) for one in (seen, asked))
    embedding = image_run.Embedding(net)
    features, others = (image_run.outputs(embedding, one).astype(np.float64) for one in (known, unknown))
    image_run.set_head(net, frozen_head.head_of_means(features, seen.labels, 3))
    means = np.stack([features[seen.labels == label].mean(0) for label in range(3)])
    nearest = ((others[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(image_run.outputs(net, unknown).argmax(1), nearest)


def test_regression_divides_what_a_line_divides():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = 100 + 5 * np.eye(3)[labels] @ rng.standard_normal((3, 8)) + rng.standard_normal((60, 8))
    weight, bias = frozen_head.regression(features, labels, 3)
    assert weight.shape == (3, 8) and weight.dtype == bias.dtype == np.float32
    assert np.mean((features @ weight.T + bias).argmax(1) == labels) > 0.95


def test_without_a_folder_of_its_own_a_fifth_is_held_out(pictures):
    _, all_of = image_folder.read_folder(pictures / "heldout", 3)
    seen, unseen = image_folder.divide(all_of, 0)
    assert np.bincount(unseen.labels).tolist() == [2, 2, 2] and np.bincount(seen.labels).tolist() == [7, 7, 7]
    assert sorted([*seen.paths, *unseen.paths]) == sorted(all_of.paths)


def test_pictures_are_normalised_as_the_nets_authors_do(tmp_path):
    Image.fromarray(np.full((10, 10, 3), (0, 127, 255), np.uint8)).save(tmp_path / "x.png")
    found = image_folder.load([tmp_path / "x.png"], 8)
    np.testing.assert_allclose(found[0, :, 0, 0], [-127 / 128, 0, 1], atol=1e-6)
    assert found.shape == (1, 3, 8, 8) and found.dtype == np.float32
    moved = image_folder.varied(np.arange(2 * 3 * 20 * 20, dtype=np.float32).reshape(2, 3, 20, 20),
                                np.random.default_rng(0))
    assert moved.shape == (2, 3, 20, 20) and not np.array_equal(moved[0], moved[1] - 1200)


@pytest.mark.parametrize(("change", "flags", "message"), [
    ("", ["--data", "none"], "there is no folder none: give a folder with a folder of pictures for each class"),
    ("empty", [], "has no folder with pictures (.bmp, "), ("one", [], "has one class, red: it needs at least two"),
    ("few", [], "the class red in"), ("broken", [], "red/0.png"), ("other", [], "blue is in one of the two only"),
    ("", ["--weights", "none.pth"], "there is no file of weights none.pth"),
    ("", ["--targets", "_expnd"], "hits nothing"), ("", ["--targets", "("], "target_modules"),
    ("", ["--targets", "_depthwise_conv"], "leave it out with exclude_modules"),
    ("", ["--net", "vgg11"], "no package has weights of vgg11"),
    ("", ["--net", "vgg11", "--size", "40"], "--size must be a multiple of 32, got 40"),
    ("", ["--device", "Ascend"], "MindSpore finds no Ascend on this machine")])
def test_what_users_get_wrong_is_one_sentence(tiny_nets, pictures, tmp_path, capfd, change, flags, message):
    for part in ("train", "heldout"):
        write_pictures(tmp_path / part, 2, 0)
    (tmp_path / "tiny.pth").write_bytes((pictures / "tiny.pth").read_bytes())
    red = [tmp_path / "train" / "red" / f"{number}.png" for number in range(2)]
    if change in ("empty", "one", "few"):
        names = {"empty": COLOURS, "one": ["blue", "green"], "few": []}[change]
        gone = [path for name in names for path in (tmp_path / "train" / name).glob("*.png")]
        for path in [*gone, *(red[:1] if change == "few" else [])]:
            path.unlink()
    if change == "broken":
        red[0].write_bytes(red[0].read_bytes()[:60])
    if change == "other":
        for path in (tmp_path / "heldout" / "blue").glob("*"):
            path.unlink()
        (tmp_path / "heldout" / "blue").rmdir()
    # Of vgg11 there are no weights to find.
    own = [] if "vgg11" in flags else ["--weights", str(tmp_path / "tiny.pth")]
    assert TRAIN.main(["--data", str(tmp_path / "train"), "--size", "32", "--out", str(tmp_path / "out"), *own,
                       *flags]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("train.py: error:") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--size", "8"], "expected 32 to 1024 pixels"), (["--rank", "0"], "expected a whole number above 0"),
    (["--lr", "nan"], "expected a number above 0"), (["--net", "resnet"], "invalid choice: 'resnet'")])
def test_flags_that_cannot_be(capfd, flags, message):
    with pytest.raises(SystemExit) as stopped:
        TRAIN.main(flags)
    assert stopped.value.code == 2 and message in capfd.readouterr().err


def test_the_data_has_nothing_twice():
    classes, seen = image_folder.read_folder(HERE / "data" / "train", 5)
    same, unseen = image_folder.read_folder(HERE / "data" / "heldout", 5)
    assert classes == same and len(classes) == 9
    things = [{path.stem.rpartition("-")[0] for path in one.paths} for one in (seen, unseen)]
    assert not things[0] & things[1]
    assert len({path.read_bytes() for path in [*seen.paths, *unseen.paths]}) == len(seen.paths) + len(unseen.paths)
    assert set(np.bincount(seen.labels)) | set(np.bincount(unseen.labels)) == {20}
