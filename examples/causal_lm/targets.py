"""The layers that a config means: by our names, which are Hugging Face's, or by MindFormers'."""

import dataclasses
import re

from common import UserError, explained
from decoder import Decoder
from mindspore import nn
from options import SIZES

from mindpet_lite.config import as_config
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.names.placing import map_names

# What MindFormers calls the layers of a block.
NAMES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
         "feed_forward.w3")


def config_for(net: Decoder, block: dict) -> DeltaConfig:
    """The config that a `pet_config` block describes, with targets in the net's names.

    Raises:
        UserError: The block is not valid, or names no layer of the net.
    """
    with explained("pet_config", ValueError, TypeError):
        config = as_config(block)
    changes = {name: ours(net, value) for name in ("target_modules", "exclude_modules")
               if (value := getattr(config, name, None))}
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def ours(net: Decoder, wanted: str | list[str] | tuple[str, ...]) -> list[str] | None:
    """The net's names of the layers that MindFormers' names mean; None where they are no names of MindFormers'."""
    there = [path for path, cell in net.cells_and_names() if isinstance(cell, nn.Dense) and path.startswith("model.")]
    layers = range(net.sizes.num_hidden_layers)
    known = map_names([f"model.layers.{i}.{name}" for i in layers for name in NAMES], there)
    if isinstance(wanted, str):
        try:
            expression = re.compile(wanted)
        except re.error:
            return None
        # As MindFormers: an expression of a whole path, or of the beginning of a layer's own name.
        found = [path for path in known if expression.fullmatch(path)] or \
            [path for path in known if expression.match(path.rpartition(".")[2])]
    else:
        found = [path for path in known if any(f".{path}".endswith(f".{name}") for name in wanted)]
        missed = [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in known)]
        if found and missed:
            raise UserError(f"pet_config: target_modules mixes names of MindFormers' with {', '.join(missed)}: write "
                            "all in one library's names")
    return shortened([known[path] for path in found], there) if found else None


def shortened(paths: list[str], there: list[str]) -> list[str]:
    """The last parts of paths, where these mean the same layers; else the paths."""
    last = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    same = [path for path in there if path.rpartition(".")[2] in last]
    return last if set(same) == set(paths) else paths


def check_sizes(net: Decoder, model_config: dict) -> None:
    """Refuses a base that is of other sizes than a YAML says.

    Raises:
        UserError: With the first size that differs.
    """
    for theirs, own in SIZES.items():
        value, found = model_config.get(theirs), getattr(net.sizes, own)
        if value is not None and value != found:
            raise UserError(f"model_config says {theirs}: {value}, and the base has {found}: give the base that the "
                            "file is meant for, or take the line out")
