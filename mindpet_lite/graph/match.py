"""Which layers a config means, and which parameters a pattern means."""
from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from mindspore import nn

from mindpet_lite.arguments import did_you_mean, some_of, warn_user
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.graph.linear import linear_layers
from mindpet_lite.graph.parents import refusal_at
from mindpet_lite.graph.tree import without_inner
from mindpet_lite.names.expressions import by_own_name, compile_checked

ALL_LINEAR = "all-linear"


def wildcard(pattern: str) -> re.Pattern[str]:
    """Compile a pattern in which `*` stands for any text and every other character for itself."""
    # fnmatch's expression never tries another place for what stands between two stars; ? and [ mean themselves here.
    return re.compile(fnmatch.translate(re.sub(r"[?[]", r"[\g<0>]", pattern)))


def targets(cells: Mapping[str, nn.Cell], config: DeltaConfig) -> tuple[dict[str, nn.Cell], list[str]]:
    """Return the layers to adapt by path, and every problem found (paths of one layer all stand for it).

    Args:
        cells: all cells of the net by path.
        config: its `target_modules` and `exclude_modules` say which; its class says which can be adapted.
    """
    problems: list[str] = []
    cells = without_inner(cells)
    wanted = config.target_modules
    if not wanted and config.has_other_targets:
        return {}, []
    try:
        default = config.default_paths(cells) if wanted is None else []
    except ValueError as error:
        return {}, [str(error)]
    excluded = {id(cells[path]) for path in _hits("exclude_modules", config.exclude_modules, cells, config, problems)}
    # What trains whole is not adapted besides.
    excluded |= {id(cell) for path, cell in cells.items() for entry in config.modules_to_save or ()
                 if f".{entry}." in f".{path}."}
    hits = default or _hits("target_modules", wanted, cells, config, problems)
    chosen: dict[str, nn.Cell] = {}
    seen: set[int] = set()
    for path in hits:
        cell = cells[path]
        if id(cell) in excluded or id(cell) in seen:
            continue
        seen.add(id(cell))
        reason = refusal_at(config, path, cells)
        if reason is None:
            chosen[path] = cell
        elif _owns_parameters(cell):
            problems.append(f"{path or 'the net itself'}: {reason}")
    if chosen:
        problems += [*_unhit_blocks(config, chosen), *config.unhit(chosen)]
    elif not problems:
        problems.append(f"target_modules {wanted!r} leaves no layer to adapt: " + (
            "the net has none." if not hits else
            "all of its hits are excluded, or in modules_to_save."
            if all(id(cells[path]) in excluded for path in hits) else
            f"it hits only {', '.join(sorted({type(cells[path]).__name__ for path in hits}))} "
            f"without parameters of their own."))
    return chosen, problems


def named_by(field: str, pattern: str | Sequence[str], cells: Mapping[str, nn.Cell], example: str,
             problems: list[str]) -> list[str]:
    """Return the paths that an expression matches whole, or that names equal or end, in the net's order.

    Args:
        field: the argument that `pattern` is, for messages.
        pattern: a regular expression or a list of names.
        cells: by path.
        example: a path that could be meant.
        problems: what hits nothing is added, a sentence each.

    Raises:
        TypeError, ValueError: `pattern` is of another kind, or empty.
    """
    names = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{field} must be a regular expression or a list of names such as ['blocks.0', 'blocks.1'], "
                        f"but got {pattern!r:.100}.")
    if not names or not all(names):
        raise ValueError(f"{field} must name something, but got {pattern!r:.100}.")
    if isinstance(pattern, str):
        return by_expression(field, pattern, cells, repr(example), problems)
    found = {path for name in names for path in by_name(field, name, cells, repr(example), problems)}
    return [path for path in cells if path in found]


