"""The tokenizer of the small base: one id for each character."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "wukong"))

from tokenizer import CharTokenizer, remarks  # noqa: E402
from wordpiece import WordPieceTokenizer  # noqa: E402

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


def test_what_is_not_read_is_named():
    tokenizer = CharTokenizer("狐狸脸", 5)
    assert tokenizer.unread("狐 狸") == ([], "") and tokenizer.unread("狐猫犬猫") == (["猫", "犬"], "猫")
    assert remarks(tokenizer, ["狐狸", "狐猫", "狐狸脸狐", "狐猫"]) == [
        "'狐猫': the base does not know 猫, and draws as if another word stood there",
        "'狐狸脸狐' is longer than the base reads: it does not see '狐'"]


def test_what_wordpiece_does_not_read_is_named(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text("[PAD]\n[CLS]\n[SEP]\n[UNK]\nred\n##dish\n狐\n", encoding="utf-8")
    tokenizer = WordPieceTokenizer(path, 5)
    assert tokenizer.unread("Reddish 狐") == ([], "")
    assert tokenizer.unread("blue 猫 狐 reddish") == (["blue", "猫"], "reddish")
