"""Combine adapters file to file."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindpet_lite.formats.adapters import read_adapter, to_files, write_files
from mindpet_lite.formats.combine import combine
from mindpet_lite.formats.folder import refuse_filled
from mindpet_lite.formats.state import AdapterState


def combine_files(parts: Sequence[str], out: Path, how: str, rank: int | None, density: float | None, sign: str,
                  seed: int) -> AdapterState:
    """Write to `out` one LoRA adapter made of several, as PEFT has it, and return it.

    Args:
        parts: for each adapter, of any format, its path and its weight with ``=`` between them.
        out: a directory that is empty or not there yet.
        how: see `formats.combine.combine`, as the arguments that follow.
        rank: of the result.
        density: of what is pruned.
        sign: "total" or "frequency".
        seed: of random numbers.

    Raises:
        OSError: a file is missing or cannot be read, or `out` holds something.
        ValueError: a weight is no number; the adapters cannot be combined so.

    Examples:
        >>> from pathlib import Path
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> from mindpet_lite.offline.combine import combine_files
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> _ = mp.save_adapter(net, "adapter")
        >>> state = combine_files(["adapter=0.5", "adapter=0.5"], Path("both"), "linear", None, None, "total", 0)
        >>> list(state.layers)
        ['0']
    """
    refuse_filled(out)
    pairs = [_pair(text) for text in parts]
    states = {f"{path} ({number})": read_adapter(path).state for number, (path, _) in enumerate(pairs, 1)}
    weights = [weight for _, weight in pairs]
    state = combine(states, weights, how, rank, density, sign, seed)
    write_files(to_files(state, "peft", out))
    return state


def _pair(text: str) -> tuple[Path, float]:
    """Return a path and a weight from `path=weight`; a path may have a sign of equality itself."""
    path, _, weight = text.rpartition("=")
    try:
        return Path(path), float(weight if path else "")
    except ValueError as error:
        raise ValueError(f"an adapter and its weight are given as path=weight, such as style/=0.7, but got "
                         f"{text!r:.100}.") from error
