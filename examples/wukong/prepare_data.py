"""Makes captioned emoji images in Wukong's format: folders of PNG images, each with a captions.csv (columns dir,text).

    python prepare_data.py                                  # the five colour sets and the high-contrast one
    python prepare_data.py --styles noto flat --groups 3 4 --size 64 --out /tmp/nature
    python prepare_data.py --styles ink --split --out /tmp/small           # what is committed in examples/wukong/data

A caption is emojibase's Chinese name of the emoji and the word for the style: "狐狸，扁平". Images come from icon sets
on npm; the pictures of ink are computed from those of flat. Emoji that stand in noto, flat and contrast are taken,
without skin-tone variants; the other sets lack some of them. names.json tells which file is which emoji.
"""
import argparse
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import extras  # noqa: F401  # isort: skip  # first, to say which packages are missing
from data import COLUMNS, DataError
from PIL import Image, ImageChops, ImageFilter


class Style(NamedTuple):
    """An icon set on npm, the word for it in captions, the mode of its PNG images, and whether ``ink`` draws them."""

    package: str
    version: str
    word: str
    mode: str = "RGB"
    ink: bool = False


HERE = Path(__file__).resolve().parent
NAMES = ("emojibase-data", "17.0.0")
STYLES = {
    "noto": Style("@iconify-json/noto", "1.2.9", "安卓"),
    "flat": Style("@iconify-json/fluent-emoji-flat", "1.2.6", "扁平"),
    "solid": Style("@iconify-json/fluent-emoji", "1.2.7", "立体"),
    "noto-v1": Style("@iconify-json/noto-v1", "1.2.5", "圆润"),
    "firefox": Style("@iconify-json/fxemoji", "1.2.2", "淡彩"),
    "contrast": Style("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "黑白", "L"),
    "ink": Style("@iconify-json/fluent-emoji-flat", "1.2.6", "黑白", "L", ink=True),
}
# Not ink: that is the style to teach by fine-tuning, and a base that has learned it already would show nothing.
DEFAULT = tuple(style for style, one in STYLES.items() if not one.ink)
# The sets that name the emoji of each icon. An emoji is taken where all of them have it.
COMPLETE = ("noto", "flat", "contrast")
GROUPS = {0: "smileys", 1: "people", 3: "animals and nature", 4: "food and drink", 5: "travel", 6: "activities",
          7: "objects", 8: "symbols", 9: "flags"}
TRAIN, HELDOUT, SPLIT_SEED = 300, 100, 0
INK_ZOOM = 6  # a drawing is computed from a picture of this many times its size
# Held out whatever the draw says: things anybody recognises, for the demo's prompts.
DEMO = ("1F98A", "1F43C", "1F431", "1F438", "1F34E", "1F355", "1F33B", "1F344")


class Emoji(NamedTuple):
    """One emoji: its code points, its names, and its Unicode group."""

    hexcode: str
    zh: str
    en: str
    group: int

    @property
    def file(self) -> str:
        """Name of its image."""
        return f"{self.hexcode.lower()}.png"


def plain_hexcode(hexcode: str) -> str:
    """One spelling for all sources: upper case, without the variation selector that only some sets write."""
    return hexcode.upper().replace("-FE0F", "")


def fetch(name: str, version: str, cache: Path) -> Path:
    """Returns the archive of an npm package, through the npm client if the cache does not hold it yet.

    Raises:
        DataError: npm is missing, failed, or brought something else than was asked for.
    """
    archive = cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(f"npm is not installed and {name}@{version} is fetched with it: install npm (Debian: "
                            f"apt-get install npm) or put {archive.name} into {cache}; only the base's training data "
                            f"need it, the fine-tuning images are in {HERE / 'data'}")
        print(f"fetching {name}@{version}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            command = [npm, "pack", f"{name}@{version}", "--loglevel=error", "--fetch-retry-mintimeout=1000",
                       "--fetch-retry-maxtimeout=5000"]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            found = list(Path(work).glob("*.tgz"))
            if done.returncode or len(found) != 1:
                reason = " ".join(done.stderr.split()).split(" npm error at ")[0]
                raise DataError(f"npm could not fetch {name}@{version}: {reason[:400]}")
            found[0].replace(archive)
    package = read_json(archive, "package.json")
    if (package.get("name"), package.get("version")) != (name, version):
        found_package = f"{package.get('name')}@{package.get('version')}"
        raise DataError(f"{archive} holds {found_package}, expected {name}@{version}: delete it and run again")
    return archive


def read_json(archive: Path, member: str) -> Any:
    """Reads one JSON file of an npm archive without unpacking it."""
    try:
        with tarfile.open(archive) as tar:
            stream = tar.extractfile(f"package/{member}")
            if stream is None:
                raise KeyError(member)
            return json.load(stream)
    except (tarfile.TarError, KeyError, ValueError, EOFError, OSError) as error:
        raise DataError(f"{archive} is broken ({member}: {error}): delete it and run again") from None


def read_emoji(archive: Path) -> list[Emoji]:
    """Reads emojibase's emoji with their Chinese and English names; those without a group are parts of others."""
    english = {plain_hexcode(e["hexcode"]): e["label"] for e in read_json(archive, "en/data.json")}
    chinese = {plain_hexcode(e["hexcode"]): e for e in read_json(archive, "zh/data.json")}
    grouped = {code: e for code, e in chinese.items() if e.get("group") in GROUPS}
    return [Emoji(code, e["label"], english[code], e["group"]) for code, e in grouped.items()]


def letters(name: str) -> str:
    """The letters and digits of a name in lower case: sets write baby-chick, babychick and Baby Chick."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


class IconSet:
    """An iconify icon set: SVG icons by plain hexcode."""

    def __init__(self, archive: Path) -> None:
        self._set = read_json(archive, "icons.json")
        self._names = {plain_hexcode(code): name for code, name in read_json(archive, "chars.json").items()}

    def __contains__(self, hexcode: str) -> bool:
        return hexcode in self._names

    def name(self, hexcode: str) -> str:
        """The icon's name in this set."""
        return self._names[hexcode]

    def find(self, names: dict[str, list[str]]) -> None:
        """Finds icons by name, for a set that does not say which emoji its icons are.

        Args:
            names: Plain hexcode -> names of the emoji, the best first; an icon is given to one emoji only.
        """
        icons = {letters(name): name for name in sorted({*self._set["icons"], *self._set.get("aliases", {})})}
        for hexcode, some in names.items():
            found = next((name for name in map(letters, some) if name in icons), None)
            if found is not None:
                self._names[hexcode] = icons.pop(found)

    def svg(self, hexcode: str) -> str:
        """The whole SVG of an icon; its ``currentColor``, all that the high-contrast set is drawn in, is black."""
        icon = self._icon(self._names[hexcode])
        left, top, width, height = (icon.get(key, 0) for key in ("left", "top", "width", "height"))
        flip = f' transform="translate({2 * left + width} 0) scale(-1 1)"' if icon.get("hFlip") else ""
        return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}"><g color="#000"{flip}>{icon["body"]}</g></svg>')

    def _icon(self, name: str) -> dict[str, Any]:
        """An icon's body and view box: its own values, else its parent's where it is an alias, else the set's."""
        if name in self._set["icons"]:
            return {**self._set, **self._set["icons"][name]}
        alias = self._set["aliases"][name]
        parent = self._icon(alias["parent"])
        return {**parent, **alias, "hFlip": alias.get("hFlip", False) != parent.get("hFlip", False)}


