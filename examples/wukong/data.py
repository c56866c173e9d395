"""Images with captions: a folder of images and a list of them in Wukong's format or in Hugging Face's.

Wukong's are CSV files with the columns ``dir,text``: an image's path relative to the folder, and its caption. Hugging
Face's is one file ``metadata.jsonl``, a JSON object on each line with ``file_name`` and ``text``. Numpy and Pillow
only, so that data can be read and tested without MindSpore.
"""
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

COLUMNS = ("dir", "text")
METADATA = "metadata.jsonl"


class DataError(Exception):
    """Data that cannot be used; the text is one sentence for the user."""


class Sample(NamedTuple):
    """One row of a caption file: the image, its caption, and where the row stands (``captions.csv line 3``)."""

    path: Path
    text: str
    where: str


def read_captions(folder: str | Path) -> tuple[list[Sample], list[str]]:
    """Reads every ``*.csv`` of a folder, in the order of their names, and ``metadata.jsonl``.

    Args:
        folder: The folder with these files; image paths are relative to it and may not leave it.

    Returns:
        The good rows in file order, and one message for each row that was skipped, naming file and line.

    Raises:
        DataError: No such folder, none of these files in it, a file that is not UTF-8, a CSV header without ``dir`` and
            ``text``, or not a single good row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}: expected a folder with images and a CSV file (columns dir,text)")
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and (
        file.suffix.lower() == ".csv" or file.name == METADATA))
    if not files:
        raise DataError(f"no CSV file in {folder}: expected at least one *.csv with the columns dir,text, or "
                        f"{METADATA} with file_name and text")
    samples: list[Sample] = []
    skipped: list[str] = []
    for file in files:
        (_read_json_lines if file.name == METADATA else _read_csv)(file, samples, skipped)
    if not samples:
        raise _nothing_usable(folder, skipped)
    return samples, skipped


def _nothing_usable(folder: Path, skipped: list[str]) -> DataError:
    first = f", the first: {skipped[0]}" if skipped else ""
    return DataError(f"not a single usable row in the CSV files of {folder} ({len(skipped)} skipped{first})")


def _read_lines(file: Path) -> list[str]:
    """The lines of a text file."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return list(stream)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _read_csv(file: Path, samples: list[Sample], skipped: list[str]) -> None:
    """Appends the good rows of one CSV file to ``samples`` and what is wrong with the others to ``skipped``."""
    lines = _read_lines(file)
    rows = _rows(lines)
    _, header = next(rows, (1, []))
    columns = [] if isinstance(header, csv.Error) else [name.strip() for name in header]
    if any(columns.count(name) != 1 for name in COLUMNS):
        found = lines[0].strip()[:80] if lines else "an empty file"
        raise DataError(f"{file}: expected a first line with the columns dir,text, found {found!r}")
    for line, row in rows:
        where = f"{file.name} line {line}"
        try:
            samples.append(_sample(file.parent, *_fields(columns, row), where))
        except DataError as error:
            skipped.append(f"{where}: {error}")


