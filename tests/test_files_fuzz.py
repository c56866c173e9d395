"""Hundreds of damaged files: each is read as its format's own library reads it, or refused in words."""
from __future__ import annotations

import pytest
from fuzz import KINDS, fuzz

CASES = {"safetensors": 170, "ckpt": 140, "adapter_config": 140, "load_adapter": 70}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_in_words(kind):
    counts = fuzz(*KINDS[kind], cases=CASES[kind], number=1)
    assert sum(counts.values()) >= CASES[kind] and counts["refused"] > CASES[kind] / 2 and counts["read"] > 2