def english_names(one: Emoji, sets: list[IconSet], shortcodes: dict[str, list[str]]) -> Iterator[str]:
    """The names of an emoji: in other sets, in emojibase, in Unicode, and in chats."""
    yield from (icons.name(one.hexcode) for icons in sets)
    yield one.en
    if "-" not in one.hexcode:
        yield unicodedata.name(chr(int(one.hexcode, 16)), "")
    yield from shortcodes.get(one.hexcode, [])


def read_shortcodes(archive: Path) -> dict[str, list[str]]:
    """Reads emojibase's tables of names such as :baby_chick:, by plain hexcode."""
    found: dict[str, list[str]] = {}
    for table in ("emojibase", "cldr", "github", "joypixels", "iamcal"):
        for hexcode, names in read_json(archive, f"en/shortcodes/{table}.json").items():
            found.setdefault(plain_hexcode(hexcode), []).extend([names] if isinstance(names, str) else names)
    return found


def read_icons(chosen: list[str], emoji: list[Emoji], cache: Path) -> tuple[dict[str, IconSet], list[Emoji]]:
    """Reads the icon sets of the chosen styles, and tells which emoji stand in all complete sets."""
    needed = [style for style in STYLES if style in chosen or style in COMPLETE]
    packages = {STYLES[style][:2]: IconSet(fetch(*STYLES[style][:2], cache)) for style in needed}
    icons = {style: packages[STYLES[style][:2]] for style in needed}
    complete = [icons[style] for style in COMPLETE]
    common = [one for one in emoji if all(one.hexcode in each for each in complete)]
    shortcodes = read_shortcodes(fetch(*NAMES, cache))
    names = {one.hexcode: list(english_names(one, complete, shortcodes)) for one in common}
    for one_set in packages.values():
        if one_set not in complete:
            one_set.find(names)
    return icons, common


