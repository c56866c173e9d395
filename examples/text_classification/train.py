"""Trains a classifier of sentences with one method, and says its accuracy before and after.

    python prepare.py                                                     # once: the base and the data
    python train.py                                                       # LoRA of rank 8 on query and value, English
    python train.py --method lora --lora-rank 8 --targets 'query|value' --lang zh --out out/zh
    python train.py --method adapter --set bottleneck_size=32 --lr 1e-3 --epochs 2 --out out/adapter
    python train.py --data my.tsv --labels bad,good,neither --train-count 800 --test-count 200 --out out/mine
    msrun --worker_num=2 --local_worker_num=2 --join=True train.py --parallel data --batch 4 --out out/two
    python predict.py "A film that never ends." --run out/train           # afterwards

--data is a file with a sentence a line: label, tab, sentence. A run leaves in --out: adapter/ (PEFT's layout, with the
head), log.jsonl (a JSON object for each step), settings.json and results.json. Relative paths count from the working
directory. --method frozen fits a linear head alone; --method full trains everything.
"""

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

# First, to say which packages are missing.
from user_errors import Parser, UserError, run_script, sentence  # isort: skip
import mindspore as ms
from method_table import CHOICES, choice_of
from prepare import CACHE, HERE
from sentences import LABELS
from training_run import LENGTHS, RESULTS, WRITTEN, RunSettings, say, whole_run

from mindpet_lite import init_data_parallel
from mindpet_lite.train import Ranks


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def rate(text: str) -> float:
    """A learning rate: above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is some, else a text."""
    name, equal, value = text.partition("=")
    if not equal or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def names(text: str) -> tuple[str, ...]:
    """Labels with commas between them."""
    found = tuple(part.strip() for part in text.split(","))
    if len(found) < 2 or not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected two or more different labels with commas between, got {text!r}")
    return found


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that compare.py has too."""
    add = parser.add_argument
    add("--lang", choices=sorted(LENGTHS), default="en", help="language of the data in the cache (default: en)")
    add("--cache", type=Path, default=CACHE, help="folder that prepare.py filled (default: cache/ beside this file)")
    add("--batch", type=positive, default=8, help="sentences of a batch, in each process (default: 8)")
    add("--epochs", type=positive, default=1, help="times that all sentences are trained on (default: 1)")
    add("--train-count", type=positive, default=3200, help="sentences to train on (default: 3200)")
    add("--test-count", type=positive, default=1000, help="sentences to test on (default: 1000)")
    add("--validation-count", type=not_negative, default=1000, help="sentences set apart from every seed's training "
                                                                    "and test (default: 1000)")
    add("--on-validation", action="store_true", help="test on those: for choosing settings")


def flags() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--method", default="lora", help=f"one of {', '.join(CHOICES)} (default: lora)")
    add("--lora-rank", type=positive, help="rank, or what says the size of another method (default: the table's)")
    add("--targets", help="layers to adapt, a regular expression such as 'query|value' (default: the table's)")
    add("--set", type=assignment, action="append", default=[], metavar="NAME=VALUE",
        help="any other field of the method's config; may be given several times")
    add("--lr", type=rate, help="highest learning rate (default: the table's)")
    add("--seed", type=not_negative, default=0, help="of the split, the start and the order (default: 0)")
    add("--base", type=Path, help="folder of the base (default: base/ in the cache)")
    add("--data", type=Path, help="file of sentences (default: en.tsv or zh.tsv in the cache)")
    add("--labels", type=names, default=LABELS, help=f"labels in the data (default: {','.join(LABELS)})")
    add("--out", type=Path, default=HERE / "out" / "train", help="folder of the run (default: out/train here)")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
    add("--no-before", action="store_true", help="do not measure the accuracy before, of the frozen base")
    add("--parallel", choices=("none", "data"), default="none",
        help="data: each process of msrun takes a share of each batch")
    add("--mode", choices=("graph", "pynative"), default="graph", help="pynative is slow: for debugging")
    add("--device", choices=("CPU", "Ascend"), default="CPU", help="where to compute (default: CPU)")
    add_common_flags(parser)
    return parser


def settings_of(arguments: argparse.Namespace) -> RunSettings:
    """The settings that the flags say.

    Raises:
        UserError: A method is unknown.
    """
    choice_of(arguments.method)
    return RunSettings(
        base=(arguments.base or arguments.cache / "base").resolve(),
        data=arguments.data or arguments.cache / f"{arguments.lang}.tsv", out=arguments.out, method=arguments.method,
        lang=arguments.lang, labels=arguments.labels, targets=arguments.targets, rank=arguments.lora_rank,
        fields=dict(arguments.set), rate=arguments.lr, epochs=arguments.epochs, batch=arguments.batch,
        seed=arguments.seed, train_count=arguments.train_count, test_count=arguments.test_count,
        validation_count=arguments.validation_count, on_validation=arguments.on_validation,
        before=not arguments.no_before, mode=arguments.mode)


def open_folder(out: Path, overwrite: bool) -> None:
    """Makes the folder of a run, or clears it.

    Raises:
        UserError: It holds something that may not go.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a folder")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    others = [name for name in found if name not in WRITTEN]
    if found and (others or not overwrite):
        what = "which is no file of a run" if others else "already"
        raise UserError(f"{out} holds {(others or found)[0]} {what}: give another --out"
                        + ("" if others else ", or --overwrite"))
    for name in found:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    out.mkdir(parents=True, exist_ok=True)


def use_device(device: str, mode: str) -> None:
    """Chooses device and mode.

    Raises:
        UserError: There is no such device.
    """
    logging.disable(logging.WARNING)  # MindSpore would tell in ten warnings what the sentence below says
    try:
        # MindSpore refuses to be told again once an operator ran, even the device it is on.
        if ms.get_context("device_target") != device:
            ms.set_device(device)
    except (RuntimeError, ValueError):
        raise UserError(f"MindSpore finds no {device} on this machine: give --device CPU, or install Ascend's driver "
                        "and CANN and source its set_env.sh") from None
    finally:
        logging.disable(logging.NOTSET)
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)


def run(arguments: argparse.Namespace) -> None:
    """Makes the run and says where its files are."""
    settings = settings_of(arguments)
    use_device(arguments.device, arguments.mode)
    ranks = Ranks()
    if arguments.parallel == "data":
        if settings.method == "frozen":
            raise UserError("--parallel data shares out gradients, and the method frozen has none: leave it out")
        try:
            ranks = init_data_parallel()
        except RuntimeError as error:
            raise UserError(f"--parallel data: {sentence(error)}") from error
    if ranks.is_first:
        open_folder(settings.out, arguments.overwrite)
    results = whole_run(settings, ranks)
    say(ranks, f"written to {settings.out}: {results.get('file_bytes', 0):,} bytes of what trained, {RESULTS}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = flags().parse_args(argv)
    return run_script("train.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
