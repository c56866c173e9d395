"""Random sequences of what can be done with several adapters on a net, beside a model of them in numpy.

    python tests/adapter_sequences.py 1000        # sequences; in a folder that may be written to
"""
from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

import mindpet_lite as mp
from mindpet_lite.delta.parts import put
from mindpet_lite.formats.adapters import read_adapter, to_files, write_files
from mindpet_lite.formats.lora import A, B
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.graph.named import banks_of, named

SHAPES = {"0": (5, 6), "1": (4, 5)}
SAMPLES = 3


class Model:
    """The net and its adapters in numpy: W and b of each layer, and for each adapter a pair and a scale by layer."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.base = {path: (self._draw(*shape), self._draw(shape[0])) for path, shape in SHAPES.items()}
        self.adapters: dict[str, dict[str, list]] = {}
        self.active: dict[str, float] = {}
        self.x = self._draw(SAMPLES, 6)

    def _draw(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def pair(self, path: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return random factors for a layer."""
        outputs, inputs = SHAPES[path]
        return self._draw(rank, inputs), self._draw(outputs, rank)

    def output(self, weights: list[dict[str, float]]) -> np.ndarray:
        """Return the net's output where each sample has these weights of adapters."""
        rows = []
        for x, own in zip(self.x.astype(np.float64), weights):
            for path, (weight, bias) in self.base.items():
                whole = weight.astype(np.float64)
                for name, number in own.items():
                    if path in self.adapters[name]:
                        a, b, scale = self.adapters[name][path]
                        whole = whole + number * scale * (b.astype(np.float64) @ a)
                x = whole @ x + bias
            rows.append(x)
        return np.stack(rows)


