"""An adapter merged into a base, file to file, without a net."""
from __future__ import annotations

import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mindpet_lite.arguments import warn_user
from mindpet_lite.formats.adapters import LORA, Methods, read_adapter
from mindpet_lite.formats.base_hash import differing
from mindpet_lite.formats.component import part
from mindpet_lite.formats.folder import new_directory, refuse_filled
from mindpet_lite.formats.placed import placed
from mindpet_lite.formats.problems import first_of
from mindpet_lite.formats.starts import on_residual_base
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.names.table import Table
from mindpet_lite.offline.base import Base, open_base
from mindpet_lite.offline.changes import Change
from mindpet_lite.offline.float8 import Requantised
from mindpet_lite.offline.grown import placed_heads
from mindpet_lite.offline.plan import plan
from mindpet_lite.offline.progress import Progress
from mindpet_lite.offline.rewrite import rewrite
from mindpet_lite.offline.ties import settle_ties

_RESIDUAL_CURE = ("Give the residual base, the weights that were trained on; if this is it, set init_lora_weights to "
                  "true in the adapter's config.")


@dataclasses.dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        out: the directory.
        changed: names of the tensors that changed.
        tensors: how many the base has.
        size: bytes of the files of tensors.
        left_behind: files of the base that hold the model in another form, or an adapter, which were not copied.
    """

    out: Path
    changed: tuple[str, ...]
    tensors: int
    size: int
    left_behind: tuple[Path, ...]


def merge(base: Path, adapter: Path, out: Path, kind: str | None = None, table: Table | None = None,
          strict_base: bool = False, quiet: bool = False, component: str | None = None,
          methods: Methods = LORA) -> Merged:
    """Write to `out` the base with the adapter's update in its weights.

    Each weight W becomes W + s · B A (with DoRA scaled), added in float32 and rounded once to the type that the base
    has it in; an adapter of another method changes it by the method's own arithmetic. The files, their order and their
    metadata stay as they are, and so does every other byte. `out` appears when all of it is written and was read back;
    until then, and after any error, there is nothing.

    Args:
        base: a file (safetensors or MindSpore's ``.ckpt``), or a directory with one or more and what belongs to them.
        adapter: of any format.
        out: a directory that is empty or not there yet.
        kind: the adapter's format; None to detect it. Default: None.
        table: names of layers, see `names.placing.map_names`. Default: None.
        strict_base: refuse an adapter that was trained on another base, instead of a warning. Default: False.
        quiet: show no progress. Default: False.
        component: of a diffusion pipeline: its part of the adapter, for a base that is that component or has it.
            Default: None.
        methods: by name, those that the adapter may be of. Default: LoRA alone.

    Raises:
        OSError: a file is missing or cannot be read; `out` holds something, or the disk has too little space.
        ValueError: the adapter does not fit the base, cannot be merged, or a file is damaged.

    Examples:
        >>> from pathlib import Path
        >>> import mindpet_lite as mp
        >>> import mindspore as ms
        >>> from mindspore import nn
        >>> from mindpet_lite.offline.merge import merge
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> _ = ms.save_checkpoint(net, "base.ckpt")
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> _ = mp.save_adapter(net, "adapter")
        >>> done = merge(Path("base.ckpt"), Path("adapter"), Path("merged"), quiet=True)
        >>> done.changed, done.tensors
        (('0.weight',), 4)
    """
    refuse_filled(out)
    with open_base(base) as tensors:
        found = read_adapter(adapter, kind, methods, tensors.owners)
        try:
            if found.state.config.get("layer_replication"):
                raise ValueError("by its layer_replication layers of the base stand several times, each with another "
                                 "update, which one base cannot hold: use it unmerged.")
            state = settle_ties(placed_heads(part(found.state, component), tensors), tensors, table)
            state = placed(state, tensors.owners, table, component)
            state, unsettled = on_residual_base(state, _hashes(state, tensors), False, _RESIDUAL_CURE)
            if unsettled:
                raise ValueError(unsettled[0])
            changes = plan(state, tensors, methods)
            for text in found.remarks:
                warn_user(f"{adapter}: {text}")
            _compare(state, tensors, strict_base)
            _tell_of_float8(changes)
        except ValueError as error:
            raise ValueError(f"The adapter in {adapter} cannot be merged into {base}:\n  {first_of(error)}") from error
        size = _check_space(tensors, out)
        with new_directory(out) as folder, Progress("merge", size, quiet) as progress:
            _write(tensors, changes, folder, progress)
    return Merged(out, tuple(sorted(changes)), len(tensors.names()), size, tensors.layout.copies)


def _compare(state: AdapterState, base: Base, strict: bool) -> None:
    """Warn of an adapter that was trained on another base, or refuse it."""
    other = differing(state.config, _hashes(state, base))
    if other:
        text = (f"it was trained on another base: the weights of {', '.join(other[:3])}"
                f"{f' and {len(other) - 3} more layers' if len(other) > 3 else ''} are not those it belongs to.")
        if strict:
            raise ValueError(text)
        warnings.warn(f"Merging the adapter all the same, though {text}", stacklevel=3)


def _hashes(state: AdapterState, base: Base) -> dict[str, Callable[[], str]]:
    """Return what gives the hash of each of an adapter's layers."""
    return {path: functools.partial(base.layer_hash, path) for path in state.layers}


def _tell_of_float8(changes: Mapping[str, Change]) -> None:
    """Warn of what rounding to float8 again costs."""
    found = {name: change for name, change in changes.items() if isinstance(change, Requantised)}
    if found:
        worst = max(found, key=lambda name: found[name].of_update)
        warn_user(f"{len(found)} of the weights to merge are float8, and what they become is rounded to it again. That "
                  f"costs most for {worst}: {found[worst].of_weight:.2g} of the weight's norm, "
                  f"{found[worst].of_update:.2g} of the update's. A base in bfloat16 keeps more.")


def _write(base: Base, changes: Mapping[str, Change], folder: Path, progress: Progress) -> None:
    root = base.layout.root
    for path in base.layout.others:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, folder / path)
    for path, file in base.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        own = {name: changes[full] for name, full in base.in_file(path).items() if full in changes}
        rewrite(file, folder / path, own, progress.advance)


def _check_space(base: Base, out: Path) -> int:
    """Return the bytes of the base's tensors, having refused a disk with too little space."""
    def size_of(paths: Iterable[Path]) -> int:
        return sum((base.layout.root / path).stat().st_size for path in paths)

    there = next(parent for parent in out.absolute().parents if parent.exists())
    size = size_of(base.files)
    needed, free = size + size_of(base.layout.others), shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f"{out} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free: free some, or "
                      f"give another place.")
    return size
