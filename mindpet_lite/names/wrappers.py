"""Parts of a path that say nothing of the layer: what it is called because something is wrapped around its net."""
from __future__ import annotations

import dataclasses

from mindpet_lite.names.components import SPELLINGS


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A part of a path that may be dropped or added.

    Args:
        reason: why it says nothing.
        anywhere: whether it may stand in the middle of a path; else only before a net's own parts.
        architecture: whether it is the name of an architecture, which does not stand for another one.
    """

    reason: str
    anywhere: bool = False
    architecture: bool = False


_PREFIX = "base_model_prefix of Hugging Face's models with a head, which the model without a head does not have"
# Towers (language_model, vision_tower, visual, encoder, decoder, text_model...) are no wrappers: they say which of
# several nets is meant. Nor are the prefixes of models of images or sound: their layers may be called as those of text.
WRAPPERS = {
    "base_model": Wrapper("PEFT's PeftModel, whose layers stand below base_model.model"),
    "model": Wrapper(_PREFIX + " (Llama, Qwen, OPT); the inner model of PEFT's tuners, MindFormers, Lightning"),
    "transformer": Wrapper(_PREFIX + " (GPT-2, Falcon, BLOOM); the transformer of MindFormers' models"),
    "backbone": Wrapper(_PREFIX + " (Mamba); the net in MindFormers' models with a head"),
    "gpt_neox": Wrapper(_PREFIX, architecture=True),
    "bert": Wrapper(_PREFIX, architecture=True),
    "roberta": Wrapper(_PREFIX, architecture=True),
    "distilbert": Wrapper(_PREFIX, architecture=True),
    "albert": Wrapper(_PREFIX, architecture=True),
    "electra": Wrapper(_PREFIX, architecture=True),
    "deberta": Wrapper(_PREFIX, architecture=True),
    "module": Wrapper("PyTorch's DistributedDataParallel and DataParallel, DeepSpeed", anywhere=True),
    "_orig_mod": Wrapper("torch.compile", anywhere=True),
    "_fsdp_wrapped_module": Wrapper("PyTorch's FullyShardedDataParallel", anywhere=True),
    "_checkpoint_wrapped_module": Wrapper("PyTorch's activation checkpointing", anywhere=True),
    "network": Wrapper("MindSpore's TrainOneStepCell and its kin; MindFormers' LoRA"),
    "_network": Wrapper("MindSpore's WithEvalCell"),
    "_backbone": Wrapper("MindSpore's WithLossCell and the cells of mixed precision"),
    "net": Wrapper("the usual name of the net in a loss cell or training step of one's own"),
}


@dataclasses.dataclass(frozen=True)
class Bare:
    """A path without its wrappers.

    Args:
        rest: of the path.
        component: of a diffusion pipeline that stands before it, empty for none.
        architectures: the names of architectures among the wrappers.
    """

    rest: str
    component: str = ""
    architectures: frozenset[str] = frozenset()


def bare(path: str, with_component: bool = True) -> Bare:
    """Return the path without wrappers and component; its last part stays.

    Args:
        path: of a layer.
        with_component: whether a component may stand before it.
    """
    parts = [part for part in path.split(".") if part not in _ANYWHERE] or [path.rpartition(".")[2]]
    component, architectures = "", set()
    while len(parts) > 1:
        # `transformer` and `model.diffusion_model` are components, too.
        spelled = next((name for name in SPELLINGS if parts[:len(name)] == list(name) and len(parts) > len(name)),
                       None) if with_component and not component else None
        if spelled is not None:
            component, parts = SPELLINGS[spelled], parts[len(spelled):]
        elif parts[0] in WRAPPERS:
            architectures |= {parts[0]} if WRAPPERS[parts[0]].architecture else set()
            parts = parts[1:]
        else:
            break
    return Bare(".".join(parts), component, frozenset(architectures))


_ANYWHERE = frozenset(name for name, wrapper in WRAPPERS.items() if wrapper.anywhere)
