"""Shapes that settings tell before anything is made, and files whose settings say more than they hold."""
from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
from mindspore import mint, nn
from nets import unchanged

import mindpet_lite as mp
from mindpet_lite.delta import METHODS

DENSE = {"lora": {"lora_rank": 2}, "adapter": {"bottleneck_size": 3}, "low_rank_adapter": {
    "reduction_factor": 2, "low_rank_size": 3}, "prefixtuning": {"prefix_token_num": 3, "embed_dim": 2, "mid_dim": 5},
    "ptuning2": {"pre_seq_len": 3, "prefix_projection": True, "projection_dim": 5}, "bitfit": {}}
CASES = [
    *((method, settings, lambda: nn.Dense(4, 6)) for method, settings in DENSE.items()),
    ("lora", {"lora_rank": 2, "use_dora": True}, lambda: nn.Dense(4, 6)),
    ("lora", {"lora_rank": 2, "lora_bias": True}, lambda: nn.Dense(4, 6, has_bias=False)),
    ("lora", {"lora_rank": 2, "use_dora": True}, lambda: mint.nn.Linear(4, 6)),
    ("lora", {"lora_rank": 2, "use_dora": True}, lambda: nn.Conv1d(4, 6, 3)),
    ("lora", {"lora_rank": 4, "lora_bias": True}, lambda: nn.Conv2d(4, 6, (3, 2), group=2)),
    ("lora", {"lora_rank": 2}, lambda: nn.Conv3d(4, 6, 2)),
    ("lora", {"lora_rank": 2, "use_dora": True}, lambda: mint.nn.Conv2d(4, 6, 3, groups=2)),
    ("lora", {"lora_rank": 2, "use_dora": True}, lambda: nn.Embedding(7, 5)),
    ("lora", {"lora_rank": 2}, lambda: mint.nn.Embedding(7, 5)),
    ("lora", {"_token_indices": [3, 1]}, lambda: nn.Embedding(7, 5)),
    ("trainable_tokens", {"token_indices": [3, 1]}, lambda: nn.Embedding(7, 5)),
    ("prefixtuning", {"prefix_token_num": 3, "prefix_projection": False}, lambda: nn.Dense(4, 6)),
    ("ptuning2", {"pre_seq_len": 3}, lambda: nn.Dense(4, 6)),
]


@pytest.mark.parametrize("method, settings, make", CASES)
def test_shapes_are_those_of_the_parameters(method, settings, make):
    config, cell = METHODS[method](**settings), make()
    made = {name: tuple(item.shape) for name, item in config.adapt(cell).delta_parameters().items()}
    assert config.shapes(cell) == ({} if method == "bitfit" else made) and made


def net() -> nn.Cell:
    return nn.SequentialCell(OrderedDict((f"layer{number}", nn.Dense(6, 6)) for number in range(12)))


@pytest.mark.parametrize("method, field", [
    ("lora", "lora_rank"), ("adapter", "bottleneck_size"), ("low_rank_adapter", "low_rank_size"),
    ("low_rank_adapter", "reduction_factor"), ("prefixtuning", "prefix_token_num"), ("prefixtuning", "embed_dim"),
    ("prefixtuning", "mid_dim"), ("ptuning2", "pre_seq_len"), ("ptuning2", "projection_dim")])
@pytest.mark.parametrize("size", [7, 10 ** 8])
def test_settings_beyond_the_file_are_refused_before_anything_is_made(method, field, size, monkeypatch):
    adapted = mp.get_pet_model(net(), METHODS[method](target_modules=r"layer\d+", **DENSE[method]))
    mp.save_adapter(adapted, "adapter")
    path = Path("adapter", "adapter_config.json")
    config = json.loads(path.read_text())
    if method == "lora":
        config["r"] = size
    for layer in config.get("layers", {}).values():
        layer["settings"][field] = size
    path.write_text(json.dumps(config))
    plain = net()
    monkeypatch.setattr(METHODS[method], "adapt", lambda *_: pytest.fail("a layer was made"))
    with unchanged(plain), pytest.raises(ValueError, match="layer0") as caught:
        mp.load_adapter(plain, "adapter")
    lines = str(caught.value).split("\n")
    assert len(lines) == 12 and lines[-1].endswith(" more.") and len(str(caught.value)) < 4000
