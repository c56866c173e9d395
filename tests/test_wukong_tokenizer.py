"""The tokenizer of the small base: one id for each character."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "wukong"))

from tokenizer import CharTokenizer  # noqa: E402

PAD, UNKNOWN, BEGIN, END = range(4)


def test_ids_follow_the_vocabulary():
    tokenizer = CharTokenizer("狐狸脸", 8)
    assert tokenizer.vocab_size == 7
    assert tokenizer("狐狸") == [BEGIN, 4, 5, END, PAD, PAD, PAD, PAD]
    assert tokenizer("脸狸") == [BEGIN, 6, 5, END, PAD, PAD, PAD, PAD]


def test_the_empty_text_has_ids_too():
    assert CharTokenizer("狐", 4)("") == [BEGIN, END, PAD, PAD]


def test_unknown_characters_share_one_id():
    assert CharTokenizer("狐", 6)("猫狐犬") == [BEGIN, UNKNOWN, 4, UNKNOWN, END, PAD]


def test_white_space_does_not_count():
    tokenizer = CharTokenizer("狐狸", 8)
    assert tokenizer(" 狐\u3000狸\n") == tokenizer("狐狸")


@pytest.mark.parametrize("text", ["狐狸狐", "狐狸狐狸狐狸狐狸"])
def test_long_texts_are_cut_and_keep_their_end(text):
    assert CharTokenizer("狐狸", 5)(text) == [BEGIN, 4, 5, 4, END]


@pytest.mark.parametrize("vocabulary, length, words", [
    ("狐狸狐", 8, "once"), (["狐", "狸"], 8, "one text"), ("狐", 2, "context_length must be at least 3"),
])
def test_refusals(vocabulary, length, words):
    with pytest.raises(ValueError, match=words):
        CharTokenizer(vocabulary, length)
