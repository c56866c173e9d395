"""Each of our own forms with each field of its settings dropped or retyped and each tensor reshaped: never a traceback.

What every command reads is the same adapter: whatever `read_adapter` lets through can be inspected, converted, merged
and loaded, or is refused in a sentence.
"""
from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import nn
from nets import state

import mindpet_lite as mp
from mindpet_lite.delta import METHODS
from mindpet_lite.formats.adapters import TARGETS, open_file, read_adapter, to_files
from mindpet_lite.formats.checkpoint_file import to_parts
from mindpet_lite.formats.directory import CONFIG_FILE, TENSOR_FILE
from mindpet_lite.formats.files import to_bytes
from mindpet_lite.offline.inspect import inspect, table
from mindpet_lite.offline.merge import merge
from mindpet_lite.train.checkpoints import save_trainable

VALUES: list[Any] = [None, True, -1, 0.5, 10 ** 15, "x", [1, "x"], {"a": 1}]
TOKENS = {"trainable_token_indices": {"table": [1, 3]}}
LORA = {"target_modules": ["to_q", "to_k"], "lora_rank": 2}


def net() -> nn.Cell:
    return nn.SequentialCell(OrderedDict(to_q=nn.Dense(6, 6), to_k=nn.Dense(6, 6), table=nn.Embedding(5, 6)))


def two_methods(net: nn.Cell) -> nn.Cell:
    mp.get_pet_model(net, mp.LoraConfig(target_modules=["to_q"], lora_rank=2))
    return mp.get_pet_model(net, mp.AdapterConfig(target_modules=["to_k"], bottleneck_size=2))


def adapted(method: str, **settings: Any) -> Callable[[nn.Cell], nn.Cell]:
    return lambda net: mp.get_pet_model(net, METHODS[method](**{"target_modules": ["to_q", "to_k"], **settings}))


# By name the format, the file's name and what adapts the net.
FORMS = {
    "mindpet": ("mindpet", "adapter.ckpt", adapted("lora", lora_rank=2, use_rslora=True)),
    "checkpoint": ("callback", "adapter.ckpt", adapted("lora", lora_rank=2, **TOKENS)),
    "checkpoint of adapters": ("callback", "adapter.ckpt", adapted("adapter", bottleneck_size=2)),
    "mindformers": ("mindformers", "adapter", adapted("lora", lora_rank=2)),
    "native": ("peft", "adapter", adapted("low_rank_adapter", low_rank_size=2)),
    "native prefix": ("peft", "adapter", adapted("prefixtuning", prefix_token_num=2, embed_dim=2, mid_dim=2)),
    "two methods": ("peft", "adapter", two_methods),
    "peft": ("peft", "adapter", adapted("lora", lora_rank=2, use_dora=True, **TOKENS)),
    "kohya": ("kohya", "adapter.safetensors", adapted("lora", lora_rank=2)),
    "diffusers": ("diffusers", "adapter.safetensors", adapted("lora", lora_rank=2)),
}


def written(form: str) -> tuple[dict[str, np.ndarray], dict[str, str], Path, dict[str, Any] | None]:
    """Write an adapter; return its tensors and texts, the file that holds them, and the config beside it."""
    kind, name, adapt = FORMS[form]
    path = Path(name)
    if kind == "callback":
        save_trainable(adapt(net()), path, {})
    else:
        mp.save_adapter(adapt(net()), path, format=kind)
    file = path / TENSOR_FILE if path.is_dir() else path
    with open_file(file) as opened:
        tensors, texts = {key: opened.read(key) for key in opened.keys()}, dict(opened.metadata)
    return tensors, texts, file, json.loads((path / CONFIG_FILE).read_text()) if path.is_dir() else None


def edited(found: Any) -> Iterator[Any]:
    """Yield a JSON value with each of its parts dropped, and put in the place of another kind of value."""
    if isinstance(found, dict):
        for key, value in found.items():
            rest = {name: item for name, item in found.items() if name != key}
            yield rest
            yield from ({**found, key: other} for other in [*VALUES, *edited(value)])
    elif isinstance(found, list) and found:
        yield from ([other, *found[1:]] for other in VALUES)


