"""Safetensors files: what is written, what is read, and what is refused in which words."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from files import BITS, OTHERS, TENSORS, checkpoint_bytes, same
from safetensors import TensorSpec, serialize
from safetensors.numpy import load_file

from mindpet_lite.formats.checkpoint_file import to_parts
from mindpet_lite.formats.files import BF16, as_float, open_tensors, read_tensors, to_bytes, to_header


def write(header: object, data: bytes = b"", name: str = "x.safetensors") -> Path:
    """Write a file with a header given as text, bytes, or what JSON says."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    Path(name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return Path(name)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


# Read and written

@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"one": "ü\n\x01\"\\"}])
def test_our_bytes_are_those_of_the_safetensors_library(metadata):
    specs = {name: TensorSpec(dtype="bfloat16" if value.dtype == BF16 else value.dtype.name, shape=value.shape,
                              data_ptr=value.ctypes.data, data_len=value.nbytes) for name, value in TENSORS.items()}
    assert to_bytes(TENSORS, metadata) == bytes(serialize(specs, metadata or {"format": "pt"}))
    assert to_bytes({}) == bytes(serialize({}, {"format": "pt"}))


def test_the_order_of_dictionaries_does_not_show():
    turned = dict(reversed(TENSORS.items()))
    assert to_bytes(turned, {"b": "1", "a": "2"}) == to_bytes(TENSORS, {"a": "2", "b": "1"})


def test_what_is_written_is_read_bit_for_bit():
    Path("x.safetensors").write_bytes(to_bytes(TENSORS, {"a": "1"}))
    found = read_tensors(Path("x.safetensors"))
    assert set(found) == set(TENSORS) and all(same(found[name], TENSORS[name]) for name in TENSORS)
    with open_tensors(Path("x.safetensors")) as file:
        assert file.metadata == {"a": "1"} and set(file.keys()) == set(TENSORS)
        for name in reversed(file.keys()):
            assert file.shape(name) == TENSORS[name].shape and file.dtype(name) == TENSORS[name].dtype
            value = file.read(name)
            assert same(value, TENSORS[name]) and value.flags.writeable
    assert to_bytes(found, {"a": "1"}) == Path("x.safetensors").read_bytes()


def test_strided_and_big_endian_arrays_are_written_by_value():
    value = np.arange(12, dtype=">f4").reshape(3, 4).T[::2]
    Path("x.safetensors").write_bytes(to_bytes({"x": value}))
    found = read_tensors(Path("x.safetensors"))["x"]
    assert found.dtype == np.dtype("<f4") and np.array_equal(found, value)
    assert np.array_equal(load_file("x.safetensors")["x"], value)


