"""The settings of fine-tuning and sampling: a YAML file, overridden by flags, everything checked before any work."""

import argparse
import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError

from mindpet_lite import yaml_files

HERE = Path(__file__).resolve().parent


def setting(default: Any, text: str, *flags: str, least: float | None = None, above: float | None = None,
            most: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of Settings: its default, its line in --help, further flags, and the values it may take."""
    rules = {"text": text, "flags": flags, "least": least, "above": above, "most": most, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=rules)
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Settings:
    """What a run does; `read` makes one. Relative paths count from the working directory."""

    base: Path = setting(HERE / "base", "folder of the base, folder of a Stable Diffusion 1.x as diffusers has it, or "
                                        "a full Wukong checkpoint (.ckpt; needs model)")
    model: dict | None = setting(None, "sizes of the models in a .ckpt base; YAML only, see wukong_full_lora.yaml")
    allow_missing: list | str = setting([], "names or patterns of entries that the files of a .ckpt or diffusers base, "
                                            "or our models, may lack")

    data: Path = setting(HERE / "data" / "train", "folder with images and a CSV file (columns dir,text) or Hugging "
                         "Face's metadata.jsonl")
    heldout: Path | None = setting(None, "the same, never trained on (default: the folder heldout beside data, if any)")
    image_size: int = setting(32, "side of the images in pixels", least=8)
    buckets: int = setting(1, "number of shapes, from 1:2 to 2:1, that images are sorted into; a graph for each",
                           least=1, most=9)
    random_flip: bool = setting(False, "train on each image and its mirror image")
    latent_cache: Path | None = setting(None, "folder that keeps the latents of images for the next run")

    out: Path = setting(HERE / "out" / "finetune", "folder for the adapter, checkpoints, the log and the report")
    overwrite: bool = setting(False, "delete what an earlier run left in out")
    resume: bool = setting(False, "go on from the newest checkpoint in out")
    save_every: int = setting(0, "steps between checkpoints; 0: none but on Ctrl-C and SIGTERM", least=0)
    keep: int = setting(2, "checkpoints to keep", least=1)
    validation_every: int = setting(0, "steps between validation pictures; 0: none", least=0)
    validation_prompts: list = setting(["狐狸，黑白", "红苹果，黑白"], "what they show")

    lora_rank: int = setting(4, "rank of LoRA", "--rank", least=1)
    lora_alpha: float = setting(4.0, "alpha of LoRA: the update is scaled by alpha / rank", "--alpha", above=0)
    lora_dropout: float = setting(0.0, "dropout before LoRA, in [0, 1)", least=0, most=0.999)
    target_modules: list | str = setting(["to_q", "to_k", "to_v", "to_out.0"],
                                         "layers to adapt: last parts of paths; in YAML also one regular expression")
    train_text_encoder: bool = setting(False, "put LoRA into the text encoder too")
    text_target_modules: list | str = setting(["in_proj", "out_proj"], "its layers to adapt")

    steps: int = setting(500, "training steps", least=1)
    batch_size: int = setting(32, "images per step (of each process)", "--batch", least=1)
    gradient_accumulation: int = setting(1, "steps whose gradients make one update", least=1)
    learning_rate: float = setting(1e-4, "highest learning rate", "--lr", above=0)
    lora_plus_ratio: float = setting(1.0, "LoRA+: LoRA's B has the learning rate times this", above=0)
    final_learning_rate: float = setting(1e-6, "learning rate that the cosine ends at", above=0)
    warmup_steps: int = setting(20, "steps of linear warm-up", "--warmup", least=1)
    weight_decay: float = setting(0.01, "weight decay of AdamW", least=0)
    clip_norm: float = setting(1.0, "largest norm of all gradients together", above=0)
    ema_decay: float | None = setting(None, "also save moving averages of the adapter with this decay", least=0,
                                      most=0.99999)
    recompute: bool = setting(False, "compute activations again in the backward pass: less memory, more time")

    caption_dropout: float = setting(0.1, "share of captions replaced by the empty one, for guidance", least=0, most=1)
    min_snr_gamma: float | None = setting(None, "cap on the weight of nearly clean images (Hang et al., 2023)",
                                          above=0)
    noise_offset: float = setting(0.0, "share of noise that is the same in a whole channel (Guttenberg, 2023)",
                                  least=0, most=1)
    prediction: str | None = setting(None, "what the U-Net predicts: the noise, or v (Salimans and Ho, 2022); default: "
                                     "as the base does", choices=("epsilon", "v"))

    instance_prompt: str | None = setting(None, "DreamBooth: the caption of every image")
    class_prompt: str | None = setting(None, "DreamBooth: what the base is to go on drawing as before")
    class_images: int = setting(32, "images that the base draws of it", least=1)
    prior_loss_weight: float = setting(1.0, "weight of the loss on them", least=0)

    heldout_draws: int = setting(4, "noise draws per held-out image when its loss is measured", least=1)
    fp16: bool = setting(False, "compute the U-Net in float16, with dynamic loss scale")
    loss_scale: float = setting(65536.0, "first loss scale with fp16", least=1)
    seed: int = setting(0, "the same seed gives the same run", least=0)
    device: str = setting("CPU", "where to run", choices=("CPU", "Ascend"))
    mode: str = setting("graph", "one compiled graph per step, or operator by operator", choices=("graph", "pynative"))
    parallel: str = setting("none", "data: several processes, each its share of the data; start them with msrun",
                            choices=("none", "data"))

    def heldout_folder(self) -> Path | None:
        """The held-out folder that was given, or the one beside the data, or None."""
        beside = self.data.resolve().parent / "heldout"
        return self.heldout or (beside if beside.is_dir() else None)


DEFAULTS = Settings()
FIELDS = {one.name: one for one in dataclasses.fields(Settings)}
KINDS = {Path: "a path", Path | None: "a path", dict | None: "a block of keys", int: "a whole number",
         float: "a number", float | None: "a number", bool: "true or false", str: "text",
         list | str: "a list of names or one text", list: "a list of texts", str | None: "text"}
NUMBERS = (float, float | None)


def add_flags(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Adds --config and a flag for each of these settings."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings; flags override it")
    for name in names:
        rules, kind = FIELDS[name].metadata, FIELDS[name].type
        default = getattr(DEFAULTS, name)
        text = rules["text"] + ("" if default is None else f" (default: {default})")
        options: dict[str, Any] = {"dest": name, "default": None, "help": text}
        if kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif kind in (list, list | str):
            options |= {"nargs": "+", "metavar": "NAME"}
        elif rules["choices"]:
            options |= {"choices": rules["choices"]}
        else:
            types = {Path | None: Path, float | None: float, str | None: str}
            options |= {"type": types.get(kind, kind), "metavar": name.split("_")[-1].upper()}
        parser.add_argument("--" + name.replace("_", "-"), *rules["flags"], **options)


def read(arguments: argparse.Namespace) -> Settings:
    """Settings from the YAML file that --config names, overridden by the flags that were given.

    Raises:
        UserError: The file is missing or no YAML, a key is unknown, or a value is of the wrong type or out of range.
    """
    values = read_yaml(arguments.config) if arguments.config else {}
    flags = {name: value for name, value in vars(arguments).items() if name in FIELDS and value is not None}
    where = {**dict.fromkeys(values, f"{arguments.config}: "), **dict.fromkeys(flags, "command line: ")}
    return Settings(**{name: checked(where[name], name, value) for name, value in {**values, **flags}.items()})


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; all keys are names of settings."""
    try:
        values = yaml_files.read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}: give --config the path of a YAML file, such as "
                        f"{HERE / 'configs' / 'wukong_tiny.yaml'}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as YAML (keys and values such as 'steps: 500'): "
                        f"{' '.join(str(error).split())}") from None
    for key in values:
        if key not in FIELDS:
            near = difflib.get_close_matches(str(key), FIELDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(FIELDS)}"
            raise UserError(f"{path}: unknown key {key!r}; {hint}")
    return values


