"""The names of configs' fields as PEFT and MindFormers spell them: one table."""
from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from mindpet_lite.arguments import did_you_mean

# PEFT's and MindFormers' spellings of fields that have another name here, for configs that lack the field itself.
SPELLINGS = {"r": "lora_rank", "num_virtual_tokens": "prefix_token_num", "exclude_layers": "exclude_modules",
             "reg_rules": "target_modules"}
# PEFT's fields that have no place here, and why.
_NEEDLESS = {"fan_in_fan_out": "how a weight lies is known from its layer"}
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


class Spelled(type):
    """The class of configs: PEFT's spellings of the fields are understood too."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        """Make a config; unknown names of fields are told with the nearest one that is known."""
        return super().__call__(*args, **respelled(cls, fields))

    @property
    def __signature__(cls) -> inspect.Signature:
        """The fields, where their names would be hidden by the spellings; without private ones."""
        own = inspect.signature(vars(cls)["__init__"])
        return own.replace(parameters=[item for item in list(own.parameters.values())[1:] if item.name[0] != "_"])


def respelled(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config by their names here.

    Raises:
        TypeError: a field is unknown, or given in two spellings.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    found: dict[str, Any] = {}
    for name, value in fields.items():
        own = name if name in known else SPELLINGS.get(name, name)
        if own not in known:
            reason = f": {_NEEDLESS[name]}; leave it out." if name in _NEEDLESS else \
                f".{did_you_mean(name, [item for item in known if not item.startswith('_')])}"
            raise TypeError(f"{kind.__name__} has no field {name!r:.100}{reason}")
        if own in found:
            raise TypeError(f"{kind.__name__} is given {own!r} twice, once as another spelling; keep one of the two.")
        found[own] = value
    return found
