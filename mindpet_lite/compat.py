"""The old import name: after `install_as_mindpet()`, code that imports `mindpet` runs on this package."""
from __future__ import annotations

import importlib
import os
import re
import stat
import sys
from types import ModuleType
from typing import Any

from mindspore import nn

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import FLOAT_TYPES

__all__ = ["install_as_mindpet"]

# Each module of MindPet 1.0.4 that its documentation or its own tests import from, and where its names are now.
MODULES: dict[str, tuple[str, ...]] = {
    "mindpet": (),
    "mindpet.mindpet_sdk": ("mindpet_lite.tasks",),
    "mindpet.delta": ("mindpet_lite.delta", "mindpet_lite.train.r_drop"),
    "mindpet.delta.adapter": ("mindpet_lite.delta.adapter",),
    "mindpet.delta.delta_constants": (),
    "mindpet.delta.lora": ("mindpet_lite.delta.lora",),
    "mindpet.delta.low_rank_adapter": ("mindpet_lite.delta.low_rank_adapter",),
    "mindpet.delta.prefix_layer": ("mindpet_lite.delta.prefix",),
    "mindpet.delta.ptuning2": ("mindpet_lite.delta.ptuning2",),
    "mindpet.delta.r_drop": ("mindpet_lite.train.r_drop",),
    "mindpet.graph": ("mindpet_lite.graph", "mindpet_lite.train.checkpoints"),
    "mindpet.graph.ckpt_util": ("mindpet_lite.train.checkpoints",),
    "mindpet.graph.freeze_utils": ("mindpet_lite.graph.freeze",),
    "mindpet.layers": (),
    "mindpet.layers.activation": ("mindspore.nn.layer.activation", "mindpet_lite.delta.activation"),
    "mindpet.utils": (),
    "mindpet.utils.constants": (),
    "mindpet.utils.exceptions": (),
    "mindpet.utils.version_control": ("mindpet_lite.delta.activation",),
    "mindpet.utils.version_utils": (),
}


def install_as_mindpet() -> None:
    """Make `import mindpet` and its modules find this package, for the rest of the process.

    Call it before anything imports `mindpet`; calling it again does nothing. Names are ours, so what differs from
    MindPet on purpose differs here too: see docs/mindpet.md.

    Raises:
        RuntimeError: the real mindpet is imported already. Nothing is changed.

    Examples:
        >>> import mindpet_lite
        >>> mindpet_lite.install_as_mindpet()
        >>> from mindpet.delta.lora import LoRADense
        >>> LoRADense is mindpet_lite.LoRADense
        True
    """
    found = [name for name in sys.modules if name == "mindpet" or name.startswith("mindpet.")]
    if found and all(isinstance(sys.modules[name], _Alias) for name in found):
        return
    if found:
        raise RuntimeError("The real mindpet is imported already, and two packages cannot share one name: call "
                           "mindpet_lite.install_as_mindpet() before the first import of mindpet, or remove that one.")
    modules = {name: _alias(name, sources) for name, sources in MODULES.items()}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    sys.modules.update(modules)


def get_dropout(dropout_prob: float) -> nn.Dropout:
    """Return the dropout cell that drops with probability `dropout_prob`."""
    return nn.Dropout(p=dropout_prob)


def is_version_ge(current_version: str, base_version: str) -> bool:
    """Tell whether a version such as 2.10.0 is the other or a later one; a part such as 0rc1 counts by its number."""
    return _numbers(current_version) >= _numbers(base_version)


def is_version_le(current_version: str, base_version: str) -> bool:
    """Tell whether a version such as 2.10.0 is the other or an earlier one."""
    return _numbers(current_version) <= _numbers(base_version)


class _Alias(ModuleType):
    """A module of MindPet's name with our names in it."""


def _alias(name: str, sources: tuple[str, ...]) -> _Alias:
    module = _Alias(name, f"MindPet's `{name}`, by mindpet_lite.")
    # Only a package may hold modules.
    if any(other.startswith(name + ".") for other in MODULES):
        module.__path__ = []
    for source in sources:
        origin = importlib.import_module(source)
        names = getattr(origin, "__all__", None) or [
            key for key, value in vars(origin).items()
            if not key.startswith("_") and getattr(value, "__module__", None) == source]
        vars(module).update({key: getattr(origin, key) for key in names})
    vars(module).update(_EXTRA.get(name, {}))
    return module


def _numbers(version: str) -> list[int]:
    if not isinstance(version, str) or "." not in version:
        raise ValueError(f"expected a version such as '2.10.0', but got {version!r:.100}.")
    return [int("0" + re.sub("[^0-9].*", "", part)) for part in version.split(".")]


_LETTERS = {"UPPER": [chr(code) for code in range(ord("A"), ord("Z") + 1)],
            "LOWER": [chr(code) for code in range(ord("a"), ord("z") + 1)]}
