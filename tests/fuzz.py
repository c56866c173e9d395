"""Files of strangers by the thousand: valid ones, damaged at random or with intent, and what reading them must do.

Each kind in `KINDS` has a strategy that gives the bytes of a file and a check, which returns "read" or "refused" and
fails on anything else: another exception than ValueError and OSError, a message that does not name the file, another
reading than the format's own library has, or more memory or time than a file of that size may take.
"""
from __future__ import annotations

import functools
import json
import shutil
import time
import tracemalloc
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

import files
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mindspore import nn
from mindspore.train.checkpoint_pb2 import Checkpoint
from nets import state
from safetensors import deserialize

import mindpet_lite as mp
from mindpet_lite.delta import METHODS
from mindpet_lite.formats import directory
from mindpet_lite.formats.checkpoint_file import open_checkpoint, to_parts
from mindpet_lite.formats.files import BF16, open_tensors, to_bytes
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.inspect import inspect, table

SECONDS, MEMORY, PER_BYTE = 5.0, 3_000_000, 60
ALL_TYPES = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16),
             "c": np.arange(3, dtype=np.uint16).view(BF16), "d.0": np.arange(5), "empty": np.zeros((0, 3), np.float32),
             "scalar": np.array(2.5, np.float32), "truth": np.array([True, False])}
NUMBERS = [0, 1, 2, 3, 4, 6, 8, 12, 24, -1, 2 ** 31, 2 ** 32, 2 ** 62, 2 ** 63, 2 ** 64, 10 ** 9, 10 ** 19, 10 ** 30,
           True, False, 1.0, 0.5, 1e400, float("nan"), float("-inf"), 2.0 ** 1023]
TEXTS = ["", "a", "F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F64", "../../etc/passwd", "/etc/passwd", "..\\x",
         "C:\\x", "a\0b", "\n", "\ud800", "名", "x" * 5000, "__metadata__", "LORA", "none", "to_q", "(", "(a+)+b",
         ".*" * 20, "__class__", "0" * 400, "(a|a)*" * 9 + "b", "(?i)q", "a{9999999999999}", "(" * 3000 + ")" * 3000]
# A path that takes for ever to match where an expression repeats what it repeats.
LONG = "a" * 60
METHODS_SEEN = {"lora": {}, "adapter": {}, "low_rank_adapter": {},
                "prefixtuning": {"prefix_token_num": 2, "embed_dim": 3, "mid_dim": 2}, "ptuning2": {"pre_seq_len": 2}}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
          "target_modules": ["to_q", LONG], "rank_pattern": {}, "alpha_pattern": {LONG: 8}, "use_rslora": False,
          "modules_to_save": None, "base_model_name_or_path": "../../../etc/passwd", "init_lora_weights": True}

