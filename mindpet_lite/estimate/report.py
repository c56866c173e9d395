"""The memory of training a model, from its config: LoRA and full fine-tuning, with and without recomputation."""
from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mindpet_lite.arguments import some_of
from mindpet_lite.estimate.cpu_operators import CpuOperators
from mindpet_lite.estimate.layers import Lora
from mindpet_lite.estimate.llama import Llama
from mindpet_lite.estimate.mindformers import model_config
from mindpet_lite.estimate.plan import ITEMS, OPTIMIZERS, Plan, plan
from mindpet_lite.estimate.unet import UNet
from mindpet_lite.formats.quantised import KINDS
from mindpet_lite.names.expressions import by_own_name, compile_checked
from mindpet_lite.names.parameter_names import is_head
from mindpet_lite.pet_block import pet_block

# Columns by their names: with LoRA or not, recomputed or not.
COLUMNS = {"LoRA": (True, False), "LoRA, recompute": (True, True), "full": (False, False),
           "full, recompute": (False, True)}


@dataclasses.dataclass(frozen=True)
class Report:
    """The plans of a model, by the names in `COLUMNS`.

    Args:
        kind: of model.
        parameters: of the model without LoRA.
        lora_parameters: of LoRA.
        lora_layers: the paths of the layers that it adapts.
        lora_rank: its rank.
        dtype: of weights that are frozen, and of activations.
        quantize: how LoRA's base holds the weights of linear layers; None: in `dtype`.
        plans: of a training step.

    Examples:
        >>> from mindpet_lite.estimate import estimate
        >>> config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        ...           "vocab_size": 100}
        >>> report = estimate(config, batch=2, seq=16, lora_rank=4)
        >>> report.kind, report.lora_rank, len(report.lora_layers)
        ('Llama', 4, 8)
        >>> list(report.plans)
        ['LoRA', 'LoRA, recompute', 'full', 'full, recompute']
    """

    kind: str
    parameters: int
    lora_parameters: int
    lora_layers: tuple[str, ...]
    lora_rank: int
    dtype: str
    quantize: str | None
    plans: dict[str, Plan]