def _read_json_lines(file: Path, samples: list[Sample], skipped: list[str]) -> None:
    """The same for a file with a JSON object on each line."""
    for line, text in enumerate(_read_lines(file), start=1):
        where = f"{file.name} line {line}"
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            samples.append(_sample(file.parent, row["file_name"], row["text"], where))
        except DataError as error:
            skipped.append(f"{where}: {error}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            skipped.append(f"{where}: not a JSON object with the texts file_name and text")


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


def _fields(columns: list[str], row: list[str] | csv.Error) -> list[str]:
    """The path and the text of one row."""
    if isinstance(row, csv.Error):
        raise DataError(f"not CSV ({row})")
    if len(row) != len(columns):
        raise DataError(f"expected {len(columns)} values, found {len(row)} (a text with a comma stands in quotes)")
    return [row[columns.index(column)] for column in COLUMNS]


def _sample(folder: Path, name: str, text: str, where: str) -> Sample:
    """Checks one row. Raises DataError with what is wrong with it."""
    name, text = (" ".join(value.strip().splitlines()) for value in (name, text))
    if not name or not text:
        raise DataError(f"no value for {'text' if name else 'the image'}")
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


def load_image(path: str | Path, height: int, width: int) -> np.ndarray:
    """Reads an image as the network wants it.

    The largest part in the middle that has the shape asked for is cut out and scaled; for a square that is the part
    that Wukong's SmallestMaxSize and CenterCrop keep. Where the part has the size already the pixels stay as they are.
    Transparency is laid on white.

    Args:
        path: Any format that Pillow reads, in any colour mode.
        height: Height of the result in pixels.
        width: Its width.

    Returns:
        float32 of shape (3, height, width), ``x / 127.5 - 1`` of the RGB bytes, so within [-1, 1].

    Raises:
        DataError: The file cannot be read as an image.
    """
    image = _open_image(path)
    scale = min(image.width / width, image.height / height)
    box_width, box_height = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = (image.width - box_width) // 2, (image.height - box_height) // 2
    part = image.crop((left, top, left + box_width, top + box_height))
    part = part.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray((np.asarray(part, np.float32) / 127.5 - 1).transpose(2, 0, 1))


def _open_image(path: str | Path) -> Image.Image:
    """An image in RGB, turned as its camera was held."""
    try:
        with Image.open(path) as opened:
            return _on_white(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable image {path}: {error}") from None


def _on_white(image: Image.Image) -> Image.Image:
    """Converts any image to RGB."""
    if image.mode.startswith("I"):  # 16-bit greys: Pillow's own conversion would clip them at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


class Pictures(NamedTuple):
    """Images of one shape with their captions: images is float32 (n, 3, height, width), texts are n."""

    images: np.ndarray
    texts: list[str]


def bucket_shapes(side: int, count: int, multiple: int) -> list[tuple[int, int]]:
    """The shapes (height, width) that images are sorted into, from wide to tall.

    Args:
        side: No shape has more pixels than a square of this side.
        count: How many; 1 is the square alone. Some may fall together.
        multiple: Heights and widths are multiples of this, which the models ask for.
    """
    exponents = [2 * i / (count - 1) - 1 for i in range(count)] if count > 1 else [0.0]
    shapes = []
    for exponent in exponents:
        short = max(multiple, int(side * 2 ** (-abs(exponent) / 2) / multiple + 1e-6) * multiple)
        long = max(multiple, min(2 * side, side * side // short) // multiple * multiple)
        shapes.append((short, long) if exponent < 0 else (long, short))
    return list(dict.fromkeys(shapes))


def load_buckets(folder: str | Path, shapes: list[tuple[int, int]]) -> tuple[list[Pictures], list[str]]:
    """Reads a whole folder of captioned images into memory, each image in the shape nearest to its own.

    Args:
        folder: See :func:`read_captions`.
        shapes: The (height, width) to choose from.

    Returns:
        The pictures of each shape that has any, and a message for each row skipped.

    Raises:
        DataError: As :func:`read_captions`, or not a single image is readable.
    """
    samples, skipped = read_captions(folder)
    found: dict[tuple[int, int], tuple[list[np.ndarray], list[str]]] = {shape: ([], []) for shape in shapes}
    for sample in samples:
        try:
            image = _open_image(sample.path)
            shape = min(shapes, key=lambda one: abs(np.log(one[0] / one[1] * image.width / image.height)))
            found[shape][0].append(load_image(sample.path, *shape))
            found[shape][1].append(sample.text)
        except DataError as error:
            skipped.append(f"{sample.where}: {error}")
    buckets = [Pictures(np.stack(images), texts) for images, texts in found.values() if images]
    if not buckets:
        raise _nothing_usable(Path(folder), skipped)
    return buckets, skipped


def load_folder(folder: str | Path, size: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Reads a whole folder of captioned images as squares: images (n, 3, size, size), captions, and what was skipped.

    Raises:
        DataError: As :func:`load_buckets`.
    """
    (pictures,), skipped = load_buckets(folder, [(size, size)])
    return pictures.images, pictures.texts, skipped
