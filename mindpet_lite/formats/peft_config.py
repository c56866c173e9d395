"""PEFT's LoraConfig: which fields we honour, what they mean for a layer, and a config for an adapter of ours."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mindpet_lite.arguments import MAX_ALPHA, is_alpha, some_of
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.lora import PEFT_FIELDS
from mindpet_lite.formats.replication import range_problem
from mindpet_lite.formats.starts import takes_from_base
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.names.expressions import MOST, compile_checked, compile_end

# Starts that leave the base alone, so that they matter no more once the factors are in a file.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Fields that change what an adapter computes and that we cannot honour, with the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None), "use_bdlora": (None, False), "arrow_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,), "megatron_config": (None,),
}
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
# What a config must say anew where the adapter is not the one that it came with: which layers, and their settings.
RESTATED = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
            "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "rank_pattern",
            "alpha_pattern", "bias", "init_lora_weights", "use_rslora", "use_dora", "lora_bias")
# The order in which problems are told.
_NUMBERS = (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", (int, float)))


def problems_of(config: Mapping[str, Any]) -> list[str]:
    """Return, a sentence each, why an adapter with this config cannot be used."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type must be 'LORA', but the config says {config.get('peft_type')!r:.100}."]
    problems = [f"{name} = {config[name]!r:.100} is not supported."
                for name, unused in _UNUSED.items() if name in config and config[name] not in unused]
    problems += [f"{name} must be true or false, but the config says {config[name]!r:.100}."
                 for name in (*_FLAGS, "ensure_weight_tying")
                 if config.get(name) not in (True, False, None)]
    if config.get("bias", "none") not in ("none", "all", "lora_only", None):
        problems.append(f"bias must be 'none', 'all' or 'lora_only', but the config says {config['bias']!r:.100}.")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS and not takes_from_base(start):
        problems.append(f"init_lora_weights = {start!r:.100} is not supported. If it leaves the base's weights as they "
                        f"are, or yours are what it left of them, set the field to true.")
    if config.get("lora_bias") and config.get("use_dora"):
        problems.append("lora_bias and use_dora do not go together.")
    if takes_from_base(start) and config.get("use_dora"):
        problems.append(f"init_lora_weights = {start!r} with use_dora is not supported.")
    dropout = config.get("lora_dropout")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float, type(None))) or not 0 <= (dropout or 0) < 1:
        problems.append(f"lora_dropout must be a number from 0 to 1, but the config says {dropout!r:.100}.")
    problems += _list_problems(config)
    problems += _token_problems(config.get("trainable_token_indices"))
    for name, patterns, kind in _NUMBERS:
        by_pattern = config.get(patterns) or {}
        if not isinstance(by_pattern, dict):
            problems.append(f"{patterns} must be an object, but the config says {by_pattern!r:.100}.")
            by_pattern = {}
        if len(by_pattern) > MOST:
            problems.append(f"{patterns} has {len(by_pattern)} patterns; up to {MOST} are read.")
            by_pattern = {}
        for place, value in ((name, config.get(name)), *((f"{patterns}[{key!r}]", by_pattern[key])
                                                         for key in by_pattern)):
            if not is_alpha(value) or not isinstance(value, kind):
                problems.append(f"{place} must be a positive number below {MAX_ALPHA:g}, but the config says "
                                f"{value!r:.100}.")
        for key in by_pattern:
            try:
                compile_end(key)
            except ValueError as error:
                problems.append(f"{patterns}[{key!r}] {error}")
    return problems


def remarks(config: Mapping[str, Any], state: AdapterState) -> list[str]:
    """Return, a sentence each, what a user must know of an adapter with this config, whatever is done with it."""
    unknown = unknown_fields({name: value for name, value in config.items() if name != FIELD})
    found = [f"its config has {some_of(unknown)}, which no version of PEFT known here has: nothing is done with it, "
             f"and it is written again when the adapter is saved."] if unknown else []
    unhit = [f"{field} {pattern!r:.100}" for field, pattern in unhit_patterns(config, state.layers)]
    found += [f"its {some_of(unhit)} fits none of its layers."] if unhit else []
    beyond = [path for path, layer in state.layers.items() if config.get("target_modules")
              and not {"token_indices", "target_parameter"} & (layer.settings or {}).keys()
              and not targets(path, config)]
    return found + ([f"its target_modules and exclude_modules leave out {some_of(beyond)}, of which it holds weights: "
                     f"they are used here, and not by PEFT."] if beyond else [])


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Return the fields that say something and that PEFT's LoraConfig does not have."""
    return sorted(name for name, value in config.items()
                  if name not in PEFT_FIELDS and value not in (None, False, "", [], {}))


