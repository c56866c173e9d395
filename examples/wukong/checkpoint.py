"""A base from one full Wukong checkpoint (.ckpt): its three models stand below three prefixes."""

from pathlib import Path

import mindspore as ms
import numpy as np
from base import MODELS, Base, BaseError, build
from diffusion import Schedule
from mindspore import Parameter, nn
from wordpiece import WordPieceTokenizer

PREFIXES = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer.",
            "autoencoder": "first_stage_model."}
KEYS = {*MODELS, "schedule", "scale_factor", "vocabulary"}


def load_checkpoint_base(path: str | Path, model: dict, **unet_options: object) -> Base:
    """Loads a base, everything checked before any weight is set.

    Args:
        path: A MindSpore checkpoint; entries below none of the prefixes (averages, optimizer) are left alone.
        model: As config.yaml of a base folder (see base.py), but ``vocabulary`` is the path of a WordPiece vocabulary.
        unet_options: More arguments of the U-Net; they win over those of `model`.

    Raises:
        BaseError: A file is missing or damaged, or does not fit `model`.
    """
    if set(model) != KEYS:
        raise BaseError(f"model must hold the keys {', '.join(sorted(KEYS))}, found {', '.join(map(str, model))}")
    factor = model["scale_factor"]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise BaseError(f"model: scale_factor must be a number above 0, got {factor!r}")
    try:
        tokenizer = WordPieceTokenizer(Path(model["vocabulary"]).expanduser(), model["text_encoder"]["context_length"])
        schedule = Schedule(**model["schedule"])
    except OSError as error:
        raise BaseError(f"model: the vocabulary {model['vocabulary']} cannot be read ({error.strerror}): give the path "
                        "of vocab_zh.txt, which comes with Wukong's checkpoint") from None
    except (TypeError, ValueError, KeyError) as error:
        raise BaseError(f"model: {error}") from None
    entries = read(Path(path))
    nets = {name: build(name, {**model, "unet": {**model["unet"], **unet_options}}, "model") for name in MODELS}
    values = {name: chosen(net, PREFIXES[name], entries, path) for name, net in nets.items()}
    for name, net in nets.items():
        net.set_train(False)
        for parameter_path, parameter in net.parameters_and_names():
            parameter.set_data(ms.Tensor(values[name][parameter_path], parameter.dtype))
    return Base(**nets, tokenizer=tokenizer, schedule=schedule, scale_factor=float(factor), config=model)


def read(path: Path) -> dict[str, Parameter]:
    """All entries of a checkpoint file."""
    if not path.is_file():
        raise BaseError(f"no base at {path}: give the path of Wukong's checkpoint, such as wukong-huahua-ms.ckpt")
    try:
        return ms.load_checkpoint(str(path))
    except (ValueError, RuntimeError, OSError) as error:
        raise BaseError(f"{path} cannot be read as a MindSpore checkpoint ({' '.join(str(error).split())[:120]}): "
                        "it was cut short or damaged, copy it again") from None


def chosen(net: nn.Cell, prefix: str, entries: dict[str, Parameter], path: str | Path) -> dict[str, np.ndarray]:
    """The values of one net by path, after checking names, shapes and numbers."""
    values: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for name, parameter in net.parameters_and_names():
        entry = entries.get(prefix + name)
        if entry is None:
            problems.append(f"{prefix}{name} is missing")
        elif entry.shape != parameter.shape:
            problems.append(f"{prefix}{name} has shape {tuple(entry.shape)} instead of {tuple(parameter.shape)}")
        else:
            values[name] = entry.asnumpy()
    problems += [f"{prefix}{name} holds NaN or infinity" for name, value in values.items()
                 if not np.isfinite(value).all()]
    if problems:
        raise BaseError(f"{path} does not fit model: {problems[0]} ({len(problems)} such problems)")
    return values
