"""How PEFT's files hold the adapters of a method: a declaration for each, and one reader and writer for all."""
from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.peft import homes_of_trained, is_carried, path_of_trained
from mindpet_lite.formats.peft_config import by_pattern, pattern_for
from mindpet_lite.formats.peft_keys import PREFIX, plain_keys
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.names.parameter_names import pytorch_name

# What every config of PEFT has, with what it says where nothing is known.
_COMMON: dict[str, Any] = {"auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True,
                           "revision": None, "task_type": None}
_COPY = ".modules_to_save."
_BASE = ".base_layer."


@dataclasses.dataclass(frozen=True)
class PeftMethod:
    """What PEFT's files hold of one method.

    Args:
        peft_type: PEFT's name of the method.
        keys: PEFT's name of each tensor of a layer, by ours.
        fields: the fields of PEFT's config that say how a layer computes, with PEFT's defaults; our config has fields
            of the same names.
        shared: PEFT's key of each tensor that all layers share, by our name.
        patterns: by the name of a field the one that holds its value by pattern of path.
        neutral: fields that cannot be honoured, with the values that mean "not used".
        written: other fields of PEFT's config, as they are written of an adapter that is new.
        home: for a method whose files do not say which layer they hold, their keys being at the top: the name that the
            layer goes by until the net tells its path. Empty where keys have paths.
        needs: what a net must have before such a file fits, where no layer of it can be adapted for that.
        remark: what a user must know of every file of the method.
        bias: what the field `bias` says where the biases of the adapted layers train; empty where PEFT has no such
            field, so that no bias trains beside.
        may_be_empty: a layer's tensors may hold no value.
    """

    peft_type: str
    keys: Mapping[str, str]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    home: str = ""
    needs: str = ""
    remark: str = ""
    bias: str = ""
    may_be_empty: bool = False

    def key_of(self, path: str, name: str) -> str:
        """Return PEFT's key of a layer's tensor of our name."""
        return self.keys[name] if self.home else f"{PREFIX}{path}.{self.keys[name]}"

    def place_of(self, key: str) -> tuple[str, str] | None:
        """Return the path of the layer that has a key of PEFT's, and our name of the tensor; None for another key."""
        for name, end in sorted(self.keys.items(), key=lambda item: -len(item[1])):
            if self.home and key == end:
                return self.home, name
            if not self.home and key.startswith(PREFIX) and key.endswith(f".{end}"):
                return key[len(PREFIX):-len(end) - 1], name
        return None

    def in_file(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return what PEFT's file has of a layer with these tensors, by our names."""
        return tensors

    def holds(self, state: AdapterState) -> bool:
        """Tell whether PEFT's files can hold the layers of an adapter; where they name no layer there is one."""
        return not self.home or len(state.layers) == 1

    def tensors_of(self, layers: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return PEFT's tensors by key for the layers' tensors by path and our name."""
        return {self.key_of(path, name): value for path, tensors in layers.items()
                for name, value in self.in_file(tensors).items()}

    def layers_of(self, layers: Mapping[str, Mapping[str, np.ndarray]], config: Mapping[str, Any]
                  ) -> Mapping[str, Mapping[str, np.ndarray]]:
        """Return the layers that PEFT's tensors, by path and our name, are of."""
        return layers

    def for_file(self, state: AdapterState) -> AdapterState:
        """Return the adapter with the tensors that its file holds."""
        return state

    def from_file(self, state: AdapterState) -> AdapterState:
        """Return the adapter that a file's tensors and settings describe.

        Raises:
            ValueError: they do not belong together.
        """
        return state

    def drawn(self, state: AdapterState, shapes: Iterable[tuple[int, ...]]) -> Mapping[str, np.ndarray]:
        """Return the tensors that layers with weights of these shapes (outputs, inputs) share.

        Args:
            state: an adapter as a file holds it; where that keeps a seed alone, its numbers are drawn.
            shapes: of the weights of all its layers.
        """
        return state.shared

    def layer_settings(self, path: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a config of PEFT's gives the layer at `path`."""
        found = {name: config.get(name, default) for name, default in self.fields.items()}
        return {name: by_pattern(config.get(self.patterns.get(name, "")), path, value)
                for name, value in found.items()}

    def settings_held(self, settings: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the settings of a layer as its tensors (by our names) show them, where a config can be wrong."""
        return settings

    def config_fields(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return PEFT's fields for layers of these settings, by path: the most common value, others by pattern.

        Raises:
            ValueError: layers differ in what PEFT has one field for.
        """
        found: dict[str, Any] = dict(self.written)
        for name, default in self.fields.items():
            values = {path: item.get(name, default) for path, item in settings.items()}
            common = Counter(map(repr, values.values())).most_common(1)[0][0] if values else repr(default)
            found[name] = next((value for value in values.values() if repr(value) == common), default)
            others = {path: value for path, value in values.items() if repr(value) != common}
            if others and name not in self.patterns:
                raise ValueError(f"PEFT has one {name} for all layers, but here it is {found[name]!r} and, for "
                                 f"{next(iter(others))}, {next(iter(others.values()))!r}.")
            if name in self.patterns:
                found[self.patterns[name]] = {pattern_for(path, values): value for path, value in others.items()}
        return found

    def problems_of(self, config: Mapping[str, Any]) -> list[str]:
        """Return, a sentence each, why an adapter with this config cannot be used."""
        return [f"{name} = {config[name]!r:.100} is not supported." for name, unused in self.neutral.items()
                if name in config and config[name] not in unused]


def can_hold(state: AdapterState, method: PeftMethod) -> bool:
    """Tell whether PEFT's files can hold an adapter.

    Biases train only where PEFT's do, layers differ only in what has patterns, and the method's files can hold them all
    (`holds`).
    """
    if not method.holds(state):
        return False
    try:
        method.config_fields({path: layer.settings or {} for path, layer in state.layers.items()})
    except ValueError:
        return False
    return bool(method.bias) or not homes_of_trained(state)[1]


def encode(state: AdapterState, method: PeftMethod) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return PEFT's tensors by key and its config; the config that the adapter came with, where it still is true.

    Raises:
        ValueError: the settings of a layer are not known; or see `can_hold`.
    """
    unknown = [f"{path}: its settings are not known (the file it came from does not say them); load it into a net that "
               f"was adapted as in training, and save that." for path, layer in state.layers.items()
               if layer.settings is None]
    if unknown:
        raise ValueError("\n  ".join(unknown))
    state = method.for_file(state)
    tensors = method.tensors_of({path: layer.tensors for path, layer in state.layers.items()})
    tensors.update({method.shared[name]: value for name, value in state.shared.items()})
    modules, biased = homes_of_trained(state)
    for name, value in state.trained.items():
        path, _, last = name.rpartition(".")
        tensors[f"{PREFIX}{path}{_BASE if path in state.layers else '.'}{pytorch_name(last)}"] = value
    tensors.update({key: tensors.get(key.replace(_COPY, "."), value) if _COPY in key else value
                    for key, value in state.carried.items()})
    if _still_true(state, tensors, method):
        return tensors, dict(state.config)
    fields = method.config_fields({path: layer.settings or {} for path, layer in state.layers.items()})
    if method.bias:
        fields["bias"] = "none" if not biased else method.bias if biased <= set(state.layers) else "all"
    kept = {name: value for name, value in state.config.items() if name not in fields}
    targets = {} if method.home else {"target_modules": sorted(state.layers)}
    return tensors, {"peft_type": method.peft_type, **_COMMON, **kept, **fields, **targets,
                     "modules_to_save": sorted(modules) or None}


def _still_true(state: AdapterState, tensors: Mapping[str, np.ndarray], method: PeftMethod) -> bool:
    try:
        found = decode(tensors, state.config, state.method, method)
    except ValueError:
        return False
    settings = [layer.settings or {} for layer in found.layers.values()]
    own = [layer.settings or {} for layer in state.layers.values()]
    # Where a file does not name its layers, what it says of them is true.
    same = len(settings) == len(own) and all(said.items() <= item.items() for said, item in zip(settings, own)) \
        if method.home else dict(zip(found.layers, settings)) == dict(zip(state.layers, own))
    return (same
            and set(found.trained) == {pytorch_name(name) for name in state.trained})


def decode(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], name: str, method: PeftMethod) -> AdapterState:
    """Return the adapter of the method of this name that PEFT's tensors and config describe.

    Raises:
        ValueError: a field of the config cannot be honoured; a key is none of the method's. All problems stand in one
            message.
    """
    problems = method.problems_of(config)
    if config.get("peft_type") != method.peft_type:
        problems.append(f"peft_type must be {method.peft_type!r}, but the config says {config.get('peft_type')!r:.60}.")
    shared_names = {key: own for own, key in method.shared.items()}
    layers: dict[str, dict[str, np.ndarray]] = {}
    shared, trained, carried = {}, {}, {}
    for key, value in plain_keys(tensors).items():
        layer = method.place_of(key)
        if layer is not None:
            layers.setdefault(layer[0], {})[layer[1]] = value
        elif key in shared_names:
            shared[shared_names[key]] = value
        elif is_carried(key, config):
            carried[key] = value
        elif (place := path_of_trained(key, config) or _path_of_bias(key, config, method)) is not None:
            trained[place] = value
        else:
            above = "" if method.home else f"{PREFIX}<path>."
            problems.append(f"{key} is no tensor of {method.peft_type} (expected {above}"
                            f"{' or '.join(method.keys.values())}), and the config names it not in modules_to_save.")
    if not layers and not trained and not shared and not problems:
        problems.append("the file holds no tensor.")
    if problems:
        raise ValueError("\n  ".join(problems))
    found = {path: LayerState(dict(parts), method.settings_held(method.layer_settings(path, config), parts))
             for path, parts in method.layers_of(layers, config).items()}
    return method.from_file(AdapterState(name, found, trained, dict(config), carried, shared=shared))


def _path_of_bias(key: str, config: Mapping[str, Any], method: PeftMethod) -> str | None:
    """Return the path of a bias that the config says to train, or None for another key."""
    trains = method.bias and config.get("bias") in ("all", method.bias)
    return key.removeprefix(PREFIX).replace(_BASE, ".") if trains and key.startswith(PREFIX) and key.endswith(
        ".bias") else None
