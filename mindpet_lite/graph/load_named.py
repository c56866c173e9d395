"""Load an adapter from a file: alone, or by a name beside others."""
from __future__ import annotations

import os
from pathlib import Path

from mindspore import nn

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import Delta
from mindpet_lite.formats.adapters import Adapter as Source
from mindpet_lite.formats.component import part
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.formats.values import in_float32
from mindpet_lite.graph.adapters import Adapter
from mindpet_lite.graph.fill import fill
from mindpet_lite.graph.home import with_path
from mindpet_lite.graph.load import install, mismatches, read_for, under_paths
from mindpet_lite.graph.named import Named, banks_of, check_new, keep, named, plain_cells, put_beside, write_beside
from mindpet_lite.graph.turns import adds_up, make_way
from mindpet_lite.names.table import Table


def load_adapter(net: nn.Cell, path: str | os.PathLike[str], format: str | None = None,
                 name_map: Table | None = None, strict_base: bool = False, trainable: str = "adapter",
                 component: str | None = None, name: str | None = None, residual_base: bool = False) -> nn.Cell:
    """Load an adapter into `net`, all of it or nothing, in place.

    Layers that the file names and that are still plain are adapted first, with the file's settings. Where the net has
    another alpha than the file, the file's is taken. Afterwards the adapter trains and the base is frozen, as after
    `mindpet_lite.get_pet_model`. New factors are float32; in a float16 layer those of a float16 file are float16.
    All nets of the process compile again at their next call.

    The layers of a file are those of the net with the same path; else with a path that is the same but for parts known
    to mean nothing (``model``, ``base_model.model``, ``module``, ``network``...) and other names of a pipeline's
    component; else the layer that another library calls so (Hugging Face's Llama and BERT, diffusers' U-Net, Stable
    Diffusion's own names). Anything else is refused.

    Args:
        net: the base, adapted or not.
        path: a directory or file, as `save_adapter`, PEFT, diffusers, kohya's scripts, MindPet or MindFormers wrote
            it. MindPet's checkpoints hold no rank and alpha, so they fit a net that is adapted already.
        format: "peft", "diffusers", "kohya", "mindpet" or "mindformers"; told by keys and files without it.
            Default: None.
        name_map: for layers that are called otherwise: ``{path in the file: path in the net}``, or pairs of a regular
            expression and what to put in its place. An entry that renames nothing is an error. Default: None.
        strict_base: refuse an adapter that was trained on another base, instead of a warning. Default: False.
        trainable: "adapter", or "keep": Parameters that were trainable or frozen stay so, and new ones train.
            Default: "adapter".
        component: of a diffusion pipeline: "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer",
            "transformer_2" or "vae". Takes its part of a file of several, and says that the net is that component, or
            has it. Default: None.
        name: of the adapter among others on the net, see `mindpet_lite.set_adapter`. It stands beside those that
            are there, frozen, and counts from `set_adapter` on; the first counts at once. In room that
            `mindpet_lite.reserve_adapters` made it is loaded in the running graph, by values. Default: None.
        residual_base: the weights in `net` are those that the adapter's start left of its base, as PiSSA's: nothing is
            taken out of them. Needed for starts of which no file tells what they left (pissa_niter_N, CorDA, LoftQ,
            LoRA-GA), unless the file holds the hash of these weights, as those of `save_adapter` do. Default: False.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell.
        FileNotFoundError: the directory or a file in it is missing.
        ValueError: a file is damaged, or does not fit the net: missing, unexpected and misshapen keys stand in one
            message. The net is unchanged.

    Examples:
        >>> import mindspore as ms
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> _ = ms.save_checkpoint(net, "base.ckpt")
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> _ = mp.save_adapter(net, "adapter")
        >>> fresh = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> _ = ms.load_checkpoint("base.ckpt", fresh)
        >>> fresh = mp.load_adapter(fresh, "adapter")
        >>> [item.name for item in fresh.trainable_params()]
        ['0.mindpet_delta_lora_a', '0.mindpet_delta_lora_b']
    """
    source = read_for(net, Path(path), format, name_map, trainable)
    if name is None and banks_of(net):
        raise ValueError(f"The net holds adapters by name ({', '.join(named(net).names) or 'none yet'}): give this one "
                         f"a name too.")
    if name is None:
        return install(net, source, str(path), name_map, strict_base, trainable, component, residual_base)
    known = named(net)
    check_new(name, known)
    if not known.names and not known.method:
        install(net, source, str(path), name_map, strict_base, trainable, component, residual_base)
        known = named(net)
        keep(net, Named({name: known.records.popitem()[1]}, {name: 1.0}, known.method, live=name))
        return net
    return _beside(net, source, str(path), name_map, component, name, known)


def _beside(net: nn.Cell, source: Source, path: str, name_map: Table | None, component: str | None, name: str,
            known: Named) -> nn.Cell:
    """Put an adapter that was read beside the others of a net."""
    cells, problems = plain_cells(net), list[str]()
    state = with_path(part(source.state, component), cells, name_map, problems)
    state = under_paths(state, source.kind, cells, name_map, component, problems)
    values = in_float32(state, path)
    if not problems and (values.trained or known.turns):
        # PEFT writes base parameters along that no adapter changes one by one.
        make_way(net, known, name, lambda: install(net, source, path, name_map, component=component))
        return net
    if problems:
        raise ValueError(f"The adapter in {path} does not fit the net, which is unchanged:\n  {listed(problems)}")
    return put_state(net, state, path, name, known)


def put_state(net: nn.Cell, state: AdapterState, path: str, name: str, known: Named) -> nn.Cell:
    """Put an adapter, under the net's paths, beside the others of a net by this name.

    Args:
        net: to change.
        state: the adapter.
        path: where it is from, for messages.
        name: of the adapter.
        known: the net's adapters.

    Raises:
        ValueError: it does not fit. The net is unchanged.
    """
    cells, values, problems = plain_cells(net), in_float32(state, path), list[str]()
    configs = {}
    for place, layer in values.layers.items():
        try:
            configs[place] = METHODS[layer.method or state.method].of_layer(layer.settings or {})
        except (TypeError, ValueError) as error:
            problems.append(f"{place}: {error}")
    if not problems and not all(adds_up(net, config) for config in configs.values()):
        make_way(net, known, name, lambda: install(net, Source(state, "", ()), path))
        return net
    record = Adapter(state.config, state.carried, component=state.component)
    new: dict[str, Delta] = {}
    for place, config in configs.items():
        try:
            new[place] = config.adapt(cells[place])
            problems += mismatches(place, new[place], values.layers[place])
        except (TypeError, ValueError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise ValueError(f"The adapter in {path} does not fit the net, which is unchanged:\n  {listed(problems)}")
    if write_beside(net, known, name, values, record):
        return net
    for place, delta in new.items():
        fill(delta, values.layers[place], state.layers[place], {})
    put_beside(net, known, name, new, record)
    return net
