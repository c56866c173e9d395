"""A base from a Stable Diffusion 1.x folder of diffusers: model_index.json and a folder for each model.

    unet/, vae/, text_encoder/       config.json and the weights: *.safetensors, or shards with their *.index.json
    scheduler/                       scheduler_config.json
    tokenizer/                       vocab.json and merges.txt
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from base import Base, BaseError, build
from bpe import BPETokenizer
from diffusers_config import read_configs
from diffusers_names import autoencoder_origin, text_origin, unet_origin
from diffusion import Schedule
from loading import Origin, Report, fill, match, new

from mindpet_lite.offline.base import Base as Entries
from mindpet_lite.offline.base import open_base

FOLDERS = {"unet": "unet", "text_encoder": "text_encoder", "autoencoder": "vae"}
# A table of 0, 1, 2, ... that older files hold beside the weights.
NO_WEIGHTS = {"text_model.embeddings.position_ids"}


def load_diffusers_base(folder: str | Path, allowed: Sequence[str] = (), **unet_options: object) -> Base:
    """Loads a base; configs, names and shapes are checked before any weight is read.

    Args:
        folder: See the top of this file.
        allowed: Names or patterns, such as ``vae/encoder.*``, of entries that the files or the models may lack.
        unet_options: More arguments of the U-Net.

    Raises:
        BaseError: A file is missing or damaged, or describes what our models cannot be.
        MismatchError: The files' entries are not those of the three models; it has the report.
    """
    folder = Path(folder)
    config = read_configs(folder)
    tokenizer, schedule = read_tokenizer(folder, config), read_schedule(folder, config)
    sizes = {**config, "unet": {**config["unet"], **unet_options}}
    nets = {name: new(build, name, sizes, folder / below / "config.json") for name, below in FOLDERS.items()}
    origins = origins_of(config)
    report = Report()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(opened(folder / below)) for name, below in FOLDERS.items()}
        for name, net in nets.items():
            report.add(match(net, files[name], origins[name], lambda entry: entry not in NO_WEIGHTS),
                       f"{FOLDERS[name]}/")
        report.check(folder, allowed)
        for name, net in nets.items():
            fill(net, files[name], origins[name])
    return Base(**nets, tokenizer=tokenizer, schedule=schedule, scale_factor=config["scale_factor"], config=config,
                report=report)


def origins_of(config: dict) -> dict[str, Callable[[str], Origin]]:
    """The table of names of each model."""
    return {"unet": partial(unet_origin, num_res_blocks=config["unet"]["num_res_blocks"]), "text_encoder": text_origin,
            "autoencoder": partial(autoencoder_origin, levels=len(config["autoencoder"]["ddconfig"]["ch_mult"]))}


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Entries]:
    """The weights of one model, in one file or in shards.

    Raises:
        BaseError: There are none, a shard is missing, or a file is damaged.
    """
    if not any(folder.glob("*.safetensors")):
        raise BaseError(f"no weights in {folder}: diffusion_pytorch_model.safetensors or model.safetensors, or shards "
                        "with their index, are needed")
    try:
        with open_base(folder) as file:
            yield file
    except (OSError, ValueError) as error:
        raise BaseError(f"the weights in {folder} cannot be read: {error}") from None


def read_tokenizer(folder: Path, config: dict) -> BPETokenizer:
    """The tokenizer of a folder.

    Raises:
        BaseError: Its files are missing or damaged, or have more ids than the text encoder.
    """
    try:
        tokenizer = BPETokenizer(folder / "tokenizer", config["text_encoder"]["context_length"])
    except (OSError, ValueError) as error:
        raise BaseError(f"{folder / 'tokenizer'} cannot be used: {error}") from None
    largest, size = max(tokenizer.ids.values()), config["text_encoder"]["vocab_size"]
    if largest >= size:
        raise BaseError(f"{folder / 'tokenizer'} has the id {largest}, but text_encoder/config.json says "
                        f"vocab_size={size}")
    return tokenizer


def read_schedule(folder: Path, config: dict) -> Schedule:
    """The noise schedule of a folder.

    Raises:
        BaseError: Its numbers are none of a schedule.
    """
    try:
        return Schedule(**config["schedule"])
    except (TypeError, ValueError) as error:
        raise BaseError(f"{folder / 'scheduler' / 'scheduler_config.json'}: {error}") from None