def unhit_patterns(config: Mapping[str, Any], paths: Collection[str]) -> list[tuple[str, str]]:
    """Return the fields and what they say of ranks, alphas and blocks that fits none of the layers at these paths."""
    found = [(field, pattern) for field in ("rank_pattern", "alpha_pattern") for pattern in config.get(field) or {}
             if not any(compile_end(pattern, path).match(path) for path in paths)]
    blocks = config.get("layers_to_transform")
    numbers = {int(part) for path in paths for part in path.split(".") if part.isdecimal()}
    return found + [("layers_to_transform", str(block)) for block in (blocks if isinstance(blocks, list) else [blocks])
                    if block is not None and block not in numbers]


def kept_problems(config: Mapping[str, Any], method: str) -> list[str]:
    """Return why the fields that an adapter of any format came with, and is written with again, cannot be PEFT's."""
    # Another method's config has no fields of LoRA's; it was read by the method's own declaration.
    is_others = method != "lora" and isinstance(config.get("peft_type"), str) and config["peft_type"] != "LORA"
    return problems_of(config) if "peft_type" in config and not is_others else _list_problems(config)


def _list_problems(config: Mapping[str, Any]) -> list[str]:
    problems = list(filter(None, [range_problem(config.get("layer_replication"))]))
    for name, kind in (("target_modules", str), ("modules_to_save", str), ("exclude_modules", str),
                       ("target_parameters", str), ("layers_to_transform", int)):
        value = config.get(name)
        items = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(item, kind) for item in items):
            problems.append(f"{name} must be a list of {'names' if kind is str else 'numbers'}, but the config says "
                            f"{value!r:.100}.")
    return problems


def _token_problems(tokens: Any) -> list[str]:
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens or []]
    good = all(isinstance(item, list) and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0
                                              for token in item) for item in lists)
    return [] if good else [f"trainable_token_indices must be a list of token numbers, or an object of such lists by "
                            f"module, but the config says {tokens!r:.100}."]


def tokens_of(path: str, config: Mapping[str, Any]) -> list[int]:
    """Return which tokens of the embedding at `path` train; none where the config does not say."""
    tokens = config.get("trainable_token_indices") or []
    if isinstance(tokens, dict):
        return next((item for name, item in tokens.items() if path == name or path.endswith("." + name)), [])
    return tokens


def settings_of(path: str, config: Mapping[str, Any], has_dropout: bool) -> dict[str, Any]:
    """Return the settings that the config gives the layer at `path`."""
    start = config.get("init_lora_weights")
    parameter = None if targets(path, config) else parameter_of(path, config)
    return {"lora_rank": by_pattern(config.get("rank_pattern"), path, config.get("r")),
            "lora_alpha": by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha")),
            **({"lora_dropout": config.get("lora_dropout") or 0.0} if has_dropout else {}),
            **{name: True for name in ("use_rslora", "use_dora", "lora_bias") if config.get(name)},
            # PEFT starts embeddings as always, whatever it says.
            **({"init_lora_weights": start} if takes_from_base(start) and has_dropout else {}),
            **({"target_parameter": parameter} if parameter else {})}


def parameter_of(path: str, config: Mapping[str, Any]) -> str | None:
    """Return the name of the Parameter of the cell at `path` that `target_parameters` names, or None."""
    entries = config.get("target_parameters") or []
    for owner, _, name in (entry.rpartition(".") for entry in ([entries] if isinstance(entries, str) else entries)):
        if not owner or path == owner or path.endswith("." + owner):
            return str(name)
    return None


