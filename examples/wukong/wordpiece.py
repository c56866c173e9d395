"""Wukong's tokenizer: texts to ids by WordPiece (Wu et al., 2016; Devlin et al., 2019) with a vocabulary file."""

import unicodedata
from pathlib import Path

CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2FA1F), (0xF900, 0xFAFF))


class WordPieceTokenizer:
    """Gives ids [CLS], pieces, [SEP], padded with 0. A word is cut into the longest pieces that the vocabulary holds.

    Args:
        vocabulary: A UTF-8 file with a piece a line; the line's number is the piece's id. Pieces inside words begin
            with ``##``.
        context_length: Ids per text.

    Raises:
        ValueError: The file lacks [CLS], [SEP] or [UNK], or there is no room for a text.
        OSError, UnicodeDecodeError: The file cannot be read.
    """

    def __init__(self, vocabulary: str | Path, context_length: int) -> None:
        lines = Path(vocabulary).read_text(encoding="utf-8").splitlines()
        self.ids = {line.strip(): number for number, line in enumerate(lines)}
        missing = [name for name in ("[CLS]", "[SEP]", "[UNK]") if name not in self.ids]
        if missing:
            raise ValueError(f"{vocabulary} is no WordPiece vocabulary: it lacks {', '.join(missing)}")
        if context_length < 3:
            raise ValueError(f"context_length must be at least 3, got {context_length}")
        self.context_length = context_length

    def __call__(self, text: str) -> list[int]:
        """The ids of one text, cut and padded to the context length."""
        pieces = [piece for word in words(text) for piece in self.pieces(word)][: self.context_length - 2]
        ids = [self.ids[piece] for piece in ("[CLS]", *pieces, "[SEP]")]
        return ids + [0] * (self.context_length - len(ids))

    def unread(self, text: str) -> tuple[list[str], str]:
        """The words of a text that the vocabulary lacks, each once, and the end that does not fit in."""
        cut = [(word, len(self.pieces(word))) for word in words(text)]
        unknown = [word for word in dict.fromkeys(word for word, _ in cut) if self.pieces(word) == ["[UNK]"]]
        ends = [sum(size for _, size in cut[: i + 1]) for i in range(len(cut))]
        return unknown, " ".join(word for (word, _), end in zip(cut, ends) if end > self.context_length - 2)

    def pieces(self, word: str) -> list[str]:
        """The longest pieces from left to right, or [UNK] where one is not in the vocabulary."""
        found: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = [end for end in range(len(word), start, -1) if prefix + word[start:end] in self.ids]
            if not ends:
                return ["[UNK]"]
            found.append(prefix + word[start:ends[0]])
            start = ends[0]
        return found


def words(text: str) -> list[str]:
    """Lower-case words without accents; each Chinese character and each punctuation mark is a word."""
    plain = (c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if alone(c) else "" if is_control(c) else c for c in plain).split()


def alone(character: str) -> bool:
    """Whether a character is a word of its own."""
    code = ord(character)
    symbol = character.isascii() and not character.isalnum() and not character.isspace() and character.isprintable()
    return symbol or unicodedata.category(character)[0] == "P" or any(low <= code <= high for low, high in CHINESE)


def is_control(character: str) -> bool:
    """Whether a character is invisible and no white space."""
    return unicodedata.category(character)[0] == "C" and not character.isspace()
