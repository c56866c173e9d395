"""Loads a base and says what became of the entries of its files; nothing is trained or written.

    python load_report.py --base stable-diffusion-v1-5                                 # a folder of diffusers
    python load_report.py --base wukong-huahua-ms.ckpt --config configs/wukong_full_lora.yaml
    python load_report.py --base my/folder --allow-missing 'vae/encoder.*' --all

Ends with exit code 2 where an entry is missing, unexpected or of another size and --allow-missing does not name it.
"""

import argparse
import sys

import extras  # noqa: F401  # isort: skip  # first, to say which packages are missing
import pipeline
from base import BaseError
from errors import Parser, run_script
from loading import SHOWN, MismatchError, Report
from settings import Settings, add_flags, read

FLAGS = ["base", "allow_missing", "fp16", "device"]


def load(settings: Settings, shown: int | None) -> None:
    """Loads the base and prints its report, that of a base that is refused too."""
    pipeline.use_device(settings)
    try:
        base = pipeline.load_models(settings)
    except MismatchError as error:
        print(error.report.table(shown))
        raise
    report = base.report
    print(report.table(shown) if isinstance(report, Report) else "a base of our own: all entries matched")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    add_flags(parser, FLAGS)
    parser.add_argument("--all", action="store_true", help=f"all names, the matched too (else {SHOWN} of each kind)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parse(argv)
    return run_script("load_report.py", lambda: load(read(arguments), None if arguments.all else SHOWN), BaseError)


if __name__ == "__main__":
    sys.exit(main())
