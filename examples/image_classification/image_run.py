"""One run: pictures, the net with its adapter, training, accuracy before and after, and what it leaves."""

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from branch import BRANCH
from frozen_head import head_of_means, regression
from image_common import UserError, explained
from image_folder import Pictures, divide, load, read_folder, varied
from image_nets import LITE0, make_net, with_branch
from mindspore import Tensor, nn
from predictions import Shown, save_predictions
from tqdm import tqdm

from mindpet_lite import GradientAccumulation, LoraConfig, freeze_statistics, get_pet_model, load_adapter, save_adapter

ADAPTER, SETTINGS, LOG, RESULTS, PICTURE = "adapter", "settings.json", "log.jsonl", "results.json", "predictions.png"
WRITTEN = (ADAPTER, SETTINGS, LOG, RESULTS, PICTURE)
EVALUATED = 20


@dataclass(frozen=True)
class ImageSettings:
    """What a run does; see the flags of train.py."""

    data: Path
    out: Path
    heldout: Path | None = None
    net: str = LITE0
    weights: Path | None = None
    size: int = 128
    rank: int = 8
    alpha: float = 16.0
    targets: str | None = None
    branch: int = 0
    epochs: int = 8
    batch: int = 18
    rate: float = 1e-3
    seed: int = 0
    mode: str = "graph"
    classes: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON holds them."""
        return {name: str(value.resolve()) if isinstance(value, Path) and value.exists() else
                str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()}


class Embedding(nn.Cell):
    """What the last layer of a net sees, as a net to call."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, x: Tensor) -> Tensor:
        return self.net.embed(x)


class ImageLoss(nn.Cell):
    """Mean cross-entropy of a batch."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")

    def construct(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.net(x), labels)


def outputs(net: nn.Cell, pictures: np.ndarray) -> np.ndarray:
    """What a net gives for every picture; all calls have one shape."""
    size, found = min(EVALUATED, len(pictures)), []
    for begin in range(0, len(pictures), size):
        part = pictures[begin:begin + size]
        filled = np.concatenate([part, np.repeat(part[:1], size - len(part), 0)])
        found.append(net(Tensor(filled)).asnumpy()[:len(part)])
    return np.concatenate(found)


def base_net(settings: ImageSettings) -> nn.Cell:
    """The net with its weights and a new head, without an adapter; where asked for a branch stands beside it.

    The statistics of BatchNorm stay those of the weights, in training too.

    Raises:
        UserError: The weights cannot be used.
    """
    net = make_net(settings.net, len(settings.classes), settings.size, settings.weights)
    if settings.branch:
        net = with_branch(net, len(settings.classes), settings.size)
    if any(isinstance(cell, nn.BatchNorm2d) for _, cell in net.cells_and_names()):
        freeze_statistics(net)
    return net


def adapted_net(settings: ImageSettings) -> nn.Cell:
    """The net with LoRA on its convolutions, and on the branch where there is one; the new head trains whole.

    Raises:
        UserError: The weights or the settings cannot be used.
    """
    ms.set_seed(settings.seed + 1)
    np.random.seed(settings.seed)
    net = base_net(settings)
    inner = getattr(net, "net", net)
    targets = rf"(.*\.)?({settings.targets or inner.targets})"
    patterns: dict[str, int] = {}
    if settings.branch:
        targets, patterns = f"{targets}|{BRANCH}", {BRANCH: settings.branch}
    with explained("the adapter cannot be put into the net", ValueError, TypeError):
        get_pet_model(net, LoraConfig(
            lora_rank=settings.rank, lora_alpha=settings.alpha, target_modules=targets,
            modules_to_save=[inner.head_path], rank_pattern=patterns,
            alpha_pattern=dict.fromkeys(patterns, settings.branch)))
    return net


def head_of(net: nn.Cell) -> nn.Dense:
    """The last layer, which is trained whole."""
    inner = getattr(net, "net", net)
    return dict(inner.cells_and_names())[inner.head_path]


def set_head(net: nn.Cell, values: tuple[np.ndarray, np.ndarray]) -> None:
    """Gives the last layer a weight and a bias."""
    for item, value in zip((head_of(net).weight, head_of(net).bias), values):
        item.set_data(Tensor(value))


def learning_rates(peak: float, steps: int) -> list[float]:
    """Linear warm-up over a tenth of the steps, then a straight line down to zero; one value for each step."""
    rising = max(1, steps // 10)
    return [peak * min((i + 1) / rising, (steps - i) / max(1, steps - rising)) for i in range(steps)]


def train(net: nn.Cell, pictures: np.ndarray, labels: np.ndarray, settings: ImageSettings) -> None:
    """Trains for all epochs; each step is a line of log.jsonl.

    Raises:
        UserError: The loss is not finite.
    """
    rng, batch = np.random.default_rng(settings.seed), min(settings.batch, len(pictures))
    each = len(pictures) // batch
    rates = learning_rates(settings.rate, each * settings.epochs)
    step = GradientAccumulation(ImageLoss(net), nn.Adam(net.trainable_params(), rates), 1, max_norm=1.0)
    net.set_train(True)
    bar = tqdm(total=len(rates), desc="training", unit="step", mininterval=1)
    with bar, (settings.out / LOG).open("w", encoding="utf-8") as log:
        for number, rate in enumerate(rates, 1):
            if (number - 1) % each == 0:
                order = rng.permutation(len(pictures))
            rows = order[(number - 1) % each * batch:][:batch]
            started = time.perf_counter()
            loss = float(step(Tensor(varied(pictures[rows], rng)), Tensor(labels[rows])).asnumpy())
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {number}: lower --lr")
            log.write(json.dumps({"step": number, "loss": loss, "rate": rate,
                                  "seconds": round(time.perf_counter() - started, 4)}) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
    net.set_train(False)


def read_parts(settings: ImageSettings) -> tuple[list[str], Pictures, Pictures]:
    """The classes, what is trained on, and what is held out: another folder's, else a fifth of each class."""
    beside = settings.data.with_name("heldout")
    heldout = settings.heldout or (beside if beside.is_dir() and beside != settings.data else None)
    classes, pictures = read_folder(settings.data, 2 if heldout else 3)
    if heldout is None:
        return classes, *divide(pictures, settings.seed)
    return classes, pictures, read_folder(heldout, 1, classes)[1]


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
        raise UserError(f"{out} holds {others[0]}, which is no file of a run: give another --out" if others else
                        f"{out} holds {found[0]} already: give another --out, or --overwrite")
    for name in found:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    out.mkdir(parents=True, exist_ok=True)


