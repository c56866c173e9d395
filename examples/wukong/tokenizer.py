"""Texts to ids, one character at a time; what of a text a tokenizer does not read."""

from collections.abc import Iterable
from typing import Protocol


class CharTokenizer:
    """Gives every character of a vocabulary an id; 0 pads, 1 is any other character, 2 begins and 3 ends a text.

    Args:
        vocabulary: The characters, each once.
        context_length: Ids per text.

    Raises:
        ValueError: A character stands twice in the vocabulary, or there is no room for a text.
    """

    PAD, UNKNOWN, BEGIN, END = range(4)

    def __init__(self, vocabulary: str, context_length: int) -> None:
        if not isinstance(vocabulary, str) or len(set(vocabulary)) != len(vocabulary):
            raise ValueError("a vocabulary is one text in which every character stands once")
        if context_length < 3:
            raise ValueError(f"context_length must be at least 3, got {context_length}")
        self.ids = {character: i for i, character in enumerate(vocabulary, start=self.END + 1)}
        self.context_length = context_length
        self.vocab_size = self.END + 1 + len(vocabulary)

    def unread(self, text: str) -> tuple[list[str], str]:
        """The characters of a text that are not in the vocabulary, each once, and the end that does not fit in."""
        characters = "".join(text.split())
        unknown = [character for character in dict.fromkeys(characters) if character not in self.ids]
        return unknown, characters[self.context_length - 2:]

    def __call__(self, text: str) -> list[int]:
        """The ids of one text, cut and padded to the context length; white space does not count."""
        ids = [self.ids.get(character, self.UNKNOWN) for character in "".join(text.split())]
        ids = [self.BEGIN, *ids[: self.context_length - 2], self.END]
        return ids + [self.PAD] * (self.context_length - len(ids))


class Reads(Protocol):
    """A tokenizer that says what it does not read."""

    def unread(self, text: str) -> tuple[list[str], str]:
        """The unknown words of a text, and the end that is cut off."""


def remarks(tokenizer: Reads, prompts: Iterable[str]) -> list[str]:
    """A sentence for each prompt of which the base reads something as unknown, or not at all.

    Args:
        tokenizer: Of the base.
        prompts: The texts.
    """
    found = []
    for prompt in dict.fromkeys(prompts):
        unknown, rest = tokenizer.unread(prompt)
        if unknown:
            found.append(f"{prompt!r}: the base does not know {', '.join(unknown[:10])}, and draws as if another word "
                         f"stood there")
        if rest:
            found.append(f"{prompt!r} is longer than the base reads: it does not see {rest[:40]!r}")
    return found