def _hits(field: str, wanted: str | Sequence[str] | None, cells: Mapping[str, nn.Cell], config: DeltaConfig,
          problems: list[str]) -> list[str]:
    """Return the paths that `wanted` names, in the net's order; every entry must name something."""
    if wanted is None:
        return []
    if wanted == ALL_LINEAR:
        # Below an adapted layer there is nothing to adapt.
        found = linear_layers(cells, config)
        if not found:
            is_adapted = any(isinstance(cell, Delta) and isinstance(cell, nn.Dense) for cell in cells.values())
            problems.append(f"{field} 'all-linear' hits nothing: the net has no linear layer"
                            f"{' that is not adapted yet' if is_adapted else ' but its output head, if it has one'}.")
        return found
    if isinstance(wanted, str):
        return _expressed(field, wanted, cells, config, problems)
    chosen: list[str] = []
    for entry in wanted:
        # MindFormers' exclude_layers is a list of expressions.
        expressed = by_own_name(entry, cells) if field == "exclude_modules" and not _named(entry, cells) else []
        found = expressed or by_name(field, entry, cells, _example(cells, config), problems)
        if field == "target_modules" and found:
            found = [path for path in found if path == entry or _is_chosen_block(path, config)]
            if not found:
                problems.append(f"{field} entry {entry!r:.100} hits no layer in blocks "
                                f"{', '.join(map(str, config.layers_to_transform or ()))}.")
                continue
        adapted = [path for path in found if config.refusal(cells[path]) is None or _owns_parameters(cells[path])]
        if field == "target_modules" and found and not adapted:
            inner = [path for path, cell in cells.items()
                     if path.startswith(found[0] + ".") and config.refusal(cell) is None]
            problems.append(f"{field} entry {entry!r:.100} hits {type(cells[found[0]]).__name__} at {found[0]}, which "
                            f"is no layer to adapt{'; below it are ' + ', '.join(inner[:4]) if inner else ''}.")
        chosen.extend(found if field == "target_modules" else _with_inner(found, cells))
    order = {path: index for index, path in enumerate(cells)}
    return sorted(set(chosen), key=order.__getitem__)


def _expressed(field: str, wanted: str, cells: Mapping[str, nn.Cell], config: DeltaConfig, problems: list[str]
               ) -> list[str]:
    """Return the paths that an expression matches whole; if there are none, those that it means in MindFormers."""
    missed: list[str] = []
    found = by_expression(field, wanted, cells, _example(cells, config), missed)
    named = [path for path in by_own_name(wanted, cells)
             if field == "exclude_modules" or _matches_own_name(wanted, path) or config.refusal(cells[path]) is None]
    if found:
        left = [path for path in named if path not in set(found) and _matches_own_name(wanted, path)
                and config.refusal(cells[path]) is None]
        if left:
            warn_user(f"{field} {wanted!r} matches whole paths, so it leaves out {some_of(left)}, of which it matches "
                      f"the last part alone: put '.*' before that alternative if they are meant too.")
        return found
    more = sorted({path.rpartition(".")[2] for path in named if not _matches_own_name(wanted, path)})
    if more:
        warn_user(f"{field} {wanted!r} matches no whole path, so it is taken as MindFormers takes it, from the start "
                  f"of a layer's own name: it also hits {some_of(more)}. End it with '$' to leave them out.")
    if not named:
        problems += missed
    return named if field == "target_modules" else _with_inner(named, cells)


def _matches_own_name(pattern: str, path: str) -> bool:
    return re.fullmatch(pattern, path.rpartition(".")[2]) is not None


def _with_inner(found: Sequence[str], cells: Iterable[str]) -> list[str]:
    """Return the paths in `found` and those of all cells below them."""
    tops = set(found)
    return [path for path in cells if tops.intersection(itertools.accumulate(path.split("."), "{}.{}".format))]


def by_expression(field: str, wanted: str, cells: Iterable[str], example: str, problems: list[str]) -> list[str]:
    """Return the paths that a regular expression matches whole; add to `problems` if it matches none."""
    try:
        expression = compile_checked(wanted)
    except ValueError as error:
        problems.append(f"{field} {wanted!r:.100} {error}")
        return []
    found = [path for path in cells if expression.fullmatch(path)]
    if not found:
        problems.append(f"{field} {wanted!r} hits nothing; it must match a layer's whole path, such as "
                        f"{example}.{did_you_mean(wanted.strip('.*^$'), _spellings(cells))}")
    return found


