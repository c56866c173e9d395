"""A base from one full Wukong checkpoint (.ckpt): its three models stand below three prefixes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from base import MODELS, Base, BaseError, build
from diffusion import Schedule
from loading import Origin, Report, fill, match, new
from wordpiece import WordPieceTokenizer

from mindpet_lite.offline.base import open_base

PREFIXES = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer.",
            "autoencoder": "first_stage_model."}
KEYS = {*MODELS, "schedule", "scale_factor", "vocabulary"}


def load_checkpoint_base(path: str | Path, model: dict, allowed: Sequence[str] = (), **unet_options: object) -> Base:
    """Loads a base; names, shapes and sizes are checked before any weight is read.

    Args:
        path: A MindSpore checkpoint; entries below none of the prefixes (averages, optimizer) are left alone.
        model: As config.yaml of a base folder (see base.py), but ``vocabulary`` is the path of a WordPiece vocabulary.
        allowed: Names or patterns of entries that the file or the models may lack.
        unet_options: More arguments of the U-Net; they win over those of `model`.

    Raises:
        BaseError: A file is missing or damaged, or does not fit `model`.
        MismatchError: The file's entries are not those of the three models; it has the report.
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
    if not Path(path).is_file():
        raise BaseError(f"no base at {path}: give the path of Wukong's checkpoint, such as wukong-huahua-ms.ckpt")
    config = {**model, "unet": {**model["unet"], **unet_options}}
    nets = {name: new(build, name, config, "model") for name in MODELS}
    report = Report()
    try:
        with open_base(Path(path)) as file:
            for name, net in nets.items():
                report.add(match(net, file, places(PREFIXES[name]), below(PREFIXES[name])))
            report.check(path, allowed)
            for name, net in nets.items():
                fill(net, file, places(PREFIXES[name]))
    except (ValueError, OSError) as error:
        raise BaseError(f"{path} cannot be read as a MindSpore checkpoint: {error}") from None
    return Base(**nets, tokenizer=tokenizer, schedule=schedule, scale_factor=float(factor), config=model, report=report)


def places(prefix: str) -> Callable[[str], Origin]:
    """Where a parameter stands in the file: at its path below a prefix."""
    return lambda path: ((prefix + path,),)


def below(prefix: str) -> Callable[[str], bool]:
    """Whether an entry stands below a prefix."""
    return lambda name: name.startswith(prefix)