def checked(where: str, name: str, value: Any) -> Any:
    """The value of a setting in its own type.

    Raises:
        UserError: It is of another type or out of range; the text names file or flag, key and value.
    """
    kind, rules = FIELDS[name].type, FIELDS[name].metadata
    if value is None and FIELDS[name].default is None:
        return None
    if not fits(kind, value):
        raise UserError(f"{where}{name} must be {KINDS[kind]}, got {value!r}{hint(kind, value)}")
    if kind in (Path, Path | None):
        return Path(value).expanduser()
    if rules["choices"] and value not in rules["choices"]:
        raise UserError(f"{where}{name} must be {' or '.join(rules['choices'])}, got {value!r}")
    bounds = {"at least": rules["least"], "above": rules["above"], "at most": rules["most"]}
    good = {"at least": lambda b: value >= b, "above": lambda b: value > b, "at most": lambda b: value <= b}
    if any(bound is not None and not good[word](bound) for word, bound in bounds.items()):
        raise UserError(f"{where}{name} must be "
                        + " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
                        + f", got {value!r}")
    return float(value) if kind in NUMBERS else value


def fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a setting's type; true is no number, and neither are NaN and infinity."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind in (Path, Path | None):
        return isinstance(value, str | Path) and str(value) not in ("", ".")
    if kind in (list, list | str):
        names = value if isinstance(value, list) or kind is list else [value]
        return isinstance(names, list) and bool(names) and all(isinstance(item, str) and item for item in names)
    return isinstance(value, kind)


def hint(kind: Any, value: Any) -> str:
    """Why YAML gives text where a number was written."""
    if kind not in (int, *NUMBERS) or not isinstance(value, str):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    if kind is int or "e" not in value.lower():
        return ": write it without quotes"
    mantissa, _, exponent = f"{number:e}".partition("e")
    mantissa = mantissa.rstrip("0")
    return f", which YAML reads as text: write {mantissa}{'0' if mantissa.endswith('.') else ''}e{exponent}"
