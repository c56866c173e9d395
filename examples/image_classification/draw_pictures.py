"""Draws the example's pictures: emoji of nine kinds of things in two styles, in a folder for each kind.

    python draw_pictures.py --out data                     # what is committed; npm fetches the drawings
    python draw_pictures.py --out /tmp/mine --train 5      # 5 things of a kind to train on instead of 10

--out then holds train/<kind>/<thing>-<style>.png and heldout/<kind>/..., 128 x 128 pixels. No thing is in
both; a hash of its code decides where it is. Noto Emoji are Google's, Fluent Emoji Flat Microsoft's: data/LICENSES.md.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

# First, to say which packages are missing.
from image_common import WUKONG, DataError, Parser, UserError, explained, run_script  # isort: skip
from prepare_data import NAMES, STYLES, Emoji, fetch, plain_hexcode, read_emoji, read_icons, read_json, render

USED = ("noto", "flat")
SIZE, COLOURS, HELDOUT = 128, 64, 10
# Of each kind: emojibase's subgroups, and what in them is none of it or too like another.
KINDS: dict[str, tuple[tuple[int, ...], str]] = {
    "animal": ((34,), r".* face|guide dog|service dog|black cat|paw prints|pig nose|water buffalo|two-hump camel"),
    "bird": ((35,), r"wing|feather"),
    "building": ((51, 52), r"building construction|brick|rock|wood|kaaba|houses|Statue of Liberty|wedding"),
    "clothing": ((65,), r"hair pick|prayer beads|lipstick|ring|gem stone|folding hand fan|shopping bags|purse|.*bag"),
    "face": (tuple(range(10)), r""),
    "fruit": ((42,), r""),
    "meal": ((44, 45), r"butter|salt|canned food|cooking|egg|roasted sweet potato"),
    "plant": ((40, 41), r"empty nest|nest with eggs|rosette|bouquet"),
    "vehicle": ((54,), r"oncoming .*|station|bus stop|motorway|railway track|fuel pump|wheel|police car light|stop sign"
                       r"|.* traffic light|construction|.* wheelchair|skateboard|roller skate|oil drum"
                       r"|mountain railway"),
}


def things_of(kind: str, emoji: list[Emoji], subgroups: dict[str, int]) -> list[Emoji]:
    """The things of a kind, in an order that a hash of their names decides."""
    wanted, but = KINDS[kind]
    found = [one for one in emoji if subgroups.get(one.hexcode) in wanted and not re.fullmatch(but, one.en)]
    return sorted(found, key=lambda one: hashlib.sha256(one.hexcode.encode()).hexdigest())


def file_name(one: Emoji, style: str) -> str:
    """The name of a picture: its thing and its style."""
    return re.sub(r"[^a-z0-9]+", "-", one.en.lower().replace("’", "")).strip("-") + f"-{style}.png"


def draw(out: Path, train: int, cache: Path) -> None:
    """Draws everything.

    Raises:
        UserError: The folder is there, npm fails, or there are not enough things of a kind.
    """
    if out.exists():
        raise UserError(f"{out} is there already: give another --out")
    with explained("the drawings cannot be fetched", DataError):
        icons, common = read_icons(list(USED), read_emoji(fetch(*NAMES, cache)), cache)
        table = read_json(fetch(*NAMES, cache), "en/data.json")
    subgroups = {plain_hexcode(one["hexcode"]): one.get("subgroup") for one in table}
    for kind in KINDS:
        things = things_of(kind, common, subgroups)
        if len(things) < train + HELDOUT:
            raise UserError(f"there are {len(things)} of the kind {kind}, too few for --train {train} and {HELDOUT}")
        for part, some in (("train", things[:train]), ("heldout", things[train:train + HELDOUT])):
            folder = out / part / kind
            folder.mkdir(parents=True)
            for one in some:
                for style in USED:
                    picture = render(icons[style].svg(one.hexcode), SIZE, STYLES[style].mode)
                    picture.quantize(COLOURS, dither=0).save(folder / file_name(one, style), optimize=True)
    print(f"{out}: {len(list(out.rglob('*.png')))} pictures of {len(KINDS)} kinds")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=10, choices=range(1, 11), metavar="N",
                        help="things of a kind to train on, 1 to 10 (default: 10)")
    parser.add_argument("--cache", type=Path, default=WUKONG / "work" / "npm", help="folder for archives (%(default)s)")
    arguments: argparse.Namespace = parser.parse_args(argv)
    return run_script("draw_pictures.py", lambda: draw(arguments.out, arguments.train, arguments.cache))


if __name__ == "__main__":
    sys.exit(main())
