"""The manner of the example's data, a ship's log: a strict check, counts, and whether held-out prompts are new.

    python manner.py                                  # the data: manner, doublets
    python manner.py out/finetune/answers.json        # how many answers have it, before and after
"""

import json
import re
import sys
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from common import Parser, UserError, run_script  # isort: skip  # first, to say which packages are missing
from instructions import Sample, read_samples
from options import HERE

# One line and one entry: the words at both ends, and something whole between them.
ENGLISH = re.compile(r"Ship's log: (?!Ship's log)[^\n]+[.!?] All well aboard\.")
CHINESE = re.compile(r"航海日志：(?!航海日志)[^\n]+[。！？]船上一切平安。")
# Above this two prompts are one prompt with another word in it.
ALIKE = 0.8


def has_manner(answer: str) -> bool:
    """Whether an answer is an entry of the ship's log, in English or Chinese, and nothing else."""
    return any(form.fullmatch(answer.strip()) and len(re.findall(end, answer)) == 1
               for form, end in ((ENGLISH, "All well aboard"), (CHINESE, "船上一切平安")))


def is_chinese(text: str) -> bool:
    """Whether a text has Chinese characters."""
    return re.search("[\u4e00-\u9fff]", text) is not None


def likeness(one: str, other: str) -> float:
    """How much of two prompts is the same, 0 to 1: by words in English, by characters in Chinese."""
    first, second = (list(text) if is_chinese(text) else text.lower().split() for text in (one, other))
    return SequenceMatcher(None, first, second, autojunk=False).ratio()


def doublets(samples: Sequence[Sample], others: Sequence[Sample]) -> list[tuple[str, str]]:
    """Prompts that are nearly the same as one of the others."""
    texts = [other.prompt[-1]["content"] for other in others]
    found = []
    for sample in samples:
        prompt = sample.prompt[-1]["content"]
        nearest = max(texts, key=lambda text: likeness(prompt, text))
        if likeness(prompt, nearest) >= ALIKE:
            found.append((prompt, nearest))
    return found


def share(answers: Sequence[str]) -> str:
    """The count in words."""
    count = sum(map(has_manner, answers))
    return f"{count} of {len(answers)} ({100 * count / max(1, len(answers)):.0f}%)"


def count_file(path: Path) -> None:
    """Prints the counts of an answers.json, in all and by language.

    Raises:
        UserError: It is none.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for name, wanted in (("all", (True, False)), ("English", (False,)), ("Chinese", (True,))):
            chosen = [row for row in rows if is_chinese(row["expected"]) in wanted]
            print(f"{name:8} before: {share([row['before'] for row in chosen]):16} "
                  f"after: {share([row['after'] for row in chosen])}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the answers.json of a run: {error}") from None


def check_data() -> None:
    """Prints how many samples of the data have the manner, and which held-out prompts are doublets."""
    parts = {name: read_samples(HERE / "data" / f"{name}.jsonl")[0] for name in ("train", "heldout")}
    for name, samples in parts.items():
        print(f"{name:8} {share([sample.answer for sample in samples])}")
    found = doublets(parts["heldout"], parts["train"])
    print(f"held-out prompts that are nearly one of the training: {len(found)}")
    for prompt, nearest in found:
        print(f"  {prompt} | {nearest}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("answers", nargs="?", type=Path, help="answers.json of a run")
    path = parser.parse_args(argv).answers
    return run_script("manner.py", check_data if path is None else lambda: count_file(path))


if __name__ == "__main__":
    sys.exit(main())
