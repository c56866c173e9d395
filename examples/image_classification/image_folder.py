"""A folder of pictures with a folder for each class, as the nets want it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from image_common import DataError, UserError, explained, load_image

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# The net's authors': pixels from 0 to 255 less 127, divided by 128.
MEAN, SCALE = 127.0, 128.0
HELDOUT_SHARE = 0.2


class Pictures(NamedTuple):
    """Paths of pictures and the number of each one's class."""

    paths: list[Path]
    labels: np.ndarray


def read_folder(folder: Path, least: int, classes: Sequence[str] = ()) -> tuple[list[str], Pictures]:
    """Finds the pictures of a folder, by class; none is opened.

    Args:
        folder: With a folder for each class; what is no picture by its ending is passed over.
        least: Pictures that each class must have.
        classes: That it must have; without, its own, in the order of their names.

    Returns:
        The classes and their pictures.

    Raises:
        UserError: There is no such folder, fewer than two classes, or too few pictures of one.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give a folder with a folder of pictures for each class")
    found = {one.name: sorted(path for path in one.iterdir() if path.suffix.lower() in KINDS)
             for one in sorted(folder.iterdir()) if one.is_dir() and not one.name.startswith(".")}
    found = {name: paths for name, paths in found.items() if paths or name in classes}
    if not found:
        raise UserError(f"{folder} has no folder with pictures ({', '.join(sorted(KINDS))}): give a folder with one "
                        "for each class")
    if classes and set(found) != set(classes):
        name = min(set(found) ^ set(classes))
        raise UserError(f"{folder} must have the classes of the training pictures, and {name} is in one of the two "
                        "only")
    if len(found) < 2:
        raise UserError(f"{folder} has one class, {next(iter(found))}: it needs at least two folders with pictures")
    few = [name for name, paths in found.items() if len(paths) < least]
    if few:
        raise UserError(f"the class {few[0]} in {folder} has {len(found[few[0]])} pictures: it needs at least {least}")
    names = list(classes) or list(found)
    pairs = [(path, names.index(name)) for name in names for path in found[name]]
    return names, Pictures([path for path, _ in pairs], np.array([label for _, label in pairs], np.int32))


def divide(pictures: Pictures, seed: int) -> tuple[Pictures, Pictures]:
    """Sets a fifth of each class apart, one at least: what is trained on, and what is held out."""
    rng, held = np.random.default_rng(seed), np.zeros(len(pictures.paths), bool)
    for label in range(pictures.labels.max() + 1):
        places = np.flatnonzero(pictures.labels == label)
        held[rng.permutation(places)[:max(1, round(HELDOUT_SHARE * len(places)))]] = True
    return tuple(Pictures([path for path, one in zip(pictures.paths, part) if one], pictures.labels[part])
                 for part in (~held, held))


def load(paths: Sequence[Path], size: int) -> np.ndarray:
    """Reads pictures: the largest square in the middle, normalised: (n, 3, size, size) float32.

    Raises:
        UserError: One cannot be read.
    """
    with explained("take the file out of the folder, or save it again", DataError):
        return np.stack([((load_image(path, size, size) + 1) * 127.5 - MEAN) / SCALE for path in paths]
                        ).astype(np.float32)


def varied(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures as training sees them: half of them mirrored, each moved by up to a tenth, the edge drawn on."""
    size, most = pictures.shape[-1], pictures.shape[-1] // 10
    made = []
    for one in pictures:
        wide = np.pad(one[..., ::-1] if rng.random() < 0.5 else one, ((0, 0), (most, most), (most, most)), "edge")
        down, right = rng.integers(0, 2 * most + 1, 2)
        made.append(wide[:, down:down + size, right:right + size])
    return np.stack(made)
