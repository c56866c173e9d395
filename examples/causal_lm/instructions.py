"""Samples for instruction tuning: JSON or JSONL, Alpaca's fields (instruction, input, output) or chats (messages)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError

ROLES = ("system", "user", "assistant")


class Sample(NamedTuple):
    """A chat that ends with an answer, and where it stands (``train.jsonl line 3``)."""

    messages: list[dict[str, str]]
    where: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """What stands before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]


def read_samples(path: Path) -> tuple[list[Sample], list[str]]:
    """Reads a file.

    Args:
        path: ``.jsonl`` with an object on each line, or ``.json`` with a list of objects.

    Returns:
        The good samples in the file's order, and a message for each that was left out, which names its place.

    Raises:
        UserError: There is no such file, it is no text or no JSON, or not a single sample is good.
    """
    samples, skipped = [], []
    for where, row in rows(path):
        try:
            samples.append(Sample(messages_of(row), where))
        except ValueError as error:
            skipped.append(f"{where}: {error}")
    if not samples:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise UserError(f"not a single usable sample in {path} ({len(skipped)} left out{first})")
    return samples, skipped


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields each object of a file and where it stands; a line that is no JSON is given as an error."""
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path} must be a .json or .jsonl file of objects with instruction and output, or "
                        "messages")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: give --data the path of a .json or .jsonl file") from None
    if path.suffix == ".jsonl":
        # Not splitlines: JSON may hold other line ends of Unicode's as they are.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path.name} line {number}", parsed(line)
        return
    found = parsed(text)
    if isinstance(found, ValueError):
        raise UserError(f"{path} {found}")
    if not isinstance(found, list):
        raise UserError(f"{path} must hold a list of objects, but holds a {type(found).__name__}")
    for number, row in enumerate(found, 1):
        yield f"{path.name} item {number}", row


def parsed(text: str) -> Any:
    """What a JSON text holds, or the error that it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not valid JSON ({error})")


def messages_of(row: Any) -> list[dict[str, str]]:
    """The chat of an object.

    Raises:
        ValueError: It is none of the two forms, or an answer is empty.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict) or not ("messages" in row or {"instruction", "output"} <= row.keys()):
        raise ValueError("has neither instruction and output nor messages")
    if "messages" in row:
        return checked(row["messages"])
    texts = {name: row.get(name) or "" for name in ("system", "instruction", "input", "output")}
    wrong = next((name for name, text in texts.items() if not isinstance(text, str)), None)
    if wrong:
        raise ValueError(f"{wrong} is no text")
    if not texts["instruction"].strip():
        raise ValueError("the instruction is empty")
    asked = texts["instruction"] + (f"\n\n{texts['input']}" if texts["input"].strip() else "")
    system = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    return checked([*system, {"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]}])


def checked(messages: Any) -> list[dict[str, str]]:
    """The messages of a chat, with nothing in them but role and content."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is no list of messages")
    found = []
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"message {number} must have a role ({', '.join(ROLES)}) and content as text")
        if role == "assistant" and not content.strip():
            raise ValueError("an answer is empty")
        found.append({"role": role, "content": content})
    if found[-1]["role"] != "assistant":
        raise ValueError("the last message is no answer of the assistant")
    return found
