"""VGG as MindSpore cells, with mindcv's names, which are torchvision's too: features.0, classifier.6.

Simonyan and Zisserman, https://arxiv.org/abs/1409.1556, table 1, columns A, B, D and E.
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops

# Channels of the convolutions of each of the five stages; each ends with pooling.
STAGES = {"vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
          "vgg13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
          "vgg16": ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
          "vgg19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)}
WIDTH = 4096


class VGG(nn.Cell):
    """Pictures (batch, 3, size, size), normalised, to a number for each class (batch, classes).

    Weights start as He et al. have it for convolutions (normal, variance 2 / fan out), 0.01 times standard normal in
    the classifier; the same seed gives the same weights.

    Args:
        stages: Channels, as in STAGES.
        classes: How many.
        size: Height and width of the pictures, a multiple of 2 to the number of stages.
        width: Of the classifier.
        seed: Of the weights.
    """

    head_path, targets = "classifier.6", r"features\.\d+|classifier\.[03]"

    def __init__(self, stages: tuple[tuple[int, ...], ...], classes: int, size: int = 224, width: int = WIDTH,
                 seed: int = 0) -> None:
        super().__init__()
        rng, layers, inputs = np.random.default_rng(seed), [], 3
        for stage in stages:
            for outputs in stage:
                weight = math.sqrt(2 / (9 * outputs)) * rng.standard_normal((outputs, inputs, 3, 3), np.float32)
                layers += [nn.Conv2d(inputs, outputs, 3, pad_mode="pad", padding=1, has_bias=True,
                                     weight_init=Tensor(weight.astype(np.float32)), bias_init="zeros"), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, 2))
        self.flat = inputs * (size // 2 ** len(stages)) ** 2

        def dense(inputs: int, outputs: int) -> nn.Dense:
            weight = np.float32(0.01) * rng.standard_normal((outputs, inputs), np.float32)
            return nn.Dense(inputs, outputs, Tensor(weight), "zeros")

        self.features = nn.SequentialCell(layers)
        self.classifier = nn.SequentialCell([
            dense(self.flat, width), nn.ReLU(), nn.Dropout(p=0.5), dense(width, width), nn.ReLU(),
            nn.Dropout(p=0.5), dense(width, classes)])

    def embed(self, x: Tensor) -> Tensor:
        """What the last layer sees: (batch, width)."""
        x = ops.reshape(self.features(x), (x.shape[0], self.flat))
        for i in range(6):
            x = self.classifier[i](x)
        return x

    def construct(self, x: Tensor) -> Tensor:
        return self.classifier[6](self.embed(x))