def config_of(state: AdapterState, modules_to_save: list[str], bias: str) -> dict[str, Any]:
    """Return a config for the adapter; the most common rank and alpha go to `r` and `lora_alpha`.

    Raises:
        ValueError: layers differ in what PEFT has one field for.
    """
    settings = {path: layer.settings or {} for path, layer in state.layers.items()}
    low_rank = {path: item for path, item in settings.items() if "token_indices" not in item}
    # An embedding has no dropout.
    found = {name: [item[name] for item in low_rank.values() if name in item] or [default]
             for name, default in (("lora_rank", 8), ("lora_alpha", 8), ("lora_dropout", 0.0))}
    common = {name: Counter(values).most_common(1)[0][0] for name, values in found.items()}
    flags, starts = _fields_of_all(low_rank)
    mixed = mixed_fields(state)
    if mixed:
        raise ValueError(f"PEFT has one {' and one '.join(mixed)} for all layers, but here layers differ in it.")
    parameters = sorted(f"{path}.{item['target_parameter']}" for path, item in low_rank.items()
                        if "target_parameter" in item)
    tokens = {path: item["token_indices"] for path, item in settings.items() if "token_indices" in item}
    return {
        "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": None, "bias": bias,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": next(iter(starts), True),
        "r": common["lora_rank"], "lora_alpha": common["lora_alpha"], "lora_dropout": common["lora_dropout"],
        "target_modules": sorted(path for path, item in low_rank.items() if "target_parameter" not in item),
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": modules_to_save or None, "task_type": None,
        "revision": None, "trainable_token_indices": tokens or None,
        "rank_pattern": {pattern_for(path, low_rank): item["lora_rank"] for path, item in low_rank.items()
                         if item["lora_rank"] != common["lora_rank"]},
        "alpha_pattern": {pattern_for(path, low_rank): item["lora_alpha"] for path, item in low_rank.items()
                          if item["lora_alpha"] != common["lora_alpha"]},
        **{name: next(iter(values), False) for name, values in flags.items()},
    }


def mixed_fields(state: AdapterState) -> list[str]:
    """Return the fields that PEFT has once for all layers, and in which the layers of this adapter differ."""
    flags, starts = _fields_of_all({path: layer.settings for path, layer in state.layers.items()
                                    if layer.settings and "token_indices" not in layer.settings})
    return [name for name, values in {**flags, "init_lora_weights": starts}.items() if len(values) > 1]


def _fields_of_all(settings: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, set[bool]], set[Any]]:
    """Return which values the layers of LoRA have for PEFT's flags, and for the start."""
    return ({name: {bool(item.get(name)) for item in settings.values()}
             for name in ("use_rslora", "use_dora", "lora_bias")},
            {item.get("init_lora_weights", True) for item in settings.values() if "lora_dropout" in item})


def targets(path: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the config's `target_modules` name the layer at `path`, and `exclude_modules` do not."""
    wanted = config.get("target_modules")
    return (wanted == "all-linear" or _names(path, wanted)) and not _names(path, config.get("exclude_modules"))


def _names(path: str, wanted: str | Iterable[str] | None) -> bool:
    """Tell whether a regular expression is the whole path, or one of a list of names its end."""
    if isinstance(wanted, str):
        try:
            return compile_checked(wanted, path).fullmatch(path) is not None
        except ValueError:
            return False
    parts = path.split(".")
    return not {".".join(parts[start:]) for start in range(len(parts))}.isdisjoint(wanted or ())


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of `path`, as PEFT does, else `default`."""
    for pattern, value in (patterns or {}).items():
        if compile_end(pattern, path).fullmatch(path):
            return value
    return default


def pattern_for(path: str, others: Iterable[str]) -> str:
    """Return the pattern that means `path` and no other layer: PEFT matches it with the end of every path."""
    return path if all(other == path or by_pattern({path: True}, other, False) is False for other in others) \
        else f"^{re.escape(path)}$"


def tokens_are_of_table_alone(config: Mapping[str, Any]) -> bool:
    """Tell whether tokens of this config trained in an embedding alone, though its table is another layer's weight too.

    PEFT changes tied output layers of transformers' models with their embedding, but those of no other model.
    """
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else "transformers"
    return FIELD not in config and not str(library).startswith("transformers")
