"""Samples as ids in a few fixed shapes, and the batches that training takes from them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from chat import Chat
from common import UserError, sentence
from instructions import Sample

from mindpet_lite import BatchSampler

# Room for answers is a multiple of this.
ROOM = 16


@dataclass(frozen=True)
class Bucket:
    """Samples that are padded to one length.

    Args:
        length: In tokens.
        ids: (n, length), int32.
        places: Of each sample, the positions before a token of its answers.
    """

    length: int
    ids: np.ndarray
    places: list[np.ndarray]

    def room(self, batch: int) -> int:
        """Tokens of answers that any batch has at most."""
        largest = sorted((len(one) for one in self.places), reverse=True)
        most = sum(largest[:batch]) + largest[0] * max(0, batch - len(largest))
        return math.ceil(most / ROOM) * ROOM

    def seen(self, row: int) -> np.ndarray:
        """Which places (length,) of a sample stand before the end of its last answer; none for -1."""
        return np.arange(self.length) < (self.places[row][-1] + 2 if row >= 0 else 0)

    def batch(self, rows: Sequence[int], room: int, total: float) -> tuple[np.ndarray, ...]:
        """The inputs of `decoder.AnswerLoss`; -1 is a row of padding alone."""
        ids = np.zeros((len(rows), self.length), np.int32)
        places, labels = np.zeros(room, np.int32), np.zeros(room, np.int32)
        real = np.zeros((room, 1), np.float32)
        used = 0
        for i, row in enumerate(rows):
            if row < 0:
                continue
            ids[i] = self.ids[row]
            own = slice(used, used + len(self.places[row]))
            places[own] = i * self.length + self.places[row]
            labels[own] = self.ids[row][self.places[row] + 1]
            real[own] = 1
            used = own.stop
        return ids, places, labels, real, np.float32(total)


def encode(samples: Sequence[Sample], chat: Chat, lengths: Sequence[int], least: int = 1
           ) -> tuple[list[Bucket], dict[str, str]]:
    """Sorts samples into buckets.

    Args:
        samples: The chats.
        chat: Makes ids of them.
        lengths: Of the buckets; a longer sample is left out.
        least: A bucket of fewer samples is joined with the next longer one: each costs a compilation.

    Returns:
        The buckets that hold something, and why each sample was left out, by where it stands.

    Raises:
        UserError: None is left.
    """
    lengths = sorted(lengths)
    sorted_in: dict[int, list[tuple[list[int], np.ndarray]]] = {length: [] for length in lengths}
    skipped: dict[str, str] = {}
    for sample in samples:
        try:
            ids, marks = chat.tokens(sample.messages)
        except UserError as error:
            skipped[sample.where] = sentence(error)
            continue
        length = next((length for length in lengths if length >= len(ids)), None)
        # What predicts a token stands one place before it.
        places = np.flatnonzero(marks[1:])
        if length is None:
            skipped[sample.where] = f"{len(ids)} tokens, and the limit is {lengths[-1]}"
        elif not len(places):
            skipped[sample.where] = "no token of an answer is left"
        else:
            sorted_in[length].append((ids, places))
    for length, longer in zip(lengths, lengths[1:]):
        if 0 < len(sorted_in[length]) < least:
            sorted_in[longer] = sorted_in.pop(length) + sorted_in[longer]
            sorted_in[length] = []
    buckets = [bucket(length, sorted_in[length]) for length in lengths if sorted_in[length]]
    if not buckets:
        first = next(f"{where}: {why}" for where, why in skipped.items())
        raise UserError(f"not a single sample can be used ({len(skipped)} left out; the first: {first})")
    return buckets, skipped


def bucket(length: int, samples: list[tuple[list[int], np.ndarray]]) -> Bucket:
    """Samples padded to one length; no token before the padding sees it."""
    ids = np.zeros((len(samples), length), np.int32)
    for row, (own, _) in zip(ids, samples):
        row[:len(own)] = own
    return Bucket(length, ids, [places for _, places in samples])


class BucketSampler:
    """Endless batches, each from one bucket; every row of every bucket comes once in an epoch, at least.

    What a step gets follows from the seed and the step alone, so a run that goes on gets what it would have got.

    Args:
        counts: Rows of each bucket.
        batch_size: Rows of a batch of this process.
        seed: The same seed gives the same batches.
        rank: Number of this process.
        ranks: Number of processes, which share batches.

    Attributes:
        step: Batches given so far; set it to go on from there.
        epoch: Batches of an epoch.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.samplers = [BatchSampler(count, batch_size, seed, rank, ranks) for count in counts]
        self.turns = np.repeat(np.arange(len(counts)), [-(-count // (batch_size * ranks)) for count in counts])
        self.seed, self.step, self.epoch = seed, 0, len(self.turns)

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """The number of a bucket, and the numbers of its rows, at a step."""
        epoch, place = divmod(step, len(self.turns))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.turns)
        chosen = int(order[place])
        sampler = self.samplers[chosen]
        sampler.step = epoch * int((self.turns == chosen).sum()) + int((order[:place] == chosen).sum())
        return chosen, next(sampler)


class Batches:
    """The inputs of the training step, from the sampler's step on.

    The loss of a step is the sum over its answers' tokens, over the mean number of these in the steps that make one
    update together. So an update is the mean over all its tokens, whichever batch they stand in.

    Args:
        buckets: The samples.
        batch_size: Rows of a batch of this process.
        accumulation: Steps that make one update.
        steps: Of the training.
        seed: Of the order.
        rank: Number of this process.
        ranks: Number of processes.
    """

    def __init__(self, buckets: Sequence[Bucket], batch_size: int, accumulation: int, steps: int, seed: int,
                 rank: int = 0, ranks: int = 1) -> None:
        counts = [len(one.places) for one in buckets]
        self.buckets, self.accumulation, self.steps, self.ranks = buckets, accumulation, steps, ranks
        self.sampler = BucketSampler(counts, batch_size, seed, rank, ranks)
        # All processes' rows together, by which the number of tokens is counted.
        self.together = BucketSampler(counts, batch_size * ranks, seed)
        self.rooms = [one.room(batch_size) for one in buckets]

    def tokens(self, step: int) -> int:
        """Tokens of answers in a step of all processes."""
        chosen, rows = self.together.at(step)
        return sum(len(self.buckets[chosen].places[row]) for row in rows)

    def total(self, step: int) -> float:
        """The mean number of tokens, for each process and step, of the update that a step belongs to."""
        first = step - step % self.accumulation
        window = range(first, min(first + self.accumulation, max(self.steps, step + 1)))
        return sum(map(self.tokens, window)) / (len(window) * self.ranks)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the inputs of each step up to the last."""
        while self.sampler.step < self.steps:
            step = self.sampler.step
            chosen, rows = self.sampler.at(step)
            self.sampler.step = step + 1
            yield self.buckets[chosen].batch(rows, self.rooms[chosen], self.total(step))


def in_order(buckets: Sequence[Bucket], batch_size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields all samples once; the last batch of a bucket is filled with rows of padding."""
    for one in buckets:
        room = one.room(batch_size)
        for start in range(0, len(one.places), batch_size):
            rows = np.arange(start, start + batch_size)
            rows[rows >= len(one.places)] = -1
            count = sum(len(one.places[row]) for row in rows if row >= 0)
            yield one.batch(rows, room, count)


def drawn(buckets: Sequence[Bucket], count: int, batch_size: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Some samples as batches of ids and "attention_mask", both (batch_size, length); the rest of a batch is padding.

    Args:
        buckets: The samples.
        count: How many of them, drawn by the seed; all where there are fewer.
        batch_size: Rows of a batch.
        seed: Of the drawing.
    """
    every = [(one, row) for one in buckets for row in range(len(one.places))]
    chosen = sorted(np.random.default_rng(seed).permutation(len(every))[:count])
    found = []
    for one in buckets:
        own = [row for bucket_of, row in (every[i] for i in chosen) if bucket_of is one]
        for start in range(0, len(own), batch_size):
            rows = (own[start:start + batch_size] + [-1] * batch_size)[:batch_size]
            found.append({"ids": one.ids[rows], "attention_mask": np.stack([one.seen(row) for row in rows])})
    return found