def by_name(field: str, entry: str, cells: Iterable[str], example: str, problems: list[str]) -> list[str]:
    """Return the paths that equal `entry` or end with it; add to `problems` if there are none."""
    found = _named(entry, cells)
    if not found:
        problems.append(f"{field} entry {entry!r:.100} hits nothing; it must equal a layer's path or its last parts, "
                        f"such as {example}.{did_you_mean(entry, _spellings(cells))}")
    return found


def _named(entry: str, cells: Iterable[str]) -> list[str]:
    return [path for path in cells if path == entry or path.endswith("." + entry)]


def _is_chosen_block(path: str, config: DeltaConfig) -> bool:
    """Tell whether the block number in `path` is one of `layers_to_transform`, where that is given."""
    return config.layers_to_transform is None or _block(path, config.layers_pattern) in config.layers_to_transform


def _block(path: str, lists: Sequence[str] | None) -> int | None:
    """Return the number of the block that a layer is in, None where it is in none.

    Args:
        path: of the layer.
        lists: names of the lists of blocks; the first number after one counts. Without them the first number after a
            name, as for PEFT; which sees no name in a path that begins with one.
    """
    patterns = [rf"(?:^|.*?\.)(?:{name})\.(\d+)\." for name in lists or ()]
    for pattern in patterns or (r".*?\.[^.]*\.(\d+)\.", r"[^.]*\.(\d+)\."):
        found = re.match(pattern, path)
        if found:
            return int(found[1])
    return None


def _unhit_blocks(config: DeltaConfig, chosen: Iterable[str]) -> list[str]:
    """Return a sentence for each block or list of blocks that a config names and no chosen layer is in."""
    if config.layers_to_transform is None:
        return []
    chosen = list(chosen)
    there = {_block(path, config.layers_pattern) for path in chosen}
    problems = [f"layers_to_transform has {number}, but no layer of target_modules is in such a block."
                for number in config.layers_to_transform if number not in there]
    return problems + [f"layers_pattern {name!r:.100} hits no list of blocks that holds a layer of target_modules."
                       for name in config.layers_pattern or () if all(_block(path, [name]) is None for path in chosen)]


def _owns_parameters(cell: nn.Cell) -> bool:
    return isinstance(cell, Delta) or any(True for _ in cell.parameters_and_names(expand=False))


def _spellings(cells: Iterable[str]) -> list[str]:
    """Return each path and its last part: what an entry may have been meant to be."""
    return [name for path in cells if path for name in (path.rsplit(".", 1)[-1], path)]


def _example(cells: Mapping[str, nn.Cell], config: DeltaConfig) -> str:
    for path, cell in cells.items():
        if path and config.refusal(cell) is None:
            return repr(path)
    return "'layers.0.attention.wq' (this net has no layer that can be adapted)"


def selector(field: str, patterns: Sequence[str] | None, names: Sequence[Sequence[str]]) -> Callable[[int], bool]:
    """Return a test whether parameter number i is named by `patterns`, after checking that every pattern hits.

    Args:
        field: the argument's name, for messages.
        patterns: wildcards over any name of a parameter; None names nothing.
        names: for every parameter all names it goes by.

    Raises:
        TypeError: `patterns` is no list of strings.
        ValueError: a pattern hits nothing.
    """
    hit: set[int] = set()
    for pattern in check_patterns(field, patterns):
        expression = wildcard(pattern)
        found = {index for index, spellings in enumerate(names)
                 if any(expression.fullmatch(name) for name in spellings)}
        if not found:
            known = [part for spellings in names for name in spellings for part in (name, name.rsplit(".", 1)[-1])]
            raise ValueError(f"{field} pattern {pattern!r:.100} matches no parameter of the net; a pattern must match "
                             f"a parameter's whole path ('*' stands for any text), such as "
                             f"{names[0][0] if names else '(the net has no parameter)'!r:.100}."
                             f"{did_you_mean(pattern.strip('*'), known)}")
        hit |= found
    return hit.__contains__


def check_patterns(field: str, patterns: Sequence[str] | None) -> Sequence[str]:
    """Return `patterns` as a sequence of strings ([] for None); raise TypeError for anything else."""
    if patterns is None:
        return []
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(item, str) and item for item in patterns):
        raise TypeError(f"{field} must be a list of strings such as ['*embedding*'], but got {patterns!r:.100}.")
    return patterns
