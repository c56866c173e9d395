"""What fine-tuning and sampling share: the device, the models, pictures to latents and back, texts to vectors."""

import dataclasses
import logging

import mindspore as ms
import numpy as np
from base import Base, load_base
from checkpoint import load_checkpoint_base
from diffusers_base import load_diffusers_base
from errors import UserError
from mindspore import nn
from samplers import sample
from settings import Settings

MODES = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}
BATCH = 8


def use_device(settings: Settings) -> None:
    """Chooses device and mode, and seeds MindSpore.

    Raises:
        UserError: There is no such device.
    """
    logging.disable(logging.WARNING)  # MindSpore would tell in ten warnings what the sentence below says
    try:
        # MindSpore refuses to be told again once an operator ran, even the device it is on.
        if ms.get_context("device_target") != settings.device:
            ms.set_device(settings.device)
    except (RuntimeError, ValueError):
        raise UserError(f"MindSpore finds no {settings.device} on this machine: give --device CPU, or install "
                        "Ascend's driver and CANN and source its set_env.sh") from None
    finally:
        logging.disable(logging.NOTSET)
    ms.set_context(mode=MODES[settings.mode])
    ms.set_seed(settings.seed)


def load_models(settings: Settings) -> Base:
    """Loads the base that the settings name; what the U-Net predicts is what they say, if they do.

    Raises:
        UserError: The base and the settings do not fit each other.
        BaseError: The base is missing, damaged or does not fit its configuration.
        MismatchError: A .ckpt or a diffusers folder does not fit the models.
    """
    base = read_models(settings)
    if settings.prediction is None:
        return base
    return dataclasses.replace(base, schedule=dataclasses.replace(base.schedule, prediction=settings.prediction))


def read_models(settings: Settings) -> Base:
    """Reads the base from a checkpoint or from a folder. Errors as `load_models`."""
    allowed = [settings.allow_missing] if isinstance(settings.allow_missing, str) else settings.allow_missing
    options = {"use_fp16": True} if settings.fp16 else {}
    if settings.base.suffix == ".ckpt":
        if settings.model is None:
            raise UserError(f"{settings.base} is a checkpoint without sizes: give --config a YAML file with a model "
                            "block, such as configs/wukong_full_lora.yaml")
        return load_checkpoint_base(settings.base, settings.model, allowed, **options)
    if settings.model is not None:
        raise UserError(f"{settings.base} is a folder, which says its sizes itself: leave the model block out, or "
                        "give a .ckpt")
    if (settings.base / "model_index.json").is_file():
        return load_diffusers_base(settings.base, allowed, **options)
    if allowed:
        raise UserError(f"{settings.base} is no Wukong checkpoint and no folder of diffusers (model_index.json): a "
                        "base of our own lacks nothing, so leave allow_missing out")
    return load_base(settings.base, **options)


def side_multiple(base: Base) -> int:
    """Heights and widths of images must be multiples of this, so that the models can halve them as often as they do."""
    config = base.config
    return 2 ** (len(config["autoencoder"]["ddconfig"]["ch_mult"]) + len(config["unet"]["channel_mult"]) - 2)


def latent_shape(base: Base, image_size: int) -> tuple[int, int, int]:
    """Shape of one image's latents.

    Raises:
        UserError: The models cannot halve the image's side as often as they have to.
    """
    if image_size % side_multiple(base):
        raise UserError(f"image_size must be a multiple of {side_multiple(base)} for this base, got {image_size}")
    side = image_size // 2 ** (len(base.config["autoencoder"]["ddconfig"]["ch_mult"]) - 1)
    return base.config["unet"]["in_channels"], side, side


def in_batches(function: nn.Cell, array: np.ndarray, size: int = BATCH) -> np.ndarray:
    """Runs a function of one tensor over an array in batches of one size, so that it is compiled once."""
    rows = np.resize(np.arange(len(array)), -(-len(array) // size) * size).reshape(-1, size)
    return np.concatenate([function(ms.Tensor(array[some])).asnumpy() for some in rows])[:len(array)]


def encode_images(base: Base, images: np.ndarray) -> np.ndarray:
    """Images (n, 3, s, s) in [-1, 1] to latents (n, C, h, w): the encoder's means times the scale factor."""
    means = in_batches(base.autoencoder.encode_moments, images)
    return means[:, :means.shape[1] // 2] * np.float32(base.scale_factor)


def decode_latents(base: Base, latents: np.ndarray) -> np.ndarray:
    """Latents to images (n, 3, s, s), cut to [-1, 1]."""
    return np.clip(in_batches(base.autoencoder.decode, latents / np.float32(base.scale_factor)), -1, 1)


def embed_texts(base: Base, texts: list[str]) -> np.ndarray:
    """Texts to vectors (n, L, D); a text that comes twice is encoded once."""
    distinct = list(dict.fromkeys(texts))
    vectors = in_batches(base.text_encoder, np.array([base.tokenizer(text) for text in distinct], np.int32))
    return vectors[[distinct.index(text) for text in texts]]


def start_noise(shape: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
    """The noise (count, C, h, w) that prompts begin with: it follows from the seed and the prompt's place alone."""
    return np.stack([np.random.default_rng([seed, i]).standard_normal(shape, np.float32) for i in range(count)])


def generate(base: Base, step: nn.Cell, prompts: list[str], noise: np.ndarray, *, solver: str, steps: int,
             guidance: float) -> np.ndarray:
    """Draws one image for each prompt.

    Args:
        base: The models; its U-Net may be adapted.
        step: A GuidedStep on its U-Net; keep it, and later calls compile nothing.
        prompts: The texts.
        noise: See `start_noise`.
        solver: One of samplers.SOLVERS.
        steps: Calls of the U-Net for each image.
        guidance: 1 is the plain model, more follows the prompt more closely.

    Returns:
        float32 (n, 3, s, s) in [-1, 1].
    """
    context, empty = embed_texts(base, prompts), embed_texts(base, [""])
    size = min(BATCH, len(prompts))
    rows = np.resize(np.arange(len(prompts)), -(-len(prompts) // size) * size).reshape(-1, size)
    latents = [sample(step, noise[some], context[some], empty, base.schedule, solver=solver, steps=steps,
                      guidance=guidance) for some in rows]
    return decode_latents(base, np.concatenate(latents)[:len(prompts)])


def saturation(images: np.ndarray) -> float:
    """Mean over all pixels of max - min of red, green and blue, as a share of the full range; 0 is grey."""
    return float((images.max(axis=1) - images.min(axis=1)).mean() / 2)
