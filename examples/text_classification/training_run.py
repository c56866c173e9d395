"""One run: the data, the classifier with one method, its training, its accuracy before and after, and its files."""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from bert import load_bert
from classifier import HEAD, Classifier, ClassifierLoss, Features, accuracy, outputs
from linear_probe import fit_head
from measures import Peak, step_seconds
from method_table import choice_of, config_of
from mindspore import Tensor, nn, ops
from safetensors.numpy import save_file
from sentences import LABELS, Sentences, read_sentences, split
from token_batches import Encoded, encode, load_tokenizer, training_batches
from tqdm import tqdm
from user_errors import UserError, sentence

from mindpet_lite import (
    GradientAccumulation,
    OrthogonalRegularization,
    RankAllocation,
    get_pet_model,
    save_adapter,
)
from mindpet_lite.names.parameter_names import pytorch_name
from mindpet_lite.train import Ranks, gradient_bytes

ADAPTER, WHOLE, SETTINGS, LOG, RESULTS = "adapter", "weights.safetensors", "settings.json", "log.jsonl", "results.json"
WRITTEN = (ADAPTER, WHOLE, SETTINGS, LOG, RESULTS)
# The lengths that sentences are padded to, by language: a graph for each. Longer sentences lose their end.
LENGTHS = {"en": (24, 48), "zh": (32, 64)}
EVALUATED = 64
# Sentences of a batch whose features logistic regression is fitted to.
FITTED = 32


@dataclass(frozen=True)
class RunSettings:
    """What a run does; see the flags of train.py."""

    base: Path
    data: Path
    out: Path
    method: str = "lora"
    lang: str = "en"
    labels: tuple[str, ...] = LABELS
    targets: str | None = None
    rank: int | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    rate: float | None = None
    epochs: int = 1
    batch: int = 8
    seed: int = 0
    train_count: int = 3200
    test_count: int = 1000
    validation_count: int = 1000
    on_validation: bool = False
    before: bool = True
    mode: str = "graph"

    def plain(self) -> dict[str, Any]:
        """As JSON holds them."""
        return {name: str(value) if isinstance(value, Path) else value
                for name, value in dataclasses.asdict(self).items()}


@dataclass
class Parts:
    """What is read: sentences and their ids."""

    train: Sentences
    test: Sentences
    train_ids: Encoded
    test_ids: Encoded
    lengths: tuple[int, ...]


def say(ranks: Ranks, text: str) -> None:
    """Prints, in the first process only."""
    if ranks.is_first:
        print(text, flush=True)


def read_parts(settings: RunSettings, ranks: Ranks) -> Parts:
    """Reads, divides and tokenizes the data; says what was skipped and cut."""
    tokenizer, lengths = load_tokenizer(settings.base), LENGTHS[settings.lang]
    sentences, skipped = read_sentences(settings.data, settings.labels)
    if str(skipped):
        say(ranks, f"{settings.data}: {skipped}")
    parts = split(sentences, settings.train_count, settings.test_count, settings.validation_count, settings.seed)
    test = parts.validation if settings.on_validation else parts.test
    encoded = [encode(tokenizer, one.texts, lengths[-1]) for one in (parts.train, test)]
    say(ranks, f"{settings.data}: {len(sentences.texts)} sentences; {len(parts.train.texts)} to train on, "
               f"{len(test.texts)} to test on; {sum(one.cut for one in encoded)} are longer than {lengths[-1]} tokens "
               f"and lose their end")
    return Parts(parts.train, test, *encoded, lengths)


def adapted(settings: RunSettings, steps: int) -> Classifier:
    """Makes the classifier and puts the method into it; only what the method trains, and the head, trains.

    Raises:
        UserError: The base or the method's settings cannot be used.
    """
    ms.set_seed(settings.seed)
    np.random.seed(settings.seed)
    net = Classifier(load_bert(settings.base), len(settings.labels), settings.seed)
    config = config_of(settings.method, settings.targets, settings.rank, settings.fields, steps)
    if config is not None:
        try:
            get_pet_model(net, config)
        except (TypeError, ValueError) as error:
            raise UserError(f"the method {settings.method} cannot be put into the model: {sentence(error)}") from error
    elif settings.method == "frozen":
        for item in net.bert.get_parameters():
            item.requires_grad = False
    return net


