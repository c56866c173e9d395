"""Labels sentences with a classifier that train.py made.

    python predict.py "A film that never ends." "What a wonderful surprise!" --run out/train
    python predict.py --run out/train < sentences.txt            # a sentence a line

Prints for each sentence its label, the share that the classifier gives it, and the sentence, with tabs between.
"""

import argparse
import json
import sys
from pathlib import Path

# First, to say which packages are missing.
from user_errors import Parser, UserError, run_script, sentence  # isort: skip
import mindspore as ms
import numpy as np
from bert import load_bert
from classifier import Classifier, outputs
from mindspore import Tensor
from prepare import HERE
from safetensors import SafetensorError
from safetensors.numpy import load_file
from token_batches import encode, load_tokenizer
from training_run import ADAPTER, EVALUATED, LENGTHS, SETTINGS, WHOLE

from mindpet_lite import load_adapter
from mindpet_lite.names.parameter_names import pytorch_name


def load_run(run: Path, base: Path | None) -> tuple[Classifier, dict]:
    """The classifier of a run and the run's settings.

    Raises:
        UserError: The folder is none of a run, or does not fit the base.
    """
    try:
        settings = json.loads((run / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run} has no {SETTINGS}: give --run a folder that train.py wrote") from None
    except ValueError as error:
        raise UserError(f"{run / SETTINGS} is no JSON: {error}") from error
    settings["base"] = base or Path(settings["base"])
    net = Classifier(load_bert(settings["base"]), len(settings["labels"]))
    try:
        if (run / WHOLE).is_file():
            tensors = load_file(run / WHOLE)
            for name, item in net.parameters_and_names():
                if pytorch_name(name) in tensors:
                    item.set_data(Tensor(tensors[pytorch_name(name)]))
        else:
            load_adapter(net, run / ADAPTER)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{run} cannot be loaded: {sentence(error)}") from error
    return net.set_train(False), settings


def predict(arguments: argparse.Namespace) -> None:
    """Reads the sentences and prints a line for each.

    Raises:
        UserError: There is no sentence, or the run cannot be loaded.
    """
    given = arguments.sentences or sys.stdin.read().splitlines()
    texts = [text for text in given if text.strip()]
    if len(texts) < len(given):
        print(f"predict.py: left out {len(given) - len(texts)} empty sentences", file=sys.stderr)
    if not texts:
        raise UserError("there is no sentence: give some in quotation marks, or a sentence a line on the input")
    ms.set_context(mode=ms.GRAPH_MODE)
    net, settings = load_run(arguments.run, arguments.base)
    lengths = LENGTHS[settings["lang"]]
    encoded = encode(load_tokenizer(settings["base"]), texts, lengths[-1])
    if encoded.cut:
        print(f"predict.py: {encoded.cut} sentences are longer than {lengths[-1]} tokens and lose their end",
              file=sys.stderr)
    scores = outputs(net, encoded, lengths, min(len(texts), EVALUATED)).astype(np.float64)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    for text, share in zip(texts, shares):
        print(f"{settings['labels'][share.argmax()]}\t{share.max():.3f}\t{' '.join(text.split())}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("sentences", nargs="*", help="what to label; without any, the lines of the input")
    parser.add_argument("--run", type=Path, default=HERE / "out" / "train", help="folder that train.py wrote (default: "
                                                                                 "out/train here)")
    parser.add_argument("--base", type=Path, help="folder of the base (default: the one that the run had)")
    arguments = parser.parse_args(argv)
    return run_script("predict.py", lambda: predict(arguments))


if __name__ == "__main__":
    sys.exit(main())