def whole_run(settings: ImageSettings, overwrite: bool = False) -> dict[str, Any]:
    """Makes a run and writes its folder.

    Returns:
        What was measured, as in results.json.

    Raises:
        UserError: The pictures, the weights or the settings cannot be used.
    """
    started = time.monotonic()
    classes, seen, unseen = read_parts(settings)
    settings = dataclasses.replace(settings, classes=tuple(classes))
    known, asked = load(seen.paths, settings.size), load(unseen.paths, settings.size)
    print(f"{len(classes)} classes: {', '.join(classes)}; {len(known)} pictures to train on, {len(asked)} held out",
          flush=True)
    net = adapted_net(settings).set_train(False)
    trained, total = (sum(item.size for item in items) for items in (net.trainable_params(), net.get_parameters()))
    print(f"{settings.net}: {trained:,} of {total:,} numbers train ({100 * trained / total:.2f}%)", flush=True)
    open_folder(settings.out, overwrite)
    embedding = Embedding(net).set_train(False)
    before, features = (outputs(embedding, one) for one in (known, asked))
    set_head(net, head_of_means(before, seen.labels, len(classes)))
    weight, bias = regression(before, seen.labels, len(classes))
    first = outputs(net, asked).argmax(1)
    results = {"accuracy_nearest_mean": share(first, unseen.labels),
               "accuracy_regression": share((features @ weight.T + bias).argmax(1), unseen.labels)}
    print(f"before, frozen features: nearest class mean {results['accuracy_nearest_mean']:.4f}, logistic regression "
          f"{results['accuracy_regression']:.4f}", flush=True)
    train(net, known, seen.labels, settings)
    last = outputs(net, asked).argmax(1)
    adapter = save_adapter(net, settings.out / ADAPTER)
    results |= {"accuracy_after": share(last, unseen.labels), "trained": trained, "total": total,
                "adapter_bytes": sum(path.stat().st_size for path in adapter.rglob("*.safetensors")),
                "seconds": round(time.monotonic() - started, 1)}
    print(f"after, LoRA and the new head: {results['accuracy_after']:.4f}", flush=True)
    shown = [Shown(path, classes[label], classes[one], classes[other])
             for path, label, one, other in zip(unseen.paths, unseen.labels, first, last)]
    save_predictions(shown, settings.out / PICTURE)
    for name, value in ((SETTINGS, settings.plain()), (RESULTS, results)):
        (settings.out / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def share(found: np.ndarray, labels: np.ndarray) -> float:
    """The share of pictures whose class was found."""
    return float(np.mean(found == labels))


def load_run(run: Path, weights: Path | None) -> tuple[nn.Cell, ImageSettings]:
    """The net of a run, and the run's settings.

    Raises:
        UserError: The folder is none of a run, or does not fit the weights.
    """
    if not (run / SETTINGS).is_file():
        raise UserError(f"{run} has no {SETTINGS}: give --run a folder that train.py wrote")
    with explained(f"{run / SETTINGS} is none of a run", ValueError, TypeError):
        values = json.loads((run / SETTINGS).read_text(encoding="utf-8"))
        paths = {name: Path(values[name]) for name in ("data", "out", "heldout", "weights") if values.get(name)}
        settings = ImageSettings(**{**values, **paths, "classes": tuple(values.get("classes") or ())})
    settings = dataclasses.replace(settings, weights=weights or settings.weights)
    net = base_net(settings)
    with explained(f"the adapter in {run} cannot be loaded", ValueError, TypeError):
        load_adapter(net, run / ADAPTER)
    return net.set_train(False), settings