def learning_rates(peak: float, steps: int) -> list[float]:
    """Linear warm-up over a tenth of the steps, then a straight line down to zero; one value for each step."""
    rising = max(1, steps // 10)
    return [peak * min((i + 1) / rising, (steps - i) / max(1, steps - rising)) for i in range(steps)]


def make_step(net: Classifier, settings: RunSettings, steps: int) -> tuple[GradientAccumulation, list[float]]:
    """The training step, with AdamW and clipping, and its rates. The head learns at 1e-3 at least, as it is new."""
    rate = settings.rate or choice_of(settings.method).rate
    rates = learning_rates(rate, steps)
    head = [item for item in net.trainable_params() if f"{HEAD}." in f".{item.name}"]
    others = [item for item in net.trainable_params() if all(item is not one for one in head)]
    optimizer: Any = nn.AdamWeightDecay([{"params": others, "lr": rates},
                                         {"params": head, "lr": learning_rates(max(rate, 1e-3), steps)}],
                                        weight_decay=0.01)
    more = None
    if settings.method == "adalora":
        optimizer, more = RankAllocation(net, optimizer), OrthogonalRegularization(net)
    return GradientAccumulation(ClassifierLoss(net, more), optimizer, 1, max_norm=1.0), rates


class MeanOverRanks(nn.Cell):
    """The mean of a number over the processes.

    Args:
        size: How many there are.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.sum, self.size = ops.AllReduce(), size

    def construct(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.size


def add_line(path: Path, row: dict[str, Any]) -> None:
    """Adds an object to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def train(net: Classifier, parts: Parts, settings: RunSettings, ranks: Ranks) -> float | None:
    """Trains for all epochs; returns the seconds of a step.

    Raises:
        UserError: The loss is not finite.
    """
    batches = list(training_batches(parts.train_ids.counts, parts.lengths, settings.batch * ranks.size,
                                    settings.epochs, settings.seed))
    step, rates = make_step(net, settings, len(batches))
    if ranks.size > 1:
        say(ranks, f"each of {ranks.size} processes sends {gradient_bytes(step.optimizer.parameters):,} bytes of "
                   "gradients for a step")
    mean = MeanOverRanks(ranks.size) if ranks.size > 1 else nn.Identity()
    if ranks.is_first:
        (settings.out / LOG).write_text("", encoding="utf-8")
    seconds, net = [], net.set_train(True)
    for number, (length, rows) in enumerate(tqdm(batches, "training", unit="step", mininterval=1,
                                                 disable=not ranks.is_first), 1):
        own = rows[ranks.rank * settings.batch:(ranks.rank + 1) * settings.batch]
        ids, mask = parts.train_ids.batch(own, length)
        started = time.perf_counter()
        loss = float(mean(step(Tensor(ids), Tensor(mask), Tensor(parts.train.labels[own]))).asnumpy())
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} at step {number}: lower --lr")
        if ranks.is_first:
            add_line(settings.out / LOG, {"step": number, "loss": loss, "rate": rates[number - 1], "norm": step.norm,
                                          "length": length, "seconds": round(seconds[-1], 4)})
    net.set_train(False)
    return step_seconds(seconds, [length for length, _ in batches])


def fitted_head(net: Classifier, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """The head that logistic regression finds for the features as they are now: weight and bias."""
    features = outputs(Features(net), parts.train_ids, parts.lengths, FITTED)
    return fit_head(features, parts.train.labels, net.classifier.out_channels)


def accuracy_of_fitted_head(net: Classifier, parts: Parts) -> float:
    """What that head's accuracy is; the net's own stays as it is."""
    weight, bias = fitted_head(net, parts)
    features = outputs(Features(net), parts.test_ids, parts.lengths, EVALUATED)
    return float(np.mean((features @ weight.T + bias).argmax(1) == parts.test.labels))


def train_head(net: Classifier, parts: Parts) -> None:
    """Gives the net that head."""
    weight, bias = fitted_head(net, parts)
    net.classifier.weight.set_data(Tensor(weight))
    net.classifier.bias.set_data(Tensor(bias))


def save(net: Classifier, settings: RunSettings) -> int:
    """Writes what trained, and what predict.py needs to use it; returns the bytes of the former."""
    out = settings.out
    (out / SETTINGS).write_text(json.dumps(settings.plain(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if choice_of(settings.method).pet_type is not None:
        folder = save_adapter(net, out / ADAPTER)
        return sum(path.stat().st_size for path in folder.iterdir())
    tensors = {pytorch_name(name): item.asnumpy() for name, item in net.parameters_and_names() if item.requires_grad}
    save_file(tensors, out / WHOLE)
    return (out / WHOLE).stat().st_size


def whole_run(settings: RunSettings, ranks: Ranks | None = None) -> dict[str, Any]:
    """Makes a run and writes its folder, which exists and is empty.

    Returns:
        What was measured, as in results.json.

    Raises:
        UserError: The data, the base or the settings cannot be used.
    """
    ranks, peak = ranks or Ranks(), Peak()
    choice_of(settings.method)
    parts = read_parts(settings, ranks)
    per_epoch = math.ceil(len(parts.train.texts) / (settings.batch * ranks.size))
    net = adapted(settings, per_epoch * settings.epochs)
    trained, total = (sum(item.size for item in items) for items in (net.trainable_params(), net.get_parameters()))
    say(ranks, f"{settings.method}: {trained:,} of {total:,} numbers train ({100 * trained / total:.4f}%)")

    is_frozen = settings.method == "frozen"
    before = accuracy_of_fitted_head(net, parts) if settings.before and not is_frozen else None
    if before is not None:
        say(ranks, f"accuracy before, of logistic regression on the frozen base: {before:.4f}")
    if is_frozen:
        train_head(net, parts)
    seconds = None if is_frozen else train(net, parts, settings, ranks)
    after = accuracy(net, parts.test_ids, parts.test.labels, parts.lengths, EVALUATED)
    say(ranks, f"accuracy after: {after:.4f}")
    results = {"accuracy_before": before, "accuracy": after, "trained": trained, "total": total,
               "step_seconds": seconds, "peak_bytes": peak.most()}
    if ranks.is_first:
        results["file_bytes"] = save(net, settings)
        (settings.out / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results
