"""Stable Diffusion's tokenizer: CLIP's byte-pair encoding (Sennrich et al., 2016; Radford et al., 2021)."""

import json
import re
import unicodedata
from pathlib import Path

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# What is a word whatever stands around it; then a run of letters, one digit, or a run of anything else but space.
ALONE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")
RUN = re.compile(r"L+|N|O+")


class BPETokenizer:
    """Gives ids <|startoftext|>, pieces, <|endoftext|>, padded with <|endoftext|>.

    Args:
        folder: Holds vocab.json (ids by piece) and merges.txt (a pair of pieces a line, the earlier joined first).
        context_length: Ids per text.

    Raises:
        ValueError: A file is damaged, or there is no room for a text.
        OSError: A file cannot be read.
    """

    def __init__(self, folder: Path, context_length: int) -> None:
        self.ids: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        if not isinstance(self.ids, dict) or not all(type(number) is int for number in self.ids.values()):
            raise ValueError("vocab.json must hold a whole number for each piece")
        missing = [name for name in (BEGIN, END) if name not in self.ids]
        if missing:
            raise ValueError(f"vocab.json lacks {', '.join(missing)}")
        if context_length < 3:
            raise ValueError(f"context_length must be at least 3, got {context_length}")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("merges.txt must hold two pieces a line")
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.letters = byte_letters()
        self.context_length = context_length

    def __call__(self, text: str) -> list[int]:
        """The ids of one text, cut and padded to the context length."""
        pieces = [piece for word in words(text) for piece in self.pieces(word)][: self.context_length - 2]
        ids = [self.ids[BEGIN], *(self.ids.get(piece, self.ids[END]) for piece in pieces), self.ids[END]]
        return ids + [self.ids[END]] * (self.context_length - len(ids))

    def unread(self, text: str) -> tuple[list[str], str]:
        """The words of a text with a piece that the vocabulary lacks, each once, and the end that does not fit in."""
        cut = [(word, self.pieces(word)) for word in words(text)]
        unknown = [word for word, pieces in cut if any(piece not in self.ids for piece in pieces)]
        ends = [sum(len(pieces) for _, pieces in cut[: i + 1]) for i in range(len(cut))]
        rest = [word for (word, _), end in zip(cut, ends) if end > self.context_length - 2]
        return list(dict.fromkeys(unknown)), " ".join(rest)

    def pieces(self, word: str) -> list[str]:
        """A word's bytes, the pair of the lowest rank joined again and again; the last piece ends in ``</w>``."""
        if word in (BEGIN, END):
            return [word]
        parts = [self.letters[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return parts


def byte_letters() -> list[str]:
    """A letter for each byte: its own where Latin-1 prints it, else the next from 256 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte if byte in own else 256 + others.index(byte)) for byte in range(256)]


def words(text: str) -> list[str]:
    """Lower-case words: runs of letters, single digits, runs of signs, and English endings such as 's."""
    text = unicodedata.normalize("NFC", text).lower()
    kinds = "".join(kind(character) for character in text)
    found, start = [], 0
    while start < len(text):
        match = ALONE.match(text, start) or RUN.match(kinds, start)
        if match:
            found.append(text[start:match.end()])
        start = match.end() if match else start + 1
    return found


def kind(character: str) -> str:
    """L for a letter, N for a digit or number, a space for white space, O for anything else."""
    if character.isspace():
        return " "
    first = unicodedata.category(character)[0]
    return first if first in "LN" else "O"
