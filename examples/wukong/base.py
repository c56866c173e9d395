"""The base: a U-Net, a text encoder and an autoencoder with their configuration, in one folder.

    config.yaml                 unet, text_encoder, autoencoder: the arguments of the three models;
                                schedule: those of Schedule; scale_factor; vocabulary: the tokenizer's characters
    unet.safetensors            parameter path -> array, and so on for the other two; read as float32
"""

from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import yaml
from autoencoder import AutoencoderKL
from diffusion import Schedule
from mindspore import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from text_encoder import TextEncoder
from tokenizer import CharTokenizer
from unet import UNetModel
from whole_files import write_atomically

from mindpet_lite import yaml_files

MODELS = {"unet": UNetModel, "text_encoder": TextEncoder, "autoencoder": AutoencoderKL}
KEYS = {*MODELS, "schedule", "scale_factor", "vocabulary"}


class BaseError(Exception):
    """A base that cannot be used; the text is one sentence for the user."""


@dataclass(frozen=True)
class Base:
    """A loaded base.

    Attributes:
        unet: Called as ``(x, timesteps, context)``.
        text_encoder: Called on ids (B, L).
        autoencoder: ``encode_moments`` and ``decode``.
        tokenizer: Texts to ids.
        schedule: The noise schedule of training.
        scale_factor: Latents are the autoencoder's means times this.
        config: What config.yaml holds, or what another kind of base says in its place.
        report: What became of the entries of the files (loading.Report), where the base is not of our own making.
    """

    unet: nn.Cell
    text_encoder: nn.Cell
    autoencoder: nn.Cell
    tokenizer: CharTokenizer
    schedule: Schedule
    scale_factor: float
    config: dict
    report: object = None


def read_config(folder: Path) -> dict:
    """Reads and checks config.yaml.

    Raises:
        BaseError: It is missing, no YAML, or its keys are not the ones expected.
    """
    path = folder / "config.yaml"
    try:
        config = yaml_files.read_yaml(path)
    except FileNotFoundError:
        raise BaseError(f"no base in {folder}: {path.name} is missing; give the folder that holds it and the three "
                        "*.safetensors files, or a folder of diffusers with its model_index.json") from None
    except (OSError, ValueError) as error:
        raise BaseError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if set(config) != KEYS:
        raise BaseError(f"{path} must hold the keys {', '.join(sorted(KEYS))}, found {sorted(map(str, config))}")
    factor = config["scale_factor"]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise BaseError(f"{path}: scale_factor must be a number above 0, got {factor!r}")
    return config


def build(name: str, config: dict, where: object, **extra: object) -> nn.Cell:
    """Builds one of the three models from its part of the configuration.

    Raises:
        BaseError: The arguments do not fit the model.
    """
    try:
        return MODELS[name](**config[name], **extra)
    except (TypeError, ValueError) as error:
        raise BaseError(f"{where}: the part {name} does not describe a {MODELS[name].__name__}: {error}") from None


def load_weights(net: nn.Cell, path: Path, added: tuple[str, ...] = ()) -> None:
    """Sets every parameter of a net from a file, or, with an error, none.

    Args:
        net: The net; parameters are found by their path in it.
        path: A safetensors file of floats.
        added: Endings of the parameters that a base does not have, such as those of LoRA.

    Raises:
        BaseError: The file is missing or broken, or its names or shapes are not the net's.
    """
    try:
        arrays = load_file(path)
    except FileNotFoundError:
        raise BaseError(f"no file {path}: the base is not complete") from None
    except (OSError, SafetensorError) as error:
        raise BaseError(f"{path} cannot be read ({error}): it is damaged or no safetensors file") from None
    parameters = {name: p for name, p in net.parameters_and_names() if not (added and name.endswith(added))}
    problems = [f"{name} is missing" for name in parameters if name not in arrays]
    problems += [f"{name} is not known" for name in arrays if name not in parameters]
    problems += [
        f"{name} has shape {arrays[name].shape} instead of {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in arrays and arrays[name].shape != tuple(p.shape)
    ]
    problems += [f"{name} holds NaN or infinity" for name, value in arrays.items() if not np.isfinite(value).all()]
    if problems:
        raise BaseError(f"{path} does not fit config.yaml: {problems[0]} ({len(problems)} such problems)")
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(arrays[name].astype(np.float32), parameter.dtype))


def load_base(folder: str | Path, **unet_options: object) -> Base:
    """Loads a base, everything checked.

    Args:
        folder: See the top of this file.
        unet_options: More arguments of the U-Net (``enable_lora``, ``lora_rank``, ``lora_alpha``, ``use_fp16``).

    Raises:
        BaseError: A file is missing or damaged, or the files do not fit each other.
    """
    folder = Path(folder)
    config = read_config(folder)
    where = folder / "config.yaml"
    unet = build("unet", config, where, **unet_options)
    text_encoder, autoencoder = build("text_encoder", config, where), build("autoencoder", config, where)
    try:
        schedule = Schedule(**config["schedule"])
        tokenizer = CharTokenizer(config["vocabulary"], config["text_encoder"]["context_length"])
    except (TypeError, ValueError) as error:
        raise BaseError(f"{where}: {error}") from None
    load_weights(unet, folder / "unet.safetensors", ("mindpet_delta_lora_a", "mindpet_delta_lora_b", "scaling"))
    load_weights(text_encoder, folder / "text_encoder.safetensors")
    load_weights(autoencoder, folder / "autoencoder.safetensors")
    for net in (unet, text_encoder, autoencoder):
        net.set_train(False)
    return Base(unet, text_encoder, autoencoder, tokenizer, schedule, float(config["scale_factor"]), config)


def save_weights(weights: dict[str, np.ndarray], path: Path) -> None:
    """Writes one model's weights as float16, atomically."""
    arrays = {name: np.ascontiguousarray(value.astype(np.float16)) for name, value in weights.items()}
    write_atomically(path, lambda partial: save_file(arrays, partial))


def save_base(folder: Path, config: dict, weights: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes a whole base: ``weights`` by model, then by parameter path; config.yaml last."""
    for name, arrays in weights.items():
        save_weights(arrays, folder / f"{name}.safetensors")
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False, width=110)
    write_atomically(folder / "config.yaml", lambda partial: partial.write_text(text, encoding="utf-8"))
