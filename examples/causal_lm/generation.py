"""Answers of a net: a graph for the prompts, by bucket of length, and one for each further token, on a static cache."""

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from common import UserError
from decoder import Attention, Decoder
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

SHORTEST = 32


class Cached(nn.Cell):
    """A net with the keys and values of what it has read, for `batch` texts of at most `room` tokens.

    The cache of a layer is rows (batch * groups * room, d), so that a text's next place is written alone, wherever it
    is. Places behind a text's end hold what is left over; no query sees them before they are written again.

    Args:
        net: The model.
        batch: Texts at a time.
        room: Tokens of each, prompt and answer.
    """

    def __init__(self, net: Decoder, batch: int, room: int) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.batch, self.room = net, batch, room
        sizes = net.sizes
        self.groups, self.d = net.model.groups, sizes.head_dim
        shape = (batch * self.groups * room, self.d)
        self.keys, self.values = (ParameterTuple([
            Parameter(Tensor(np.zeros(shape, np.float32)), name=f"cache.{name}.{i}", requires_grad=False)
            for i in range(sizes.num_hidden_layers)]) for name in ("keys", "values"))
        # Where each text's part of each head begins.
        starts = np.arange(batch * self.groups, dtype=np.int32).reshape(batch, self.groups, 1) * room
        self.starts = Tensor(starts)
        self.places = Tensor(np.arange(room, dtype=np.float32).reshape(1, 1, room))
        self.steps = Tensor(np.arange(room, dtype=np.int32).reshape(1, 1, room))
        self.write = ops.ScatterUpdate()

    def table(self) -> Tensor:
        """The embedding's table, for the head at the end of a graph that takes it at its beginning.

        A graph that writes to a parameter copies each one that it reads both before and after: this one twice a token.
        """
        return self.net.model.embed_tokens.embedding_table.value()

    def stored(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (batch, groups, length, d) at places of the cache; gives all of the cache."""
        whole = (self.batch, self.groups, self.room, self.d)
        keys = self.write(self.keys[layer], places, key.reshape(-1, self.d))
        values = self.write(self.values[layer], places, value.reshape(-1, self.d))
        return keys.reshape(whole), values.reshape(whole)


class Prompts(nn.Cell):
    """Reads prompts (batch, length) into the cache; gives the logits (batch, vocabulary) after the last token of each.

    Args:
        cached: The net with its cache.
        length: The bucket.
    """

    def __init__(self, cached: Cached, length: int) -> None:
        super().__init__(auto_prefix=False)
        self.cached, self.length = cached, length

    def construct(self, ids: Tensor, last: Tensor) -> Tensor:
        cached, model, table = self.cached, self.cached.net.model, self.cached.table()
        shared = model.whole(cached.batch, self.length)
        places = (cached.starts + cached.steps[:, :, :self.length]).reshape(-1)
        x = model.embed_tokens(ids.reshape(-1))
        for i, layer in enumerate(model.layers):
            query, key, value = layer.self_attn.project(layer.input_layernorm(x), shared)
            key = ops.depend(key, cached.stored(i, places, key, value))
            x = x + layer.self_attn.mixed(query, key, value, shared)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return cached.net.head(model.norm(ops.gather(x, last, 0)), table)


class NextToken(nn.Cell):
    """Reads one token of each text, ids (batch,) at positions (batch,); gives the logits (batch, vocabulary) after it.

    Args:
        cached: The net with its cache.
    """

    def __init__(self, cached: Cached) -> None:
        super().__init__(auto_prefix=False)
        self.cached = cached

    def construct(self, ids: Tensor, positions: Tensor) -> Tensor:
        cached, model, table = self.cached, self.cached.net.model, self.cached.table()
        by_text = (cached.batch, 1, 1)
        allowed = (cached.places <= positions.astype(ms.float32).reshape(by_text)).astype(ms.float32)
        mask = model.attend.mask(allowed)
        turned = (cached.batch, 1, 1, cached.d)
        tables = model.tables(ops.gather(model.cos, positions, 0).reshape(turned),
                              ops.gather(model.sin, positions, 0).reshape(turned))
        shared = (*tables, mask, (), ())
        places = (cached.starts + positions.reshape(by_text)).reshape(-1)
        x = model.embed_tokens(ids)
        for i, layer in enumerate(model.layers):
            attention: Attention = layer.self_attn
            query, key, value = attention.project(layer.input_layernorm(x), shared)
            keys, values = cached.stored(i, places, key, value)
            x = x + attention.mixed(query, keys, values, shared)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return cached.net.head(model.norm(x), table)


class Generator:
    """Continues texts.

    >>> generator = Generator(base.net, batch=1, room=256)
    >>> generator([base.chat.prompt(messages)], 64, base.chat.stop)

    Args:
        net: The model, adapted or not; a net that is changed in its structure needs a new generator.
        batch: Texts at a time; there may be fewer.
        room: Tokens of each, prompt and answer.

    Raises:
        UserError: The model has not as many positions.
    """

    def __init__(self, net: Decoder, batch: int, room: int) -> None:
        if room > net.sizes.context:
            raise UserError(f"prompt and answer together take up to {room} tokens, and the model has "
                            f"{net.sizes.context} positions: ask for fewer")
        self.cached = Cached(net, batch, room)
        self.next = NextToken(self.cached)
        self.prompts: dict[int, Prompts] = {}
        for cell in (self.cached, self.next):
            cell.set_train(False)

    def read(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Reads prompts into the cache; gives the logits after each."""
        longest = max(map(len, prompts))
        length = min(self.cached.room, max(SHORTEST, 1 << (longest - 1).bit_length()))
        if length not in self.prompts:
            self.prompts[length] = Prompts(self.cached, length)
            self.prompts[length].set_train(False)
        ids = np.zeros((self.cached.batch, length), np.int32)
        for row, prompt in zip(ids, prompts):
            row[:len(prompt)] = prompt
        ends = np.ones(self.cached.batch, np.int32)
        ends[:len(prompts)] = [len(prompt) for prompt in prompts]
        last = np.arange(self.cached.batch, dtype=np.int32) * length + ends - 1
        return self.prompts[length](Tensor(ids), Tensor(last)).asnumpy()

    def __call__(self, prompts: Sequence[Sequence[int]], new: int, stop: frozenset[int] = frozenset(),
                 temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> list[list[int]]:
        """Gives up to `new` further ids of each prompt, without the one that ends it.

        Args:
            prompts: Ids of each.
            new: At most so many.
            stop: Ids that end an answer.
            temperature: 0 takes the most likely token; above, logits are divided by it and a token is drawn.
            top_p: Draws from the most likely tokens that have this probability together (Holtzman et al., 2020).
            seed: Of the drawing; a text's draws do not depend on what stands beside it.

        Raises:
            UserError: A prompt is empty, or too long for the room that there is.
        """
        longest, shortest = max(map(len, prompts)), min(map(len, prompts))
        if shortest == 0:
            raise UserError("a prompt is empty: give it at least one token")
        if longest + new > self.cached.room:
            raise UserError(f"a prompt of {longest} tokens and {new} new ones do not fit into {self.cached.room}: ask "
                            "for fewer, or shorten the prompt")
        size, out = self.cached.batch, []
        for start in range(0, len(prompts), size):
            out += self.continued(prompts[start:start + size], new, stop, temperature, top_p, [seed, start])
        return out

    def continued(self, prompts: Sequence[Sequence[int]], new: int, stop: frozenset[int], temperature: float,
                  top_p: float, seed: list[int]) -> list[list[int]]:
        """The same for one batch."""
        draws = [np.random.default_rng([seed[0], seed[1] + i]) for i in range(len(prompts))]
        positions = np.zeros(self.cached.batch, np.int32)
        positions[:len(prompts)] = [len(prompt) for prompt in prompts]
        ids = np.zeros(self.cached.batch, np.int32)
        answers: list[list[int]] = [[] for _ in prompts]
        ended = [new == 0 for _ in prompts]
        logits = self.read(prompts) if new else np.zeros(0)
        while not all(ended):
            for i in range(len(prompts)):
                if ended[i]:
                    continue
                ids[i] = pick(logits[i], temperature, top_p, draws[i])
                if int(ids[i]) in stop:
                    ended[i] = True
                else:
                    answers[i].append(int(ids[i]))
                    ended[i] = len(answers[i]) == new
            if not all(ended):
                logits = self.next(Tensor(ids), Tensor(positions)).asnumpy()
                # A text that has ended stays where it is.
                positions[:len(prompts)] += ~np.array(ended)
        return answers


def pick(logits: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """The next id."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    chances = np.exp(scaled)
    chances /= chances.sum()
    if top_p < 1:
        order = np.argsort(-chances, kind="stable")
        # Those before which less than top_p lies; the most likely one always.
        kept = order[np.cumsum(chances[order]) - chances[order] < top_p]
        chances = np.where(np.isin(np.arange(len(chances)), kept), chances, 0)
        chances /= chances.sum()
    return int(rng.choice(len(chances), p=chances))
