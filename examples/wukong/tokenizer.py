"""Texts to ids, one character at a time."""


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

    def __call__(self, text: str) -> list[int]:
        """The ids of one text, cut and padded to the context length; white space does not count."""
        ids = [self.ids.get(character, self.UNKNOWN) for character in "".join(text.split())]
        ids = [self.BEGIN, *ids[: self.context_length - 2], self.END]
        return ids + [self.PAD] * (self.context_length - len(ids))
