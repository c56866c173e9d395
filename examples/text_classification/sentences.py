"""Labelled sentences: reading a file of them, and dividing them into training, test and validation.

A file has one sentence a line, ``label<TAB>sentence``, in UTF-8.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from user_errors import UserError

LABELS = ("negative", "positive")
SHOWN = 3


class Sentences(NamedTuple):
    """Sentences with their labels, as numbers."""

    texts: list[str]
    labels: np.ndarray

    def rows(self, rows: np.ndarray) -> "Sentences":
        """Some of them."""
        return Sentences([self.texts[row] for row in rows], self.labels[rows])


@dataclass
class Skipped:
    """What a file has that cannot be used: how many lines for each reason, and the first of them."""

    counts: Counter = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, number: int, reason: str, detail: str = "") -> None:
        """Notes a line."""
        self.counts[reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(f"line {number}: {reason}{detail}")

    def __str__(self) -> str:
        """One sentence, or nothing where nothing was skipped."""
        if not self.counts:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        return f"skipped {sum(self.counts.values())} lines ({reasons}); the first: {'; '.join(self.first)}"


class Split(NamedTuple):
    """The three parts; no sentence is in two of them."""

    train: Sentences
    test: Sentences
    validation: Sentences


def normal(text: str) -> str:
    """What makes two sentences the same: their words, whatever case and spaces."""
    return " ".join(text.casefold().split())


def read_sentences(path: Path, names: tuple[str, ...]) -> tuple[Sentences, Skipped]:
    """Reads a file, without broken and empty lines, unknown labels, and sentences that came before.

    Args:
        path: The file.
        names: The labels, in the order of their numbers.

    Raises:
        UserError: The file is missing, or no line of it can be used.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run prepare.py first, or give a file with lines of label, tab and "
                        "sentence with --data") from None
    numbers, seen, skipped = {name: i for i, name in enumerate(names)}, set(), Skipped()
    texts, labels = [], []
    for number, line in enumerate(lines, 1):
        label, tab, text = line.rstrip("\r").partition("\t")
        text, label = text.strip(), label.strip()
        if not line.strip():
            if number < len(lines):
                skipped.add(number, "empty")
        elif not tab:
            skipped.add(number, "without a tab")
        elif not text:
            skipped.add(number, "without a sentence")
        elif label not in numbers:
            skipped.add(number, "with an unknown label", f" {label[:40]!r}")
        elif normal(text) in seen:
            skipped.add(number, "the same as before")
        else:
            seen.add(normal(text))
            texts.append(text)
            labels.append(numbers[label])
    if not texts:
        raise UserError(f"{path} has no line that can be used ({skipped or 'it is empty'}): expected label, tab and "
                        f"sentence, with the labels {', '.join(names)}")
    return Sentences(texts, np.array(labels, np.int32)), skipped


def split(sentences: Sentences, train: int, test: int, validation: int, seed: int) -> Split:
    """Divides sentences; those for validation are the same for every seed, so that no test ever has them.

    Args:
        sentences: Each of them once.
        train: How many to train on.
        test: How many to test on.
        validation: How many to choose settings on.
        seed: Another seed is another test and another training.

    Raises:
        UserError: There are too few, or the training has one label only.
    """
    count = len(sentences.texts)
    if train + test + validation > count:
        raise UserError(f"{count} sentences are too few for {train} to train on, {test} to test on and {validation} "
                        "for validation: lower --train-count, --test-count or --validation-count")
    order = np.random.default_rng(0).permutation(count)
    rest = np.random.default_rng([seed, 1]).permutation(order[validation:])
    parts = Split(*(sentences.rows(rows) for rows in (rest[test:test + train], rest[:test], order[:validation])))
    if len(set(parts.train.labels.tolist())) < 2:
        raise UserError(f"the {train} sentences to train on all have the same label: give others, or more")
    return parts