def render(svg: str, size: int, mode: str) -> Image.Image:
    """Renders an SVG on white, ``size`` x ``size`` pixels, the drawing centred where it is not square."""
    import resvg_py

    square = svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    png = resvg_py.svg_to_bytes(svg_string=square, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert(mode)


def ink(picture: Image.Image) -> Image.Image:
    """Draws a coloured picture in ink: lines where its colours change, three tones of grey for its luminance.

    All of it follows from the coloured picture, so a net that draws the thing in colour can learn it from few pictures.
    In a set drawn by hand, what is filled with black has to be learned of each thing.

    - Line: e is the greatest range, of red, green and blue, in the square of (2n + 1) x (2n + 1) pixels around a pixel,
      n = width / 64 rounded down, but at least 1. The line is min(max((e - 0.12) / 0.25, 0), 1); at the edge between
      two colours it is 2n pixels wide, about 1/32 of the picture.
    - Tone: 1, 0.625 or 0.25 for a luminance (ITU-R 601) above 0.75, above 0.25, or less. No tone is black, so lines can
      be told from dark colours.
    - Value: tone times (1 - line), the mean of 6 x 6 pixels.

    Args:
        picture: RGB, 6 times the size of the drawing.

    Returns:
        The drawing, mode "L".
    """
    darkest = lightest = picture
    for _ in range(max(1, picture.width // 64)):
        darkest, lightest = darkest.filter(ImageFilter.MinFilter(3)), lightest.filter(ImageFilter.MaxFilter(3))
    red, green, blue = ImageChops.difference(lightest, darkest).split()
    ranges = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    paper = ranges.point([round(255 - 255 * min(max((value / 255 - 0.12) / 0.25, 0), 1)) for value in range(256)])
    tones = picture.convert("L").point([(64, 159, 255)[round(value / 127.5)] for value in range(256)])
    return ImageChops.multiply(tones, paper).reduce(INK_ZOOM)


def draw(svg: str, size: int, style: Style) -> Image.Image:
    """An SVG as a picture of a style."""
    return ink(render(svg, INK_ZOOM * size, "RGB")) if style.ink else render(svg, size, style.mode)


def write_folder(folder: Path, emoji: list[Emoji], icons: IconSet, style: str, size: int) -> None:
    """Writes one folder in Wukong's format: an image for each emoji of the set and ``captions.csv``."""
    from tqdm import tqdm

    folder.mkdir()
    emoji = [one for one in emoji if one.hexcode in icons]
    for one in tqdm(emoji, desc=folder.name, unit="image"):
        draw(icons.svg(one.hexcode), size, STYLES[style]).save(folder / one.file, optimize=True)
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows((one.file, f"{one.zh}，{STYLES[style].word}") for one in emoji)


def split(emoji: list[Emoji]) -> dict[str, list[Emoji]]:
    """Draws the training and the held-out set by a hash of seed and hexcode; the order of the input does not matter."""
    if len(emoji) < TRAIN + HELDOUT:
        raise DataError(f"--split needs {TRAIN} + {HELDOUT} emoji, the chosen groups hold {len(emoji)}: add groups")
    rank = {one: hashlib.sha256(f"{SPLIT_SEED}:{one.hexcode}".encode()).hexdigest() for one in emoji}
    drawn = sorted(emoji, key=lambda one: (one.hexcode not in DEMO, rank[one]))
    heldout, train = set(drawn[:HELDOUT]), set(drawn[HELDOUT:HELDOUT + TRAIN])
    return {"train": [one for one in emoji if one in train], "heldout": [one for one in emoji if one in heldout]}


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Fetches, renders and writes everything below ``folder``, which exists."""
    icons, common = read_icons(args.styles, read_emoji(fetch(*NAMES, args.cache)), args.cache)
    chosen = [one for one in common if one.group in args.groups]
    print(f"{len(common)} emoji stand in all of {', '.join(COMPLETE)}; {len(chosen)} of them in the groups "
          f"{', '.join(f'{GROUPS[group]} ({group})' for group in args.groups)}")
    if args.split:
        parts = {part: (emoji, args.styles[0]) for part, emoji in split(chosen).items()}
    else:
        parts = {style: (chosen, style) for style in args.styles}
    for part, (emoji, style) in parts.items():
        write_folder(folder / part, emoji, icons[style], style, args.size)
    table = {one.file: one._asdict() for emoji, _ in parts.values() for one in emoji}
    (folder / "names.json").write_text(json.dumps(table, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def check_target(out: Path, force: bool) -> None:
    """Refuses an existing folder, unless it may go and holds nothing but what this script writes."""
    if not out.exists():
        return
    if not force:
        raise DataError(f"{out} is there already: choose another --out, or give --force to replace it")
    if not out.is_dir():
        raise DataError(f"{out} is a file: choose another --out")
    foreign = {entry.name for entry in out.iterdir()} - {*STYLES, "train", "heldout", "names.json"}
    if foreign:
        raise DataError(f"--force will not replace {out}: it holds {min(foreign)}, which this script does not write")


def run(args: argparse.Namespace) -> None:
    """Makes everything beside the target and moves it there when it is whole."""
    check_target(args.out, args.force)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}-", dir=args.out.parent) as work:
        new = Path(work, "new")
        new.mkdir()
        prepare(args, new)
        if args.out.exists():
            args.out.rename(Path(work, "old"))
        new.rename(args.out)
    print(f"written to {args.out}: {', '.join(sorted(entry.name for entry in args.out.iterdir()))}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(DEFAULT), metavar="STYLE",
                        help=f"styles to draw, of {', '.join(STYLES)} (default: all but ink, which is for fine-tuning)")
    groups = ", ".join(f"{key} {name}" for key, name in GROUPS.items())
    parser.add_argument("--groups", nargs="+", type=int, choices=GROUPS, default=[0, 3, 4], metavar="GROUP",
                        help=f"emoji groups, of {groups} (default: 0 3 4)")
    parser.add_argument("--size", type=int, default=32, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "work" / "data", help="folder to write (%(default)s)")
    parser.add_argument("--cache", type=Path, default=HERE / "work" / "npm", help="folder for archives (%(default)s)")
    parser.add_argument("--split", action="store_true",
                        help=f"write one style as train/ ({TRAIN} images) and heldout/ ({HELDOUT})")
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    args = parser.parse_args(argv)
    args.styles, args.groups = list(dict.fromkeys(args.styles)), sorted(set(args.groups))
    args.out, args.cache = args.out.resolve(), args.cache.resolve()
    if not 8 <= args.size <= 1024:
        parser.error(f"--size must be 8 to 1024 pixels, got {args.size}")
    if args.split and len(args.styles) != 1:
        parser.error(f"--split works on one style, got --styles {' '.join(args.styles)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse(argv)
    try:
        run(args)
    except ImportError as error:
        message = f"the package {error.name} is missing: pip install resvg-py==0.5.0 tqdm (the extra 'examples')"
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename or args.out}; nothing was written to {args.out}"
    except DataError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = f"interrupted; nothing was written to {args.out}"
    else:
        return 0
    print(f"prepare_data.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