class Sequence:
    """One net, its model, and the operations on both; each ends with a comparison."""

    def __init__(self, seed: int) -> None:
        self.model = Model(seed)
        self.rng = self.model.rng
        self.net = nn.SequentialCell(nn.Dense(6, 5), nn.Dense(5, 4))
        for path, (weight, bias) in self.model.base.items():
            cell = self.net[int(path)]
            cell.weight.set_data(Tensor(weight))
            cell.bias.set_data(Tensor(bias))
        self.count = 0
        if self.rng.random() < 0.5:
            mp.reserve_adapters(self.net, int(self.rng.integers(4, 12)), SAMPLES if self.rng.random() < 0.5 else 0,
                                ["0", "1"])

    def check(self, weights: list[dict[str, float]] | None = None) -> None:
        """Compare the net's output with the model's."""
        wanted = self.model.output(weights or [self.model.active] * SAMPLES)
        found = self.net(Tensor(self.model.x)).asnumpy()
        scale = max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * scale)
        assert mp.active_adapters(self.net) == self.model.active

    def step(self) -> str:
        """Do one operation, chosen at random, and compare."""
        names = list(self.model.adapters)
        kinds = ["add", "load", *(["switch", "weigh", "mix", "delete", "train", "merge", "save"] if names else [])]
        kind = str(self.rng.choice(kinds))
        getattr(self, kind)(names)
        self.check()
        return kind

    def _new(self) -> tuple[str, int, float, list[str]]:
        self.count += 1
        return (f"a{self.count}", int(self.rng.integers(1, 5)), float(self.rng.integers(1, 9)),
                [["0"], ["1"], ["0", "1"]][int(self.rng.integers(3))])

    def _keep(self, name: str, rank: int, alpha: float, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        if not self.model.adapters:
            self.model.active = {name: 1.0}
        self.model.adapters[name] = {path: [a, b, alpha / rank] for path, (a, b) in pairs.items()}

    def add(self, names: list[str]) -> None:
        """Add a new adapter and give it values."""
        name, rank, alpha, targets = self._new()
        mp.add_adapter(self.net, name, mp.LoraConfig(rank, alpha, target_modules=targets))
        pairs = {path: self.model.pair(path, rank) for path in targets}
        cells = banks_of(self.net)
        for path, pair in pairs.items():
            cell = cells.get(path) or self.net[int(path)]
            found = cell.parameters_of(name) if path in cells else cell.delta_parameters()
            for parameter, value in zip(found.values(), pair):
                put(parameter, Tensor(value))
        self._keep(name, rank, alpha, pairs)

    def load(self, names: list[str]) -> None:
        """Load an adapter from a file; where the room is too small nothing changes."""
        name, rank, alpha, targets = self._new()
        pairs = {path: self.model.pair(path, rank) for path in targets}
        state = AdapterState("lora", {path: LayerState({A: a, B: b}, {"lora_rank": rank, "lora_alpha": alpha,
                                                                      "lora_dropout": 0.0})
                                      for path, (a, b) in pairs.items()})
        write_files(to_files(state, "peft", Path(name)))
        try:
            mp.load_adapter(self.net, name, name=name)
        except ValueError as error:
            assert "does not fit the room" in str(error), error
            return
        self._keep(name, rank, alpha, pairs)

    def switch(self, names: list[str]) -> None:
        """Let one count, or none."""
        name = str(self.rng.choice(names))
        if self.rng.random() < 0.2:
            mp.set_adapter(self.net, {})
            self.model.active = {}
            return
        mp.set_adapter(self.net, name)
        self.model.active = {name: 1.0}

    def weigh(self, names: list[str]) -> None:
        """Let several count, each with its weight."""
        chosen = [name for name in names if self.rng.random() < 0.6] if banks_of(self.net) else names[:1]
        self.model.active = {name: float(np.round(self.rng.normal(), 2)) for name in chosen}
        mp.set_adapter(self.net, self.model.active)

    def mix(self, names: list[str]) -> None:
        """Give each sample another."""
        chosen = [None if self.rng.random() < 0.3 else str(self.rng.choice(names)) for _ in range(SAMPLES)]
        with mp.adapters_for_samples(self.net, chosen):
            self.check([{} if name is None else {name: 1.0} for name in chosen])

    def delete(self, names: list[str]) -> None:
        """Take one out; the only one of a net without room stays."""
        name = str(self.rng.choice(names))
        try:
            mp.delete_adapter(self.net, name)
        except ValueError as error:
            assert "merge() it" in str(error) and not banks_of(self.net), error
            return
        self.model.adapters.pop(name)
        self.model.active.pop(name, None)

    def train(self, names: list[str]) -> None:
        """Move all that trains, as an optimizer would; it is one adapter's at most."""
        owners = {name for name in names for cell in banks_of(self.net).values() if name in cell.slots
                  for item in cell.parameters_of(name).values() if item.requires_grad}
        trains = self.net.trainable_params()
        if not banks_of(self.net):
            owners = set(names) if trains else set()
        assert len(owners) <= 1 and (bool(owners) == bool(trains))
        for parameter in trains:
            put(parameter, Tensor(parameter.asnumpy() * np.float32(0.5)))
        for name in owners:
            for entry in self.model.adapters[name].values():
                entry[0], entry[1] = entry[0] * np.float32(0.5), entry[1] * np.float32(0.5)

    def merge(self, names: list[str]) -> None:
        """Merge what counts, compare, and take it out again."""
        before = {item.name: item.asnumpy().tobytes() for item in self.net.get_parameters()}
        mp.merge(self.net)
        wanted = self.model.output([self.model.active] * SAMPLES)
        np.testing.assert_allclose(self.net(Tensor(self.model.x)).asnumpy(), wanted, rtol=0,
                                   atol=2e-5 * max(1.0, np.abs(wanted).max()))
        mp.unmerge(self.net)
        assert {item.name: item.asnumpy().tobytes() for item in self.net.get_parameters()} == before

    def save(self, names: list[str]) -> None:
        """Write one and read the file."""
        name = str(self.rng.choice(names))
        mp.save_adapter(self.net, f"saved_{name}", name=name)
        state = read_adapter(Path(f"saved_{name}")).state
        assert set(state.layers) == set(self.model.adapters[name])
        for path, (a, b, scale) in self.model.adapters[name].items():
            settings = state.layers[path].settings or {}
            assert settings["lora_alpha"] / settings["lora_rank"] == scale
            assert np.array_equal(state.layers[path].tensors[A], a)
            assert np.array_equal(state.layers[path].tensors[B], b)


def run(sequences: int, steps: int = 12, first: int = 0) -> dict[str, int]:
    """Run so many sequences; return how often each operation was done."""
    counts: dict[str, int] = {}
    for seed in range(first, first + sequences):
        done: list[str] = []
        try:
            sequence = Sequence(seed)
            for _ in range(steps):
                done.append(sequence.step())
        except Exception as error:
            raise AssertionError(f"seed {seed} after {done}, adapters {named(sequence.net).names}: {error}") from error
        for kind in done:
            counts[kind] = counts.get(kind, 0) + 1
    return counts


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(run(int(sys.argv[1])))