def reshaped(tensors: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    for name, value in tensors.items():
        for other in (value.reshape(-1)[:1].reshape(()), value.reshape(-1), value[..., None], value.reshape(-1)[:1],
                      value.reshape(-1)[:0]):
            yield {**tensors, name: np.ascontiguousarray(other).reshape(other.shape)}
        yield {key: item for key, item in tensors.items() if key != name}


def mutations(form: str) -> Iterator[Path]:
    """Write each mutation of an adapter and yield its place."""
    tensors, texts, file, config = written(form)
    place = file if config is None else file.parent

    def write(tensors: dict[str, np.ndarray], texts: dict[str, str], config: dict[str, Any] | None) -> Path:
        file.write_bytes(b"".join(to_parts([*tensors.items(), *texts.items()])) if file.suffix == ".ckpt" else
                         to_bytes(tensors, texts))
        if config is not None:
            (place / CONFIG_FILE).write_text(json.dumps(config))
        return place

    yield write(tensors, texts, config)
    for other in edited(config or {}):
        yield write(tensors, texts, other)
    for key, text in texts.items():
        if text.startswith("{"):
            for entry in edited(json.loads(text)):
                yield write(tensors, {**texts, key: json.dumps(entry)}, config)
    for more in reshaped(tensors):
        yield write(more, texts, config)


def held(call: Callable[..., object], *arguments: object) -> bool:
    """Return whether a call went well; fail unless it did or refuses in a sentence of ours."""
    try:
        call(*arguments)
    except (ValueError, TypeError, OSError) as error:
        assert type(error).__module__ == "builtins" and 20 < len(str(error)) < 6000 and "adapter" in str(error), error
        assert str(error).count("\n") <= 12
        return False
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_no_settings_and_no_shape_is_a_traceback(form):
    base = net()
    # Names and types of a base that `merge` reads.
    Path("base.safetensors").write_bytes(to_bytes({
        item.name.replace("embedding_table", "weight"): item.asnumpy() for item in base.get_parameters()}))
    count = good = 0
    for number, place in enumerate(mutations(form)):
        count += 1
        is_read = held(read_adapter, place, None, METHODS)
        shown = held(lambda *all_of_it: table(inspect(*all_of_it)), place, None, METHODS)
        # kohya's names are shown as they are where they tell no path.
        assert shown == is_read or shown and form == "kohya"
        good += is_read
        if is_read:
            found = read_adapter(place, None, METHODS).state
            for target in TARGETS:
                try:
                    to_files(found, target, Path("new.safetensors" if target not in ("peft", "mindformers") else "new"))
                except ValueError as error:
                    assert len(str(error)) > 15
            if number % 3 == 0:
                held(merge, Path("base.safetensors"), place, Path(f"merged{number}"))
        if number % 4 == 0:
            plain = net()
            before = state(plain)
            if held(mp.load_adapter, plain, place):
                # What is accepted can be saved and read again.
                again = mp.save_adapter(plain, Path("again"))
                assert held(mp.load_adapter, net(), again)
            else:
                assert state(plain) == before
    assert count > 40 and 0 < good < count


@pytest.mark.parametrize("alpha", [10 ** 9, 10 ** 18, 2 ** 63 - 1, 1e30])
def test_an_alpha_that_no_file_may_say_is_refused_wherever_it_stands(alpha):
    tensors, texts, file, _ = written("kohya")
    tensors["lora_unet_to_q.alpha"] = np.array(alpha)
    file.write_bytes(to_bytes(tensors, {}))
    with pytest.raises(ValueError, match="adapter.safetensors.*\n.*alpha must be one positive number below 1e"):
        mp.load_adapter(net(), file)
    with pytest.raises(ValueError, match="lora_alpha must be below 1e"):
        mp.LoraConfig(lora_alpha=alpha)
    with pytest.raises(ValueError, match=r"alpha_pattern\['to_q'\] must be below 1e"):
        mp.LoraConfig(alpha_pattern={"to_q": alpha})


def test_the_largest_alpha_is_saved_and_read_again_in_every_format_or_refused():
    tensors, _, file, _ = written("kohya")
    tensors["lora_unet_to_q.alpha"] = np.array(10 ** 9 - 1)
    file.write_bytes(to_bytes(tensors, {}))
    loaded = mp.load_adapter(net(), file)
    assert loaded.to_q.lora_alpha == 10 ** 9 - 1
    for target, name in (("peft", "again"), ("kohya", "again.safetensors"), ("mindpet", "again.ckpt")):
        assert mp.load_adapter(net(), mp.save_adapter(loaded, name, target)).to_q.lora_alpha == 10 ** 9 - 1
    # The alpha that gives rsLoRA's scale where there is none is that times the root of the rank.
    large = adapted("lora", target_modules=["to_q"], lora_rank=4, lora_alpha=6e8, use_rslora=True)(net())
    for target, name in (("kohya", "large.safetensors"), ("mindformers", "large")):
        with pytest.raises(ValueError, match="alpha would be 1200000000.0 where the scale is alpha / rank"):
            mp.save_adapter(large, name, target)
        assert not Path(name).exists()
    assert mp.load_adapter(net(), mp.save_adapter(large, "large")).to_q.lora_alpha == 6e8


@pytest.mark.parametrize("fields", [{"modules_to_save": 5}, {"modules_to_save": [None]}, {"pet_type": ""},
                                    {"peft_type": None}, {"peft_type": "LORA", "fan_in_fan_out": [1]},
                                    {"layers_to_transform": ["x"]}])
def test_fields_of_our_own_form_are_checked_where_it_is_read(fields):
    net = mp.get_pet_model(nn.SequentialCell(nn.Dense(4, 4)), mp.AdapterConfig(bottleneck_size=2, target_modules=["0"]))
    mp.save_adapter(net, "own")
    config = json.loads(Path("own", CONFIG_FILE).read_text())
    Path("own", CONFIG_FILE).write_text(json.dumps({**config, **fields}))
    for call in (lambda: mp.load_adapter(nn.SequentialCell(nn.Dense(4, 4)), "own"), lambda: inspect(Path("own"))):
        with pytest.raises(ValueError, match="cannot be used"):
            call()