_DIGITS = [str(digit) for digit in range(10)]
_TASKS = ["finetune", "evaluate", "infer"]
_CHECKPOINT_TASK = ("data_path", "ckpt_path", "output_path", "boot_file_path", "model_config_path", "timeout")

# What is no code of ours, by the module that had it: values that scripts read, and the error names that MindPet
# documents, as the built-in errors that are raised now.
_EXTRA: dict[str, dict[str, Any]] = {
    "mindpet.delta.delta_constants": {"VALID_TENSOR_DATATYPE": list(FLOAT_TYPES)},
    "mindpet.utils.version_control": {"get_dropout": get_dropout},
    "mindpet.utils.version_utils": {"is_version_ge": is_version_ge, "is_version_le": is_version_le},
    "mindpet.utils.exceptions": {
        "MindPetError": Exception, "UnexpectedError": Exception, "AbsolutePathError": ValueError,
        "LinkPathError": ValueError, "ModelConfigFreezeInfoError": ValueError, "ReadYamlFileError": OSError},
    "mindpet.utils.constants": {
        "DELTA_LIST": list(METHODS), "DEFAULT_FLAGS": os.O_RDWR | os.O_CREAT,
        "DEFAULT_MODES": stat.S_IWUSR | stat.S_IRUSR,
        "EMPTY_STRING": "", "SPACE_CHARACTER": " ", "UPPER_CASE_LETTERS": _LETTERS["UPPER"],
        "LOWER_CASE_LETTERS": _LETTERS["LOWER"], "NUMBERS": _DIGITS,
        "BASE_WHITELIST_CHARACTERS": {
            **_LETTERS, "LETTERS": _LETTERS["UPPER"] + _LETTERS["LOWER"], "NUMBERS": _DIGITS,
            "ALL": _LETTERS["UPPER"] + _LETTERS["LOWER"] + _DIGITS},
        "BLACKLIST_CHARACTERS": ("'", '"', "..", "../", "%2e%2e", "%2e./", ".%2e/", "..%2f", "%2e%2e/", "%2e.%2f",
                                 ".%2e%2f", "%2e%2e%2f"),
        "DEFAULT_PATH_LEN_MIN_LIMIT": 1, "DEFAULT_PATH_LEN_MAX_LIMIT": 4096, "DEFAULT_FILE_LEN_MIN_LIMIT": 1,
        "DEFAULT_FILE_LEN_MAX_LIMIT": 255, "MB_SIZE": 2 ** 20, "GB_SIZE": 2 ** 30, "MAX_FILE_MB_SIZE": 10,
        "MODEL_CONFIG_ROOT_KEYS": ("params", "freeze"),
        "MODEL_CONFIG_PARAMS_CHARACTER_BLACKLIST": tuple("|&,;`\"'$(){}><?\\!\n*#"), "MODEL_CONFIG_LEN_LIMIT": 2 ** 14,
        "ENTRANCE_TYPE": "ENTRANCE_TYPE", "MIN_MODE": 0, "MAX_MODE": 7, "PATH_MODE_LIMIT": "750",
        "DEFAULT_MAX_LOG_FILE_SIZE": 10, "DEFAULT_MAX_LOG_FILE_NUM": 10, "OUTPUT_PATH_RANDOM_DIR_MODE": 0o750,
        "EVAL_RESULT_FILE_NAME": "eval_result.json", "INFER_RESULT_FILE_NAME": "infer_result.json",
        "TIME_MONITOR_SLEEP_TIME": 1, "TIMEOUT_REGEX": "^([0-9]+d)?([0-9]+h)?$", "SECONDS_PER_HOUR": 3600,
        "HOURS_PER_DAY": 24, "ABNORMAL_EXIT_CODE": 1,
        "MINDPET_DEFINED_PARAM_NAME": ("dp", "data_path", "op", "output_path", "bp", "boot_file_path", "mc",
                                       "model_config_path", "pm", "pretrained_model_path", "cp", "ckpt_path", "q",
                                       "quiet", "t", "timeout", "advanced_config"),
        "ARG_NAMES": {"finetune": ("data_path", "output_path", "boot_file_path", "pretrained_model_path",
                                   "model_config_path", "timeout"),
                      "evaluate": _CHECKPOINT_TASK, "infer": _CHECKPOINT_TASK},
        "INVALID_CUSTOM_PARAM_KEY_PREFIX": "-", "INVALID_CUSTOM_PARAM_VAL_PREFIX": "--",
        "FINETUNE_TASK_NAME": "finetune", "EVALUATE_TASK_NAME": "evaluate", "INFER_TASK_NAME": "infer",
        "EVAL_INFER_TASK_NAMES": _TASKS[1:], "MINDPET_SDK_INTERFACE_NAMES": _TASKS},
}