def test_bfloat16_keeps_its_bits_and_is_the_upper_half_of_float32():
    values = np.array([[1.0, -2.5], [3.140625, 1e-30]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    path = write({"x": entry("BF16", [2, 2])}, bits.tobytes())
    found = read_tensors(path)["x"]
    assert found.dtype == BF16 and found.tobytes() == bits.tobytes()
    assert np.array_equal(as_float(found), expected) and expected[1, 0] == 3.140625
    assert as_float(found[1, 0:1].reshape(())).shape == () and as_float(values) is values
    assert np.array_equal(as_float(found.T), expected.T) and np.isnan(as_float(BITS.view(BF16))[3])


def test_pefts_own_files_are_written_again_byte_for_byte(shared):
    files = sorted((shared / "fixtures/peft").rglob("adapter_model.safetensors"))
    assert len(files) > 50
    for path in files:
        with open_tensors(path) as file:
            tensors = {name: file.read(name) for name in file.keys()}
            assert to_bytes(tensors, file.metadata) == path.read_bytes(), path


def test_the_header_alone_can_be_written():
    header, order = to_header({name: (value.dtype, value.shape) for name, value in TENSORS.items()})
    assert header + b"".join(TENSORS[name].tobytes() for name in order) == to_bytes(TENSORS)


@pytest.mark.parametrize("tensors, message", [
    ({"x": np.array(["a"])}, "x is of type <U1, which a safetensors file cannot hold"),
    ({"": np.ones(1)}, "has 0 characters"), ({"../x": np.ones(1)}, "path of folders"),
    ({"a\nb": np.ones(1)}, "printed")])
def test_what_cannot_be_read_is_not_written(tensors, message):
    with pytest.raises(ValueError, match=message):
        to_bytes(tensors)
    with pytest.raises(ValueError, match=message.replace("safetensors file", "MindSpore checkpoint")):
        list(to_parts(tensors.items()))


GOOD = entry()
BAD_HEADERS = [
    ([], b"", "its header is not valid JSON: it must begin with"),
    ("{", b"", "its header is not valid JSON"), ('{"x": NaN}', b"", "x must be made of finite numbers"),
    ("{}{}", b"", "not valid JSON"), (b'{"\xff": 1}', b"", "not valid JSON: 'utf-8'"),
    ('{"x":' + "[" * 100_000, b"", "nested too deeply"), ('{"x":' + "9" * 5000 + "}", b"", "has 5000 digits"),
    (f'{{"x": {json.dumps(GOOD)}, "x": {json.dumps(GOOD)}}}', bytes(8), "the key 'x' stands twice"),
    ('{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8), "'dtype' stands twice"),
    ({"x": 3}, b"", "x must have dtype, shape and data_offsets, but has 3"),
    ({"x": entry(more=1)}, bytes(8), "x must have dtype"), ({"x": {"dtype": "F32"}}, b"", "x must have dtype"),
    ({"x": entry("F4", [16])}, bytes(8), "x is of type 'F4', which cannot be read; save it as F32"),
    ({"x": entry("f32")}, bytes(8), "x is of type 'f32'"), ({"x": entry(["F32"])}, bytes(8), "x is of type"),
    ({"x": entry(shape=[-2])}, bytes(8), "the shape of x must be a list of lengths"),
    ({"x": entry(shape=[2.0])}, bytes(8), "the shape of x"), ({"x": entry(shape=[True, 2])}, bytes(8), "of x"),
    ({"x": entry(shape="2")}, bytes(8), "the shape of x"), ({"x": entry(shape=None)}, bytes(8), "the shape of x"),
    ({"x": entry(shape=[2 ** 40, 2 ** 40])}, bytes(8), "beyond what an array can have"),
    ({"x": entry(shape=[0, 2 ** 62], offsets=[0, 0])}, b"", "beyond what an array can have"),
    ({"x": entry(shape=[1] * 33, offsets=[0, 4])}, bytes(4), "beyond what an array can have"),
    ({"x": entry(shape=[10 ** 9])}, bytes(8), "takes 4000000000 bytes, but its data_offsets .0, 8. span 8"),
    ({"x": entry(shape=[10 ** 9], offsets=[0, 4 * 10 ** 9])}, bytes(8), "x runs 3999999992 bytes past the end"),
    ({"x": entry(offsets=[8, 0])}, bytes(8), "the data_offsets of x must be a begin and an end"),
    ({"x": entry(offsets=[0, 8, 16])}, bytes(8), "offsets of x"), ({"x": entry(offsets=[-8, 0])}, bytes(8), "of x"),
    ({"x": entry(offsets=[0, 8.0])}, bytes(8), "of x"), ({"x": entry(offsets=8)}, bytes(8), "data_offsets of x"),
    ({"x": entry("F16")}, bytes(8), "type F16 takes 4 bytes"),
    ({"x": entry(offsets=[2 ** 64, 2 ** 64 + 8])}, bytes(8), "between the header and x belong to no tensor"),
    ({"x": GOOD, "y": GOOD}, bytes(8), "x and y overlap"),
    ({"x": GOOD, "y": entry(offsets=[4, 12])}, bytes(12), "x and y overlap"),
    ({"x": GOOD, "y": entry(offsets=[9, 17])}, bytes(17), "1 bytes between x and y"),
    ({"x": GOOD}, bytes(9), "1 bytes after x belong to no tensor"), ({}, bytes(1), "1 bytes after the header"),
    ({"x": GOOD}, bytes(7), "x runs 1 bytes past the end of the file: it was cut short or damaged; copy"),
    ({"__metadata__": {"a": 1}}, b"", "__metadata__ must hold texts"), ({"__metadata__": []}, b"", "__metadata__ must"),
    ({"": GOOD}, bytes(8), "has 0 characters"), ({"x" * 1001: GOOD}, bytes(8), "has 1001 characters"),
    *(({name: GOOD}, bytes(8), "path of folders") for name in ("/x", "../x", "a/../x", "..\\x", "\\x", "C:\\x", "..")),
    *(({name: GOOD}, bytes(8), "cannot be printed") for name in ("a\0", "\n", "\x1b[0m", "\ud800", "\u202ex")),
]


@pytest.mark.parametrize("header, data, message", BAD_HEADERS, ids=[f"{place}" for place in range(len(BAD_HEADERS))])
def test_damaged_and_hostile_headers_are_refused_in_words(header, data, message):
    path = write(header, data)
    with pytest.raises(ValueError, match=f"^x.safetensors is not a whole safetensors file: .*{message}") as caught:
        open_tensors(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 10, 30_000_000, 100_000_001, 2 ** 31, 2 ** 63, 2 ** 64 - 1])
def test_wrong_header_lengths_are_refused(length):
    whole = to_bytes({"x": np.ones(2, np.float32)})
    Path("x.safetensors").write_bytes(length.to_bytes(8, "little") + whole[8:])
    with pytest.raises(ValueError, match="x.safetensors is not a whole safetensors file"):
        read_tensors(Path("x.safetensors"))


def test_every_truncation_is_refused():
    whole = to_bytes({"x": np.ones(2, np.float32), "y": np.ones(3, np.float16)})
    for end in range(len(whole)):
        Path("x.safetensors").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="^x.safetensors is not a whole safetensors file: "):
            read_tensors(Path("x.safetensors"))


def test_truth_values_are_0_and_1():
    with pytest.raises(ValueError, match="x.safetensors: x holds truth values other than 0 and 1"):
        read_tensors(write({"x": entry("BOOL", [3], [0, 3])}, bytes([0, 1, 2])))


def test_a_file_cut_short_while_it_is_read_is_refused():
    Path("x.safetensors").write_bytes(to_bytes({"x": np.ones(50_000, np.float32)}))
    with open_tensors(Path("x.safetensors")) as file:
        os.truncate("x.safetensors", 1000)
        with pytest.raises(ValueError, match="x.safetensors was cut short while it was read"):
            file.read("x")


@pytest.mark.parametrize("data, message", OTHERS)
def test_files_of_another_kind_are_named_and_never_executed(data, message):
    Path("x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_tensors(Path("x.safetensors"))
    assert not Path("executed").exists()


def test_what_is_no_regular_file_is_not_opened():
    os.mkfifo("pipe")
    for path, error, message in (
            ("pipe", OSError, "pipe is no regular file"), ("/dev/zero", OSError, "no regular file"),
            (".", IsADirectoryError, "is a directory"), ("no", FileNotFoundError, "no")):
        with pytest.raises(error, match=message):
            open_tensors(Path(path))


LITTLE_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import bare
from pathlib import Path
from mindpet_lite.formats.checkpoint_file import open_checkpoint
from mindpet_lite.formats.files import read_tensors
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, used + 200_000_000))
for name, read in (("x.safetensors", read_tensors), ("x.ckpt", open_checkpoint), ("sparse.safetensors", read_tensors)):
    try:
        read(Path(name))
    except ValueError as error:
        print(error)
"""


def test_huge_declared_shapes_take_no_memory():
    write({"x": entry(shape=[10 ** 9], offsets=[0, 4 * 10 ** 9])}, bytes(8))
    content = checkpoint_bytes({"x": np.ones(3, np.float32)})
    Path("x.ckpt").write_bytes(content.replace(b"\x08\x03\x12\x07Float32", b"\x08\x7f\x12\x07Float32"))
    sparse = write({"x": entry(shape=[10 ** 9], offsets=[0, 4 * 10 ** 9])}, name="sparse.safetensors")
    os.truncate(sparse, sparse.stat().st_size + 4 * 10 ** 9)
    result = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, str(Path(__file__).parent)], capture_output=True,
                            text=True, timeout=60)
    lines = result.stdout.splitlines()
    assert "x runs 3999999992 bytes past the end" in lines[0], result.stderr
    assert "takes 508 bytes, but 12 are there" in lines[1]
    assert lines[2] == "sparse.safetensors: x takes 4.0 GB, more memory than there is."
