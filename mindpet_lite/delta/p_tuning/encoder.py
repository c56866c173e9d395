"""The encoder of P-tuning: an LSTM in both directions, in common operators and in numbers."""
from __future__ import annotations

from collections.abc import Mapping

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

TABLE, LSTM, MLP = "mindpet_delta_p_tuning_embedding", "mindpet_delta_p_tuning_lstm", "mindpet_delta_p_tuning_mlp"


class BothWays(nn.Cell):
    """One layer of an LSTM in both directions: (rows, inputs) to (rows, 2 · size).

    `weight_ih` (2, 4 · size, inputs), `weight_hh` (2, 4 · size, size), `bias_ih` and `bias_hh` (2, 4 · size): forward,
    then backward, each with the gates i, f, g, o. The operators are the common ones: MindSpore's LSTM computes in
    float16 on Ascend.
    """

    def __init__(self, rows: int, inputs: int, size: int, dtype: mindspore.dtype) -> None:
        super().__init__()
        self.size = size
        for name, shape in lstm_shapes(inputs, size).items():
            setattr(self, name, Parameter(Tensor(np.zeros(shape, np.float32), dtype), name=name))
        # tanh(g) is 2 σ(2 g) - 1: one sigmoid for all gates. CPU's tanh is off by 1e-4, its sigmoid is exact.
        self.doubled = Tensor(np.repeat(np.array([1, 1, 2, 1], np.float32), size).reshape(-1, 1), dtype)
        self.product = ops.BatchMatMul(transpose_b=True)
        self.cut, self.cut_rows = ops.Split(axis=-1, output_num=4), ops.Split(axis=1, output_num=rows)

    def construct(self, x: Tensor) -> Tensor:
        """Return the hidden states of both directions."""
        both = ops.concat((ops.expand_dims(x, 0), ops.expand_dims(ops.flip(x, (0,)), 0)), 0)
        weight, recurrent = self.weight_ih * self.doubled, self.weight_hh * self.doubled
        bias = ops.expand_dims((self.bias_ih + self.bias_hh) * ops.reshape(self.doubled, (-1,)), 1)
        hidden = cell = ops.zeros((2, 1, self.size), x.dtype)
        states: tuple[Tensor, ...] = ()
        for row in self.cut_rows(self.product(both, weight) + bias):
            enter, forget, value, leave = self.cut(ops.sigmoid(row + self.product(hidden, recurrent)))
            cell = forget * cell + enter * (2 * value - 1)
            hidden = leave * (2 * ops.sigmoid(2 * cell) - 1)
            states += (hidden,)
        forward, backward = ops.concat(states, 1)
        return ops.concat((forward, ops.flip(backward, (0,))), -1)


def lstm_shapes(inputs: int, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the Parameters of `BothWays`."""
    return {"weight_ih": (2, 4 * size, inputs), "weight_hh": (2, 4 * size, size), "bias_ih": (2, 4 * size),
            "bias_hh": (2, 4 * size)}


def encoded(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the rows that the tensors of an encoder, by our names, give; in their type."""
    rows, number = tensors[TABLE], 0
    while f"{LSTM}.{number}.weight_ih" in tensors:
        ways = []
        for way in range(2):
            w, u, b, d = (tensors[f"{LSTM}.{number}.{name}"][way]
                          for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            hidden = cell = np.zeros(u.shape[1], rows.dtype)
            states = []
            for x in rows[::-1] if way else rows:
                enter, forget, value, leave = np.split(w @ x + b + u @ hidden + d, 4)
                cell = _sigmoid(forget) * cell + _sigmoid(enter) * np.tanh(value)
                hidden = _sigmoid(leave) * np.tanh(cell)
                states.append(hidden)
            ways.append(np.stack(states[::-1] if way else states))
        rows, number = np.concatenate(ways, 1), number + 1
    layers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith(MLP) and name.endswith("weight"))
    for layer in layers:
        rows = rows @ tensors[f"{MLP}.{layer}.weight"].T + tensors[f"{MLP}.{layer}.bias"]
        rows = rows if layer == layers[-1] else np.maximum(rows, 0)
    return rows


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
