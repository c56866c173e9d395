"""Pictures and captions as the U-Net reads them, computed once; the batches that training takes from them."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pipeline
from base import Base
from data import Pictures
from diffusion import draw_noise
from errors import UserError
from settings import Settings
from whole_files import write_atomically

from mindpet_lite import BatchSampler


@dataclass(frozen=True)
class Examples:
    """Latents (views, n, C, h, w), with a view for an image and one for its mirror image; text (n, L, D) or ids (n, L).

    The text is ids where the text encoder trains, and else what it makes of them.
    """

    latents: np.ndarray
    text: np.ndarray


def encode(base: Base, pictures: Pictures, settings: Settings, flip: bool) -> Examples:
    """Runs the frozen models once for all steps to come."""
    views = [pictures.images] + ([np.ascontiguousarray(pictures.images[..., ::-1])] if flip else [])
    return Examples(np.stack([cached_latents(base, images, settings.latent_cache) for images in views]),
                    read_texts(base, pictures.texts, settings))


def read_texts(base: Base, texts: list[str], settings: Settings) -> np.ndarray:
    """Ids (n, L) where the text encoder trains, else its vectors (n, L, D)."""
    if settings.train_text_encoder:
        return np.array([base.tokenizer(text) for text in texts], np.int32)
    return pipeline.embed_texts(base, texts)


def cached_latents(base: Base, images: np.ndarray, folder: Path | None) -> np.ndarray:
    """The latents of images, from the folder where they stand already, else computed and put there.

    A file's name is a hash of the images and of the encoder's weights, so another base or other data never meet.
    """
    if folder is None:
        return pipeline.encode_images(base, images)
    digest = hashlib.sha256(images.tobytes() + repr(images.shape).encode() + repr(base.scale_factor).encode())
    for path, parameter in base.autoencoder.parameters_and_names():
        digest.update(path.encode() + parameter.asnumpy().tobytes())
    file = folder / f"{digest.hexdigest()[:32]}.npy"
    try:
        return np.load(file, allow_pickle=False)
    except FileNotFoundError:
        latents = pipeline.encode_images(base, images)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete it") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: path.write_bytes(as_npy(latents)))
    return latents


def as_npy(array: np.ndarray) -> bytes:
    """The content of a file of NumPy's."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


class BucketSampler:
    """Endless batches, each from one bucket; every row of every bucket comes once in an epoch.

    What a step gets follows from the seed and the step alone, so a run that goes on gets what it would have got.

    Args:
        counts: Rows of each bucket.
        batch_size: Rows of a batch of this process.
        seed: The same seed gives the same batches.
        rank: Number of this process.
        ranks: Number of processes, which share batches.

    Attributes:
        step: Batches given so far; set it to go on from there.
    """

    def __init__(self, counts: list[int], batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.samplers = [BatchSampler(count, batch_size, seed, rank, ranks) for count in counts]
        self.turns = np.repeat(np.arange(len(counts)), [-(-count // (batch_size * ranks)) for count in counts])
        self.seed, self.step = seed, 0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return self

    def __next__(self) -> tuple[int, np.ndarray]:
        """The number of a bucket, and the numbers of its rows."""
        epoch, place = divmod(self.step, len(self.turns))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.turns)
        bucket = int(order[place])
        sampler = self.samplers[bucket]
        sampler.step = epoch * int((self.turns == bucket).sum()) + int((order[:place] == bucket).sum())
        self.step += 1
        return bucket, next(sampler)


class Batches:
    """Endless training batches: latents, text, timesteps and noise.

    All that is random follows from the seed and the step. Each process draws what one process would draw for the whole
    batch, and takes its share of it.

    Args:
        base: The models.
        buckets: Examples of each shape.
        class_examples: DreamBooth's class images; as many of them stand in the second half of each batch.
        settings: Of the run.
        rank: Number of this process.
        ranks: Number of processes.
    """

    def __init__(self, base: Base, buckets: list[Examples], class_examples: Examples | None, settings: Settings,
                 rank: int, ranks: int) -> None:
        size, seed = settings.batch_size, settings.seed
        self.base, self.buckets, self.class_examples, self.settings = base, buckets, class_examples, settings
        self.rank, self.ranks = rank, ranks
        self.sampler = BucketSampler([len(one.text) for one in buckets], size, seed, rank, ranks)
        self.class_sampler = BatchSampler(len(class_examples.text), size, seed + 1, rank, ranks) \
            if class_examples else None
        self.empty = read_texts(base, [""], settings)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the batch of the sampler's step, and the ones after it."""
        while True:
            step = self.sampler.step
            bucket, rows = next(self.sampler)
            parts = [self.examples_of(self.buckets[bucket], rows, step)]
            if self.class_examples and self.class_sampler:
                self.class_sampler.step = step
                parts.append(self.examples_of(self.class_examples, next(self.class_sampler), step, part=1))
            yield tuple(np.concatenate(arrays) for arrays in zip(*parts))

    def examples_of(self, examples: Examples, rows: np.ndarray, step: int, part: int = 0) -> tuple[np.ndarray, ...]:
        """Latents, text, timesteps and noise of some rows at a step."""
        rng = np.random.default_rng([self.settings.seed, 2 + part, step])
        whole = self.settings.batch_size * self.ranks
        share = slice(self.rank * self.settings.batch_size, (self.rank + 1) * self.settings.batch_size)
        shape = (whole, *examples.latents.shape[2:])
        timesteps, noise = draw_noise(rng, shape, self.base.schedule, self.settings.noise_offset)
        views = rng.integers(0, len(examples.latents), whole)[share]
        text = examples.text[rows]
        dropped = (rng.random(whole) < self.settings.caption_dropout)[share].reshape(-1, *[1] * (text.ndim - 1))
        return (examples.latents[views, rows], np.where(dropped, self.empty, text), timesteps[share], noise[share])