def estimate(config: Mapping[str, Any], batch: int, seq: int | None = None, lora_rank: int | None = None,
             target_modules: str | Sequence[str] | None = None, lora_dropout: float | None = None,
             dtype: str = "float32", optimizer: str = "adamw", quantize: str | None = None) -> Report:
    """Plan the memory of a training step in graph mode.

    Args:
        config: a Llama's `config.json`, the YAML of a U-Net of `examples/wukong`, or MindFormers' YAML of a Llama,
            with its names of layers and the settings of its `pet_config`.
        batch: samples of a step; positive.
        seq: tokens of a sample, of a U-Net the words of its text; positive. Default: None, what the config says.
        lora_rank: rank of LoRA; positive. Default: None, the config's, or that of `LoraConfig`.
        target_modules: layers with LoRA, as in `LoraConfig`. Default: None, the config's, or the four of each
            attention.
        lora_dropout: as in `LoraConfig`, in [0, 1). Default: None, the `pet_config`'s, or 0.
        dtype: of weights and activations, "float32", "float16" or "bfloat16"; what trains is float32. Default:
            "float32".
        optimizer: "adamw", "adam", "momentum" or "sgd". Default: "adamw".
        quantize: how LoRA's base holds the weights of its linear layers but the head, a kind of `quantize_base`.
            Full fine-tuning has no such base: its plans are of the weights as they are. Default: None.

    Raises:
        ValueError: the config is of no model that is known, or lacks a size; a target names no linear layer; a number
            is not positive, or a name is unknown.

    Examples:
        >>> from mindpet_lite.estimate import estimate
        >>> config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        ...           "vocab_size": 100}
        >>> report = estimate(config, batch=2, seq=16)
        >>> report.parameters, report.lora_parameters
        (95040, 8192)
        >>> report.plans["LoRA"].device < report.plans["full"].device
        True
    """
    net = net_of(config)
    block = pet_block(config)
    settings = config if block is None else block
    if block is not None and str(block.get("pet_type")).lower() != "lora":
        raise ValueError(f"pet_type is {block.get('pet_type')!r}: the plan knows LoRA alone.")
    lora_rank = settings.get("lora_rank", settings.get("r", 8)) if lora_rank is None else lora_rank
    lora_dropout = (0.0 if block is None else block.get("lora_dropout", 0.0)) if lora_dropout is None else lora_dropout
    targets = settings.get("target_modules") or net.targets if target_modules is None else target_modules
    left_out = None if block is None else block.get("exclude_layers") or block.get("exclude_modules")
    for name, value in (("batch", batch), ("seq", 1 if seq is None else seq), ("lora_rank", lora_rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{name} must be a positive int, but got {value!r}.")
    if isinstance(lora_dropout, bool) or not isinstance(lora_dropout, (int, float)) or not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), but got {lora_dropout}.")
    for name, value, known in (("dtype", dtype, ITEMS), ("optimizer", optimizer, OPTIMIZERS),
                               *([] if quantize is None else [("quantize", quantize, KINDS)])):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, but got {value!r}.")
    plain = CpuOperators(1, lambda path: False, {})
    net.forward(plain, batch, seq, False)
    excluded = set(below(left_out, plain.linear)) if left_out else set()
    layers = tuple(path for path in chosen(targets, plain.linear) if path not in excluded)
    if not layers:
        raise ValueError("exclude_layers leaves no layer for LoRA.")
    lora = dict.fromkeys(layers, Lora(lora_rank, lora_dropout))
    plans = {name: plan(lambda tape, again=again: net.forward(tape, batch, seq, again),  # type: ignore[misc]
                        lora if adapts else None, dtype, optimizer, quantize or "")
             for name, (adapts, again) in COLUMNS.items()}
    return Report(net.kind, plain.bytes_of(False), plans["LoRA"].deltas // 4, layers, lora_rank, dtype, quantize,
                  plans)


def net_of(config: Mapping[str, Any]) -> Llama | UNet:
    """Return the model of a config.

    Raises:
        ValueError: it is of none that is known, or lacks a size.
    """
    for place in (config, config.get("model")):
        if isinstance(place, Mapping) and isinstance(place.get("unet"), Mapping):
            return UNet.of(place)
    inner = model_config(config)
    if inner is not None:
        return Llama.of_mindformers(inner)
    if "hidden_size" in config or "model_type" in config:
        return Llama.of(config)
    raise ValueError(f"this is neither the config.json of a Llama nor a YAML with a block 'unet': its keys are "
                     f"{', '.join(map(str, config)) or '(none)'}.")


def chosen(targets: str | Sequence[str], layers: Sequence[str]) -> list[str]:
    """Return the layers that `target_modules` means: names (paths or their last parts), "all-linear", or an expression.

    Raises:
        ValueError: a name or the expression hits none.
    """
    if isinstance(targets, str):
        if targets == "all-linear":
            return [path for path in layers if not is_head(path)]
        found = _matched("target_modules", targets, layers) or by_own_name(targets, layers)
        missing = [] if found else [targets]
    else:
        found = [path for path in layers if any(f".{path}".endswith(f".{name}") for name in targets)]
        missing = [name for name in targets if not any(f".{path}".endswith(f".{name}") for path in layers)]
    if missing or not found:
        ends = dict.fromkeys(re.sub(r".*\.\d+\.(?=.*[a-z])", "", path) for path in layers)
        raise ValueError(f"target_modules {some_of(map(repr, missing)) if missing else 'is empty and'} hits no linear "
                         f"layer; the model's are {', '.join(ends)}.")
    return found


def below(excluded: str | Sequence[str], layers: Sequence[str]) -> list[str]:
    """Return the layers that `exclude_layers` means, and all below a module that it names.

    Raises:
        ValueError: it, or an entry of it, hits nothing.
    """
    parts = {path: list(itertools.accumulate(path.split("."), "{}.{}".format)) for path in layers}
    modules = list(dict.fromkeys(module for above in parts.values() for module in above))
    hits: set[str] = set()
    for entry in [excluded] if isinstance(excluded, str) else excluded:
        named = _matched("exclude_layers", entry, modules) if isinstance(excluded, str) else \
            [path for path in modules if f".{path}".endswith(f".{entry}")]
        named = named or by_own_name(entry, modules)
        if not named:
            raise ValueError(f"exclude_layers {entry!r:.100} hits nothing.")
        hits.update(named)
    return [path for path, above in parts.items() if hits.intersection(above)]


def _matched(field: str, expression: str, paths: Sequence[str]) -> list[str]:
    """Return the paths that a regular expression matches whole."""
    try:
        compiled = compile_checked(expression)
    except ValueError as error:
        raise ValueError(f"{field} {expression!r:.100} {error}") from error
    return [path for path in paths if compiled.fullmatch(path)]


def as_dict(report: Report) -> dict[str, Any]:
    """Return a report as plain data; all plans in bytes.

    Args:
        report: what `estimate` returned.

    Examples:
        >>> from mindpet_lite.estimate import as_dict, estimate
        >>> config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        ...           "vocab_size": 100}
        >>> plain = as_dict(estimate(config, batch=2, seq=16))
        >>> plain["plans"]["LoRA"]["weights"]           # bytes
        380160
    """
    plans = {name: {**dataclasses.asdict(plan), "device": plan.device, "process": plan.process}
             for name, plan in report.plans.items()}
    return {**dataclasses.asdict(report), "plans": plans}


ROWS = (("model's weights", "weights"), ("LoRA's weights", "deltas"), ("gradients", "gradients"),
        ("optimizer", "optimizer"), ("activations", "activations"), ("on the device", "device"),
        ("CPU: kernels' tables", "tables"), ("CPU: compiled graph", "compiler"), ("a process on CPU", "process"))


def table(report: Report) -> str:
    """Return a report as text for people.

    Args:
        report: what `estimate` returned.

    Examples:
        >>> from mindpet_lite.estimate import estimate, table
        >>> config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        ...           "vocab_size": 100}
        >>> print(table(estimate(config, batch=2, seq=16)).splitlines()[0])
        Llama of 95,040 parameters; LoRA of rank 8 on 8 layers, 8,192 parameters
    """
    most = max(plan.process for plan in report.plans.values())
    unit, size, digits = ("GB", 1e9, 2) if most >= 1e10 else ("MB", 1e6, 0)
    lines = [f"{report.kind} of {report.parameters:,} parameters; LoRA of rank {report.lora_rank} on "
             f"{len(report.lora_layers)} layers, {report.lora_parameters:,} parameters", ""]
    rows = [(unit, *report.plans)] + [
        (label, *(f"{getattr(plan, name) / size:,.{digits}f}" for plan in report.plans.values()))
        for label, name in ROWS]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(cell.rjust(width) if place else cell.ljust(width)
                        for place, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes(report)]) + "\n"


def _notes(report: Report) -> list[str]:
    """Return sentences that make the columns comparable, line by line."""
    kept = report.dtype if report.quantize is None else (
        f"linear layers but the head in {report.quantize}, the rest in {report.dtype},")
    return [f"model's weights: {kept} where they are frozen (LoRA), float32 where they train (full).",
            "gradients, optimizer: float32, of what trains: LoRA's weights, or all of the model's.",
            "activations: what the step holds beside all gradients when both together are most. With LoRA that is "
            "where the backward pass begins; in full it may be where it ends, when the gradients are there and most "
            "activations are not.",
            "on the device: the sum of the rows above."]