scalars = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(), st.floats(), st.text(max_size=8),
                    st.none())
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(
    st.one_of(st.sampled_from([*CONFIG, *TEXTS]), st.text(max_size=5)), inner, max_size=3)), max_leaves=6)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Return `data` cut, with bytes flipped, or with a piece put in, doubled or taken out."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["cut", "flip", "insert", "double", "remove", "length", "value"]))
        place = draw(st.integers(0, max(len(found) - 1, 0)))
        end = place + draw(st.integers(0, 40))
        if kind == "cut":
            del found[place:]
        elif kind == "flip" and found:
            found[place] ^= draw(st.integers(1, 255))
        elif kind == "insert":
            found[place:place] = draw(st.binary(max_size=20))
        elif kind == "double":
            found[place:place] = found[place:end]
        elif kind == "remove":
            del found[place:end]
        elif kind == "value":
            # NaN, infinity, the largest number of float32.
            found[place:place + 4] = draw(st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"]))
        else:
            length = draw(st.one_of(st.sampled_from([0, 1, 7, 8, 99_999_999, 2 ** 31, 2 ** 63, 2 ** 64 - 1]),
                                    st.integers(0, len(data) + 20)))
            found[:8] = length.to_bytes(8, "little")
    return bytes(found)


def as_json(draw, found) -> bytes:
    """Return JSON text, now and then with what Python writes and JSON does not have, or with a key twice."""
    text = json.dumps(found, ensure_ascii=draw(st.booleans()))
    kind = draw(st.sampled_from(["plain"] * 2 + ["double", "deep", "long", "not utf-8"]))
    if kind == "double" and text.startswith("{") and len(found) > 0:
        key = draw(st.sampled_from(sorted(found, key=str)))
        text = "{" + json.dumps({key: found[key]})[1:-1] + "," + text[1:]
    elif kind == "deep":
        depth = draw(st.sampled_from([3, 500, 100_000]))
        text = '{"deep":' + "[" * depth + "]" * depth + "," + text[1:]
    elif kind == "long":
        text = '{"long":' + "9" * draw(st.sampled_from([19, 5000, 100_000])) + "," + text[1:]
    return text.encode("utf-8" if kind != "not utf-8" else "utf-16", "surrogatepass")


@st.composite
def safetensors_files(draw) -> bytes:
    """Return a safetensors file whose header was edited."""
    whole = to_bytes(ALL_TYPES, {"format": "pt"})
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(whole))
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8:8 + length]), whole[8 + length:]
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header)))
        edit = draw(st.sampled_from(["field", "number", "entry", "rename", "remove", "swap"]))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other", "format"]))
        if edit == "field" and isinstance(header[name], dict):
            header[name][field] = draw(values)
        elif edit == "number" and isinstance(header[name], dict) and isinstance(header[name].get(field), list):
            place, old = draw(st.integers(0, 2)), [item for item in header[name][field] if type(item) is int]
            header[name][field][place:place + 1] = [draw(st.sampled_from([
                *NUMBERS, *old, *map(float, old), *(2 * item for item in old), *(item + 1 for item in old)]))]
        elif edit == "entry":
            header[name] = draw(values)
        elif edit == "rename":
            header[draw(st.sampled_from(TEXTS))] = header.pop(name)
        elif edit == "remove":
            del header[name]
        elif edit == "swap":
            other = draw(st.sampled_from(sorted(header)))
            header[name], header[other] = header[other], header[name]
        if not header:
            break
    # One thing at a time: what spoils the whole file hides what is wrong with an entry.
    spoilt = draw(st.sampled_from(["nothing"] * 6 + ["json", "length", "end"]))
    text = as_json(draw, header) if spoilt == "json" else json.dumps(header).encode()
    text += b" " * draw(st.integers(0, 9))
    declared = max(len(text) + draw(st.sampled_from([-1, 1, 8, 1000])), 0) if spoilt == "length" else len(text)
    if spoilt == "end":
        data = draw(st.sampled_from([data[:-1], data[:10], b"", data + b"x", data + data]))
    return declared.to_bytes(8, "little") + text + data


@st.composite
def checkpoint_files(draw) -> bytes:
    """Return a MindSpore checkpoint whose messages were edited."""
    whole = b"".join(bytes(part) for part in to_parts([*ALL_TYPES.items(), ("mindpet_lite", '{"a": 1}')]))
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(whole))
    message = Checkpoint.FromString(whole)
    for _ in range(draw(st.integers(1, 2))):
        value = message.value[draw(st.integers(0, len(message.value) - 1))]
        edit = draw(st.sampled_from(["tag", "type", "dims", "content", "twice", "map", "empty"]))
        if edit == "tag":
            value.tag = draw(st.sampled_from([text for text in TEXTS if "\ud800" not in text]))
        elif edit == "type":
            value.tensor.tensor_type = draw(st.sampled_from(["", "str", "Int4", "Float16", "Float32", "UInt8", "Bool",
                                                             "BFloat16", "x" * 5000]))
        elif edit == "dims":
            place = draw(st.integers(0, 2))
            value.tensor.dims[place:place + 1] = draw(st.lists(st.one_of(st.sampled_from(
                [item for item in NUMBERS if type(item) is int and abs(item) < 2 ** 63]), st.integers(0, 5)),
                max_size=draw(st.sampled_from([1, 2, 40]))))
        elif edit == "content":
            value.tensor.tensor_content = draw(st.binary(max_size=40))
        elif edit == "twice":
            message.value.append(draw(st.sampled_from(list(message.value))))
        elif edit == "map":
            value.maptensor.tensor.add().dims.append(3)
        else:
            value.Clear()
    found = message.SerializePartialToString()
    return found + draw(st.sampled_from([b""] * 4 + [b"crc_num" + bytes(10), b"\x00", b"PK\x03\x04", b"\x0a\xff\xff"]))


