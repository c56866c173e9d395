"""The picture of predictions: held-out pictures by class, and what the net takes them for before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from image_common import CELL, GAP, chinese_font, fitting, load_image
from PIL import Image, ImageDraw, ImageFont

TEXT, COLUMNS, ROWS = 16, 8, 14
RIGHT, WRONG = "#157a35", "#c01c28"


class Shown(NamedTuple):
    """A picture, its class, and the net's answers."""

    path: Path
    label: str
    before: str
    after: str


def font(texts: Sequence[str]) -> ImageFont.FreeTypeFont:
    """A font that has all letters of the texts."""
    return (None if all(text.isascii() for text in texts) else chinese_font(TEXT)) or ImageFont.load_default(TEXT)


def some_of(shown: Sequence[Shown]) -> list[list[Shown]]:
    """Up to COLUMNS pictures of each of the first ROWS classes, from the whole of each."""
    labels = list(dict.fromkeys(one.label for one in shown))[:ROWS]
    rows = [[one for one in shown if one.label == label] for label in labels]
    # From the middle of equal parts, so that pictures of two kinds that take turns are both there.
    return [[row[int((i + i % 2 / 2) * len(row) / COLUMNS)] for i in range(COLUMNS)] if len(row) > COLUMNS else row
            for row in rows]


def save_predictions(shown: Sequence[Shown], path: Path) -> None:
    """Writes the picture: a row for each class, under each picture both answers, green where right and red where not.

    Args:
        shown: In the order of their classes.
        path: The PNG.
    """
    rows = some_of(shown)
    letters = font([text for one in shown for text in one[1:]])
    left = round(max(letters.getlength(text) for text in ("before", *(row[0].label for row in rows)))) + 2 * GAP
    high = CELL + 2 * (TEXT + 4) + 2 * GAP
    page = Image.new("RGB", (left + max(map(len, rows)) * (CELL + GAP) + GAP, GAP + len(rows) * high), "white")
    draw = ImageDraw.Draw(page)
    for number, row in enumerate(rows):
        top = GAP + number * high
        draw.text((GAP, top + CELL / 2), row[0].label, font=letters, fill="black", anchor="lm")
        lines = [top + CELL + 4 + (TEXT + 4) * (i + 0.5) for i in range(2)]
        for text, line in zip(("before", "after"), lines):
            draw.text((GAP, line), text, font=letters, fill="#777777", anchor="lm")
        for column, one in enumerate(row):
            x = left + column * (CELL + GAP)
            page.paste(tile(one.path), (x, top))
            for answer, line in zip((one.before, one.after), lines):
                draw.text((x + CELL / 2, line), fitting(answer, letters), font=letters, anchor="mm",
                          fill=RIGHT if answer == one.label else WRONG)
    page.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def tile(path: Path) -> Image.Image:
    """A picture as the net sees it, in the size of a cell."""
    pixels = (load_image(path, CELL, CELL) + 1) * 127.5
    return Image.fromarray(pixels.round().astype(np.uint8).transpose(1, 2, 0))
