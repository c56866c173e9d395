"""Images with captions in Wukong's format: a folder of images and CSV files with the columns ``dir,text``.

``dir`` is an image's path relative to the folder, ``text`` its caption. Numpy and Pillow only, so that data can be read
and tested without MindSpore.
"""
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

COLUMNS = ("dir", "text")


class DataError(Exception):
    """Data that cannot be used; the text is one sentence for the user."""


class Sample(NamedTuple):
    """One row of a caption file: the image, its caption, and where the row stands (``captions.csv line 3``)."""

    path: Path
    text: str
    where: str


def read_captions(folder: str | Path) -> tuple[list[Sample], list[str]]:
    """Reads every ``*.csv`` of a folder, in the order of their names.

    Args:
        folder: The folder with the CSV files; image paths are relative to it and may not leave it.

    Returns:
        The good rows in file order, and one message for each row that was skipped, naming file and line.

    Raises:
        DataError: No such folder, no CSV file in it, a file that is not UTF-8, a header without ``dir`` and ``text``,
            or not a single good row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}: expected a folder with images and a CSV file (columns dir,text)")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".csv" and not file.name.startswith("."))
    if not files:
        raise DataError(f"no CSV file in {folder}: expected at least one *.csv with the columns dir,text")
    samples: list[Sample] = []
    skipped: list[str] = []
    for file in files:
        _read_file(file, samples, skipped)
    if not samples:
        raise _nothing_usable(folder, skipped)
    return samples, skipped


def _nothing_usable(folder: Path, skipped: list[str]) -> DataError:
    first = f", the first: {skipped[0]}" if skipped else ""
    return DataError(f"not a single usable row in the CSV files of {folder} ({len(skipped)} skipped{first})")


def _read_file(file: Path, samples: list[Sample], skipped: list[str]) -> None:
    """Appends the good rows of one CSV file to ``samples`` and what is wrong with the others to ``skipped``."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(stream)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    rows = _rows(lines)
    _, header = next(rows, (1, []))
    columns = [] if isinstance(header, csv.Error) else [name.strip() for name in header]
    if any(columns.count(name) != 1 for name in COLUMNS):
        found = lines[0].strip()[:80] if lines else "an empty file"
        raise DataError(f"{file}: expected a first line with the columns dir,text, found {found!r}")
    for line, row in rows:
        where = f"{file.name} line {line}"
        try:
            samples.append(_sample(file.parent, columns, row, where))
        except DataError as error:
            skipped.append(f"{where}: {error}")


def _rows(lines: list[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yields (line number, fields or what is wrong) of every row that is not blank.

    After an error reading goes on at the next line: a quote left open costs its own row and not the rest of the file.
    """
    start = 0
    while start < len(lines):
        reader = csv.reader(lines[start:], strict=True)
        line = start
        try:
            for row in reader:
                if row:
                    yield line + 1, row
                line = start + reader.line_num
            return
        except csv.Error as error:
            yield line + 1, error
            start = line + 1


def _sample(folder: Path, columns: list[str], row: list[str] | csv.Error, where: str) -> Sample:
    """Checks one row. Raises DataError with what is wrong with it."""
    if isinstance(row, csv.Error):
        raise DataError(f"not CSV ({row})")
    if len(row) != len(columns):
        raise DataError(f"expected {len(columns)} values, found {len(row)} (a text with a comma stands in quotes)")
    name, text = (" ".join(row[columns.index(column)].strip().splitlines()) for column in COLUMNS)
    if not name or not text:
        raise DataError(f"no value for {'text' if name else 'dir'}")
    try:
        path = (folder / name.replace("\\", "/")).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name[:80]!r} is no path ({error})") from None
    if not inside:
        raise DataError(f"{name} leaves the data folder")
    if not there:
        raise DataError(f"no image {name}")
    return Sample(path, text, where)


def load_image(path: str | Path, size: int) -> np.ndarray:
    """Reads an image as the network wants it.

    The middle square is cut out and scaled to ``size``: the part that Wukong's SmallestMaxSize and CenterCrop keep.
    Where the smallest side is ``size`` already the pixels stay as they are. Transparency is laid on white.

    Args:
        path: Any format that Pillow reads, in any colour mode.
        size: Width and height of the result in pixels.

    Returns:
        float32 of shape (3, size, size), ``x / 127.5 - 1`` of the RGB bytes, so within [-1, 1].

    Raises:
        DataError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as opened:
            image = _on_white(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable image {path}: {error}") from None
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray((np.asarray(square, np.float32) / 127.5 - 1).transpose(2, 0, 1))


def _on_white(image: Image.Image) -> Image.Image:
    """Converts any image to RGB."""
    if image.mode.startswith("I"):  # 16-bit greys: Pillow's own conversion would clip them at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def load_folder(folder: str | Path, size: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Reads a whole folder of captioned images into memory.

    Args:
        folder: See :func:`read_captions`.
        size: See :func:`load_image`.

    Returns:
        Images (n, 3, size, size) in float32, their n captions, and a message for each row skipped.

    Raises:
        DataError: As :func:`read_captions`, or not a single image is readable.
    """
    samples, skipped = read_captions(folder)
    images, texts = [], []
    for sample in samples:
        try:
            images.append(load_image(sample.path, size))
            texts.append(sample.text)
        except DataError as error:
            skipped.append(f"{sample.where}: {error}")
    if not images:
        raise _nothing_usable(Path(folder), skipped)
    return np.stack(images), texts, skipped


def epochs(n: int, batch: int, seed: int, first_step: int = 0) -> Iterator[np.ndarray]:
    """Yields the indices of one batch after the other, without end.

    The batches are cut from one endless row of epochs, each a new shuffle of all n: every index comes once per epoch,
    and the last batch of an epoch is filled up from the next one, so that its shape never changes.

    Args:
        n: Number of samples.
        batch: Samples per batch; may be more than n.
        seed: The same seed gives the same batches.
        first_step: Number of batches to leave out: a run resumed at a step gets the batches it would have got.

    Raises:
        ValueError: ``n`` or ``batch`` below 1, or ``seed`` or ``first_step`` below 0.
    """
    for name, value, least in (("n", n, 1), ("batch", batch, 1), ("seed", seed, 0), ("first_step", first_step, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    return _batches(n, batch, seed, first_step)


def _batches(n: int, batch: int, seed: int, step: int) -> Iterator[np.ndarray]:
    while True:
        start, stop = step * batch, (step + 1) * batch
        first, last = start // n, (stop - 1) // n
        orders = [np.random.default_rng([seed, epoch]).permutation(n) for epoch in range(first, last + 1)]
        yield np.concatenate(orders)[start - first * n:stop - first * n]
        step += 1