@st.composite
def configs(draw) -> bytes:
    """Return an adapter's config whose fields were edited."""
    whole = json.dumps(CONFIG).encode()
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(whole))
    found = dict(CONFIG)
    for _ in range(draw(st.integers(0, 3))):
        found[draw(st.sampled_from([*CONFIG, *TEXTS]))] = draw(values)
    if draw(st.booleans()):
        found[draw(st.sampled_from(["rank_pattern", "alpha_pattern"]))] = {
            draw(st.sampled_from(TEXTS)): draw(st.sampled_from(NUMBERS))}
    if draw(st.booleans()):
        return json.dumps(found).encode()
    return as_json(draw, draw(st.sampled_from([found] * 4 + [[], 1, "x", [found]])))


def bounded(data: bytes, read: Callable[[], object], name: str) -> object | None:
    """Return what `read` does, None where it refuses as it must; fails where it takes too much."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        return read()
    except (ValueError, OSError) as error:
        assert name in str(error) and len(str(error)) < 20_000, str(error)[:1000]
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEMORY + PER_BYTE * len(data), f"{peak} bytes of memory for a file of {len(data)}"
        assert time.perf_counter() - started < SECONDS


def read_all(opened) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with opened as file:
        return {name: file.read(name) for name in file.keys()}, file.metadata


def check_safetensors(data: bytes) -> str:
    path = Path("fuzz.safetensors")
    path.write_bytes(data)
    found = bounded(data, lambda: read_all(open_tensors(path)), path.name)
    if found is None:
        return "refused"
    theirs = {name: (tuple(entry["shape"]), bytes(entry["data"])) for name, entry in deserialize(data)}
    assert {name: (value.shape, value.tobytes()) for name, value in found[0].items()} == theirs
    return "read"


def check_checkpoint(data: bytes) -> str:
    path = Path("fuzz.ckpt")
    path.write_bytes(data)
    found = bounded(data, lambda: read_all(open_checkpoint(path)), path.name)
    if found is None:
        return "refused"
    theirs: dict[str, bytes] = {}
    for value in Checkpoint.FromString(data[:-17] if data[-17:-10] == b"crc_num" else data).value:
        theirs[value.tag] = theirs.get(value.tag, b"") + value.tensor.tensor_content
    ours = {name: value.tobytes() for name, value in found[0].items()}
    assert ours == {name: content for name, content in theirs.items() if name not in found[1]}
    assert found[1] == {name: theirs[name].decode("utf-32-le").rstrip("\0") for name in found[1]}
    return "read"


def check_config(data: bytes) -> str:
    folder = Path("fuzz_config")
    folder.mkdir(exist_ok=True)
    (folder / directory.CONFIG_FILE).write_bytes(data)
    if not (folder / directory.TENSOR_FILE).exists():
        (folder / directory.TENSOR_FILE).write_bytes(to_bytes({
            f"base_model.model.{layer}.lora_{factor}.weight": np.ones(shape, np.float32)
            for layer in ("to_q", LONG) for factor, shape in (("A", (2, 6)), ("B", (6, 2)))}))
    found = bounded(data, lambda: files.load(folder), folder.name)
    if found is None:
        return "refused"
    assert found.method == "lora" and set(found.layers) == {"to_q", LONG}
    json.dumps(found.config, allow_nan=False)
    for layer in found.layers.values():
        assert layer.settings["lora_rank"] == 2 and 0 < layer.settings["lora_alpha"] < 1e9
    return "read"


def small_net() -> nn.Cell:
    return nn.SequentialCell(OrderedDict(to_q=nn.Dense(12, 12), to_k=nn.Dense(12, 12)))


def write_adapters() -> None:
    """Write an adapter of `small_net` for each of some methods, as a directory, and in it as a checkpoint."""
    for method, sizes in METHODS_SEEN.items():
        net = mp.get_pet_model(small_net(), METHODS[method](target_modules=["to_q", "to_k"], **sizes))
        folder = mp.save_adapter(net, Path("valid", method))
        settings = {path: {"method": method, "settings": cell.settings(),
                           "parameters": {own: item.name for own, item in cell.delta_parameters().items()}}
                    for path, cell in (("to_q", net.to_q), ("to_k", net.to_k))}
        (folder / "adapter.ckpt").write_bytes(b"".join(to_parts([
            *((item.name, item.asnumpy()) for item in net.trainable_params()),
            ("mindpet_lite", json.dumps(settings))])))


@st.composite
def adapters(draw) -> tuple[str, str, bytes]:
    """Return a method, the file of its adapter that is damaged, and the damaged file."""
    if not Path("valid").exists():
        write_adapters()
    method = draw(st.sampled_from(list(METHODS_SEEN)))
    name = draw(st.sampled_from([directory.CONFIG_FILE, directory.TENSOR_FILE, "adapter.ckpt"]))
    data = Path("valid", method, name).read_bytes()
    if name != directory.CONFIG_FILE or draw(st.integers(0, 3)) == 0:
        return method, name, draw(damaged(data))
    found = json.loads(data)
    edited = found["layers"]["to_k"] if "layers" in found and draw(st.booleans()) else found
    edited = edited["settings"] if "settings" in edited and draw(st.booleans()) else edited
    for _ in range(draw(st.integers(1, 2))):
        edited[draw(st.sampled_from([*edited, *CONFIG]))] = draw(values)
    return method, name, as_json(draw, found) if draw(st.integers(0, 3)) == 0 else json.dumps(found).encode()


@functools.cache
def read_whole(method: str) -> None:
    """Read the valid adapter once: what the first call imports and keeps is no memory that a damaged file takes."""
    path = Path("valid", method)
    table(inspect(path, None, METHODS))
    convert(path, Path("converted.ckpt"), "mindpet", methods=METHODS)
    mp.load_adapter(small_net(), path)


def check_adapter(case: tuple[str, str, bytes]) -> str:
    method, name, data = case
    read_whole(method)
    shutil.copytree(Path("valid", method), "fuzz_adapter", dirs_exist_ok=True)
    Path("fuzz_adapter", name).write_bytes(data)
    net = small_net()
    before = state(net)
    path = Path("fuzz_adapter", name) if name.endswith(".ckpt") else Path("fuzz_adapter")
    bounded(data, lambda: table(inspect(path, None, METHODS)), "fuzz_adapter")
    bounded(data, lambda: convert(path, Path("converted.ckpt"), "mindpet", methods=METHODS), "fuzz_adapter")
    found = bounded(data, lambda: mp.load_adapter(net, path), "fuzz_adapter")
    if found is None:
        assert state(net) == before
        return "refused"
    assert all(np.isfinite(value.asnumpy()).all() for value in net.get_parameters())
    return "read"


KINDS = {"safetensors": (safetensors_files(), check_safetensors), "ckpt": (checkpoint_files(), check_checkpoint),
         "adapter_config": (configs(), check_config),
         "load_adapter": (adapters(), check_adapter)}


def fuzz(strategy: st.SearchStrategy, check: Callable[..., str], cases: int, number: int) -> Counter:
    """Run `check` on so many cases and return how often it said what."""
    counts: Counter = Counter()

    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(data) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts[check(data)] += 1

    run()
    return counts
