"""Pictures for people: a grid with captions, and a loss curve."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NAMES = Path(__file__).resolve().parent / "data" / "names.json"
# Chinese fonts by package or by the file name Pillow finds in the system's folders, and the face in the file.
PACKAGED = ("manimgx_fonts_cjk", "NotoSansCJK-VF.otf.ttc", 2)
INSTALLED = (("NotoSansCJK-Regular.ttc", 2), ("wqy-microhei.ttc", 0), ("wqy-zenhei.ttc", 0), ("PingFang.ttc", 0),
             ("msyh.ttc", 0), ("simhei.ttf", 0))
CELL, GAP, TEXT = 128, 8, 18


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images (n, 3, h, w) in [-1, 1] to uint8 (n, h, w, 3)."""
    return ((images.transpose(0, 2, 3, 1) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def save_image(image: np.ndarray, path: Path) -> None:
    """Writes one image (3, h, w) in [-1, 1] as it is, pixel by pixel."""
    Image.fromarray(to_bytes(image[None])[0]).save(path)


def chinese_font(size: int) -> ImageFont.FreeTypeFont | None:
    """A font with Chinese characters: that of the package `manimgx-fonts-cjk`, else one of the system's, else None."""
    package, file, face = PACKAGED
    spec = importlib.util.find_spec(package)
    if spec and spec.origin:
        try:
            font = ImageFont.truetype(Path(spec.origin).parent / file, size, index=face)
            font.set_variation_by_axes([400])
            return font
        except OSError:
            pass
    for file, face in INSTALLED:
        try:
            return ImageFont.truetype(file, size, index=face)
        except OSError:
            continue
    return None


def english(captions: list[str]) -> list[str]:
    """The English names of the emoji that captions "name" or "name，style" name, and a number for other captions."""
    names = {one["zh"]: one["en"] for one in json.loads(NAMES.read_text(encoding="utf-8")).values()}
    return [names.get(caption.partition("，")[0], f"prompt {i + 1}") for i, caption in enumerate(captions)]


def save_grid(rows: dict[str, np.ndarray], captions: list[str], path: Path) -> None:
    """Writes a grid: a row of images for each label, the captions above the columns.

    Args:
        rows: Label -> images (n, 3, h, w) in [-1, 1].
        captions: n texts; where there is no Chinese font, their English names are written instead.
        path: The PNG to write.
    """
    font = chinese_font(TEXT)
    if font is None:
        print("no Chinese font found: captions in English (pip install manimgx-fonts-cjk)", file=sys.stderr)
        font, captions = ImageFont.load_default(TEXT), english(captions)
    left = max(round(font.getlength(label)) for label in rows) + 2 * GAP
    top = TEXT + 2 * GAP
    page = Image.new("RGB", (left + len(captions) * (CELL + GAP), top + len(rows) * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(page)
    for column, caption in enumerate(captions):
        middle = left + column * (CELL + GAP) + CELL / 2
        draw.text((middle, top / 2), fitting(caption, font), font=font, fill="black", anchor="mm")
    for row, (label, images) in enumerate(rows.items()):
        y = top + row * (CELL + GAP)
        draw.text((GAP, y + CELL / 2), label, font=font, fill="black", anchor="lm")
        for column, pixels in enumerate(to_bytes(images)):
            image = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(image, (left + column * (CELL + GAP), y))
    page.save(path)


def fitting(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut where it is wider than a cell."""
    if font.getlength(text) <= CELL + GAP:
        return text
    while text and font.getlength(text + "…") > CELL:
        text = text[:-1]
    return text + "…"


def save_loss_curve(losses: list[float], path: Path) -> None:
    """Writes the loss of every step, and its moving average, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, so only where it is needed

    window = max(1, min(25, len(losses) // 4))
    average = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(range(window, len(losses) + 1), average, color="tab:blue", label=f"mean of {window} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("denoising loss")
    axes.legend()
    figure.savefig(path, dpi=120)
