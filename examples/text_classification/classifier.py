"""A classifier of sentences: BERT, the mean of its last states over the tokens, a linear head; its loss and its use."""

import mindspore as ms
import numpy as np
from bert import BertModel
from mindspore import Tensor, nn, ops
from token_batches import Encoded, in_order

HEAD = "classifier"


class Classifier(nn.Cell):
    """W mean(h) + b for ids and mask (batch, length): (batch, labels). The mean is that of all-MiniLM-L6-v2.

    Args:
        bert: The encoder.
        labels: How many labels there are.
        seed: The head's weight starts as 0.02 times standard normal numbers from it, its bias as 0.
    """

    def __init__(self, bert: BertModel, labels: int, seed: int = 0) -> None:
        super().__init__()
        width = bert.config.hidden_size
        start = 0.02 * np.random.default_rng([seed, 3]).standard_normal((labels, width))
        self.bert = bert
        self.classifier = nn.Dense(width, labels, Tensor(start.astype(np.float32)), "zeros")
        self.mean = ops.BatchMatMul()

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean of the last states over the tokens of each sentence: (batch, hidden)."""
        shares = mask / mask.sum(1, keepdims=True)
        return self.mean(ops.expand_dims(shares, 1), self.bert(ids, mask))[:, 0]

    def construct(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.classifier(self.features(ids, mask))


class Features(nn.Cell):
    """The features alone, as a net to call."""

    def __init__(self, net: Classifier) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.net.features(ids, mask)


class ClassifierLoss(nn.Cell):
    """Mean cross-entropy of a batch, and what a method adds to it.

    Args:
        net: The classifier.
        more: A cell without inputs whose result is added, such as AdaLoRA's regularisation; None for nothing.
    """

    def __init__(self, net: Classifier, more: nn.Cell | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.more = net, more
        self.loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")

    def construct(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(self.net(ids, mask), labels)
        return loss if self.more is None else loss + self.more()


def outputs(net: nn.Cell, encoded: Encoded, lengths: tuple[int, ...], size: int) -> np.ndarray:
    """What a net gives for every sentence, in their order: one call for each batch of one length."""
    found: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for length, rows, count in in_order(encoded.counts, lengths, size):
        found.append(net(*map(ms.Tensor, encoded.batch(rows, length))).asnumpy()[:count])
        places.append(rows[:count])
    return np.concatenate(found)[np.argsort(np.concatenate(places))]


def accuracy(net: nn.Cell, encoded: Encoded, labels: np.ndarray, lengths: tuple[int, ...], size: int) -> float:
    """The share of sentences whose label is the net's highest number."""
    return float(np.mean(outputs(net, encoded, lengths, size).argmax(1) == labels))
