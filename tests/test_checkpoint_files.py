"""MindSpore's ``.ckpt`` files without MindSpore: what is written, what is read, and what is refused in which words."""
from __future__ import annotations

import os
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from files import OTHERS, TENSORS, checkpoint_bytes, same
from mindspore import Tensor
from mindspore.train.checkpoint_pb2 import Checkpoint

from mindpet_lite.formats import checkpoint_file
from mindpet_lite.formats.checkpoint_file import open_checkpoint, to_parts
from mindpet_lite.formats.files import as_float

TYPES = "float32 float16 float64 int8 uint8 int16 uint16 int32 uint32 int64 uint64 bool".split()


def checkpoint(values: dict, name: str = "x.ckpt", **more) -> Path:
    ms.save_checkpoint([{"name": key, "data": value} for key, value in values.items()], name, **more)
    return Path(name)


def in_mindspore() -> dict[str, Tensor]:
    values = {f"x.{name}": Tensor(np.arange(6).reshape(2, 3).astype(name)) for name in TYPES}
    return {**values, "bf": Tensor(np.arange(6, dtype=np.float32)).astype(ms.bfloat16),
            "scalar": Tensor(2.5, ms.float32), "one": Tensor(np.ones(1, np.float32)),
            "名": Tensor(np.ones((300, 200), np.float32))}


TEXTS = {"text": "héllo 名 𝄞\n{}", "none": "", "number": 3, "real": 2.5, "truth": True}


@pytest.mark.parametrize("crc_check", [False, True])
def test_mindspores_checkpoints_are_read_and_written_byte_for_byte(crc_check):
    values = in_mindspore()
    path = checkpoint(values, append_dict=TEXTS, crc_check=crc_check)
    with open_checkpoint(path) as file:
        assert file.metadata == {"text": TEXTS["text"], "none": ""}
        found = {name: file.read(name) for name in file.keys()}
    for name, value in values.items():
        theirs = value.asnumpy() if name != "bf" else value.astype(ms.float32).asnumpy()
        assert same(as_float(found[name]), theirs), name
    assert (found["number"], found["real"], found["truth"]) == (3, 2.5, True)
    if not crc_check:
        everything = {**found, "text": TEXTS["text"], "none": ""}
        assert checkpoint_bytes({name: everything[name] for name in (*values, *TEXTS)}) == path.read_bytes()


def test_mindspore_reads_what_we_write():
    tensors = {name: value for name, value in TENSORS.items() if name != "empty"}
    Path("x.ckpt").write_bytes(checkpoint_bytes({**tensors, "text": "héllo"}))
    found = ms.load_checkpoint("x.ckpt")
    assert found.pop("text") == "héllo" and set(found) == set(tensors)
    for name, value in tensors.items():
        theirs = found[name].astype(ms.float32).asnumpy() if name == "bf" else found[name].asnumpy()
        assert np.array_equal(theirs, as_float(value), equal_nan=True) and theirs.shape == value.shape, name


def test_large_tensors_come_in_parts(monkeypatch):
    value = np.arange(1000, dtype=np.float32).reshape(10, 100)
    monkeypatch.setattr(checkpoint_file, "_PART", 700)
    Path("x.ckpt").write_bytes(checkpoint_bytes({"a": value, "b": value[:1], "c": value}))
    assert np.array_equal(ms.load_checkpoint("x.ckpt")["c"].asnumpy(), value)
    with open_checkpoint(Path("x.ckpt")) as file:
        assert file.keys() == ["a", "b", "c"] and np.array_equal(file.read("b"), value[:1])
        assert np.array_equal(file.read("c"), value)


@pytest.mark.slow
def test_mindspores_own_parts_of_half_a_gigabyte():
    value = np.resize(np.random.default_rng(0).integers(0, 255, 1_000_003, np.uint8), (540, 1024, 1024))
    path = checkpoint({"x": Tensor(value), "y": Tensor(value[:1])})
    with open_checkpoint(path) as file:
        assert np.array_equal(file.read("x"), value) and np.array_equal(file.read("y"), value[:1])
    with path.open("rb") as handle:
        for part in to_parts([("x", value), ("y", value[:1])]):
            assert handle.read(len(part)) == part
        assert not handle.read(1)


def test_every_truncation_of_a_checkpoint_is_refused_or_ends_between_values():
    whole = checkpoint({"x": Tensor(np.ones(2, np.float32)), "y": Tensor(np.ones(3, np.float16))}).read_bytes()
    read = []
    for end in range(len(whole)):
        Path("y.ckpt").write_bytes(whole[:end])
        try:
            with open_checkpoint(Path("y.ckpt")) as file:
                read.append(file.keys())
        except ValueError as error:
            assert str(error).startswith("y.ckpt is not a whole MindSpore checkpoint ("), error
    assert read == [[], ["x"]]


def test_a_damaged_checksum_is_noticed():
    path = checkpoint({"x": Tensor(np.ones(9, np.float32))}, crc_check=True)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    os.chmod(path, 0o600)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="x.ckpt is damaged: its content does not have the checksum at its end"):
        open_checkpoint(path)


def message(edit) -> bytes:
    found = Checkpoint.FromString(checkpoint_bytes({
        "a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32), "t": "text"}))
    edit(found.value)
    return found.SerializePartialToString()


def twice(values) -> None:
    values.append(values[0])


@pytest.mark.parametrize("edit, text", [
    (lambda values: values[0].tensor.dims.append(10 ** 9), "a of shape .2, 3, 1000000000. and type Float32 takes"),
    (lambda values: values[0].tensor.dims.append(-1), "the shape .* of a is beyond"),
    (lambda values: values[0].tensor.dims.extend([1] * 40), "a tensor has a field 1 too many"),
    (lambda values: setattr(values[0].tensor, "tensor_type", "Int4"), "a is of type 'Int4', which cannot be read"),
    (lambda values: setattr(values[0].tensor, "tensor_content", b"12"), "takes 24 bytes, but 2 are there"),
    (twice, "a stands in it twice"), (lambda values: setattr(values[1], "tag", "a"), "a stands in it twice"),
    (lambda values: values[0].maptensor.tensor.add(), "a value is no tensor with a name"),
    (lambda values: values[0].ClearField("tensor"), "a value is no tensor with a name"),
    (lambda values: values[0].tensor.ClearField("tensor_content"), "lacks its type or its data"),
    (lambda values: setattr(values[0], "tag", "../x"), "path of folders"),
    (lambda values: setattr(values[0], "tag", "x" * 5000), "a name or type is 5000 bytes long"),
    (lambda values: setattr(values[2].tensor, "tensor_content", b"\xff\xff\xff\xff"), "utf-32"),
])
def test_hostile_checkpoints_are_refused_in_words(edit, text):
    Path("x.ckpt").write_bytes(message(edit))
    with pytest.raises(ValueError, match=rf"^x.ckpt is not a whole MindSpore checkpoint \(.*{text}"):
        open_checkpoint(Path("x.ckpt"))


@pytest.mark.parametrize("data, message", OTHERS)
def test_files_of_another_kind_are_named_and_never_executed(data, message):
    Path("x.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(Path("x.ckpt"))
    assert not Path("executed").exists()
