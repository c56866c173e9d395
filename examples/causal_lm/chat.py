"""Chats as text and as tokens: the model's own template (Jinja, as Hugging Face's), else Alpaca's."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from common import UserError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

ALPACA = """{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\n\n' }}\
{% elif message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}\
{% else %}{{ '### Response:\n' + message.content + eos_token + '\n\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""
Message = Mapping[str, str]


class Tokens(NamedTuple):
    """A chat as ids, and which of them belong to answers."""

    ids: list[int]
    is_answer: list[bool]


class Chat:
    """The tokenizer with the template of its model.

    Args:
        tokenizer: Of the model.
        template: Its chat template; Alpaca's where it has none.
        bos: Text of the token that begins.
        eos: Text of the token that ends.
        stop: Ids that end an answer.

    Raises:
        UserError: The template is no Jinja, or no token is known that ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, bos: str, eos: str, stop: Sequence[int]) -> None:
        self.tokenizer, self.special = tokenizer, {"bos_token": bos, "eos_token": eos}
        own = tokenizer.token_to_id(eos) if eos else None
        self.stop = frozenset(stop) | ({own} if own is not None else set())
        if not self.stop:
            raise UserError("the model does not say which token ends an answer: eos_token in tokenizer_config.json")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            self.template = environment.from_string(template or ALPACA)
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template is not valid: {error}") from None

    def text(self, messages: Sequence[Message], answer_next: bool) -> str:
        """A chat as text; with `answer_next` up to where the next answer begins."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=answer_next, **self.special)
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the model's chat template cannot show this chat: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the next answer begins."""
        return self.encode(self.text(messages, True))

    def tokens(self, messages: Sequence[Message]) -> Tokens:
        """A chat that ends with an answer, as ids; those of its answers, with the token that ends each, are marked.

        What stands before an answer and the answer are made ids apart from each other, as they are when the model
        answers.
        """
        ids: list[int] = []
        marks: list[bool] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.text(messages[:number], True), self.text(messages[:number + 1], False)
            if not (before.startswith(done) and after.startswith(before)):
                raise UserError("the model's chat template writes an answer elsewhere than where it is asked for, so "
                                "that its tokens cannot be told from the prompt's")
            answer = self.encode(after[len(before):])
            # What a template writes behind the token that ends an answer is none of the model's business.
            end = next((i + 1 for i, one in enumerate(answer) if one in self.stop), len(answer))
            for part, is_answer in ((self.encode(before[len(done):]), False), (answer[:end], True),
                                    (answer[end:], False)):
                ids += part
                marks += [is_answer] * len(part)
            done = after
        return Tokens(ids, marks)


def refuse(message: Any) -> None:
    """What templates call to refuse a chat."""
    raise jinja2.TemplateError(str(message))
