"""Says what pictures show, with a net that train.py tuned.

    python predict.py data/heldout/bird/owl-noto.png --run out/train
    python predict.py my/*.jpg --run out/mine

Prints for each picture its class, the share that the net gives it, and the path, with tabs between.
"""

import argparse
import sys
from pathlib import Path

from image_common import Parser, UserError, run_script  # isort: skip  # first, to say which packages are missing
import mindspore as ms
import numpy as np
from image_folder import load
from image_run import load_run, outputs

HERE = Path(__file__).resolve().parent


def predict(arguments: argparse.Namespace) -> None:
    """Prints a line for each picture.

    Raises:
        UserError: The run or a picture cannot be read.
    """
    missing = [path for path in arguments.pictures if not path.is_file()]
    if missing:
        raise UserError(f"there is no picture {missing[0]}")
    ms.set_context(mode=ms.GRAPH_MODE)
    net, settings = load_run(arguments.run, arguments.weights)
    scores = outputs(net, load(arguments.pictures, settings.size)).astype(np.float64)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    for path, share in zip(arguments.pictures, shares):
        print(f"{settings.classes[share.argmax()]}\t{share.max():.3f}\t{path}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("pictures", nargs="+", type=Path, help="what to look at")
    parser.add_argument("--run", type=Path, default=HERE / "out" / "train", help="folder that train.py wrote (default: "
                                                                                 "out/train here)")
    parser.add_argument("--weights", type=Path, help="the net's weights (default: those that the run had)")
    arguments = parser.parse_args(argv)
    return run_script("predict.py", lambda: predict(arguments))


if __name__ == "__main__":
    sys.exit(main())
