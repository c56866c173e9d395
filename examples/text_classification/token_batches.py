"""Sentences as ids in batches of few shapes: each sentence goes into the shortest length that holds it."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bert import TOKENIZER
from tokenizers import Tokenizer
from user_errors import UserError

Batch = tuple[np.ndarray, np.ndarray]


class Encoded(NamedTuple):
    """Sentences as ids, padded to the longest length, with the number of tokens of each; and how many were cut."""

    ids: np.ndarray
    counts: np.ndarray
    cut: int

    def batch(self, rows: np.ndarray, length: int) -> Batch:
        """Ids int32 and mask float32, both (rows, length)."""
        places = np.arange(length)[None]
        return self.ids[rows, :length], (places < self.counts[rows, None]).astype(np.float32)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json of a base.

    Raises:
        UserError: It is missing or broken.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise UserError(f"{path} is missing: run prepare.py first, or give a folder that has it with --base")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} is no tokenizer: {error}") from error
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], longest: int) -> Encoded:
    """Tokenizes sentences; a longer one loses its end, and keeps the closing token."""
    tokenizer.no_truncation()
    whole = [len(one.ids) for one in tokenizer.encode_batch(texts)]
    tokenizer.enable_truncation(longest)
    ids = np.zeros((len(texts), longest), np.int32)
    counts = np.zeros(len(texts), np.int32)
    for row, one in enumerate(tokenizer.encode_batch(texts)):
        ids[row, :len(one.ids)], counts[row] = one.ids, len(one.ids)
    return Encoded(ids, counts, sum(count > longest for count in whole))


def bucket_of(counts: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """The number of the shortest length that holds each sentence."""
    return np.searchsorted(np.array(lengths), counts)


def epoch(counts: np.ndarray, lengths: tuple[int, ...], size: int, rng: np.random.Generator
          ) -> list[tuple[int, np.ndarray]]:
    """The batches of one epoch, each of `size` rows and one length: (length, rows).

    Every row comes once. What does not fill a batch of its length goes into the next longer one; the last batch is
    filled with rows that come twice.
    """
    order, batches = rng.permutation(len(counts)), []
    buckets, rest = bucket_of(counts, lengths)[order], np.zeros(0, np.int64)
    for bucket, length in enumerate(lengths):
        rows = np.concatenate([rest, order[buckets == bucket]])
        whole = len(rows) // size * size
        batches += [(length, part) for part in rows[:whole].reshape(-1, size)]
        rest = rows[whole:]
    if len(rest):
        batches.append((lengths[-1], np.resize(np.concatenate([rest, order]), size)))
    return [batches[i] for i in rng.permutation(len(batches))]


def training_batches(counts: np.ndarray, lengths: tuple[int, ...], size: int, epochs: int, seed: int
                     ) -> Iterator[tuple[int, np.ndarray]]:
    """The batches of all epochs; each epoch's follow from the seed and its number alone."""
    for number in range(epochs):
        yield from epoch(counts, lengths, size, np.random.default_rng([seed, 2, number]))


def in_order(counts: np.ndarray, lengths: tuple[int, ...], size: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """All rows once, for evaluation: (length, rows, how many of them count); the others fill the batch."""
    buckets = bucket_of(counts, lengths)
    for bucket, length in enumerate(lengths):
        rows = np.flatnonzero(buckets == bucket)
        for start in range(0, len(rows), size):
            part = rows[start:start + size]
            yield length, np.resize(part, size), len(part)
