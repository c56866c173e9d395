"""The convolutions for which CPU has slow kernels, as matrix products; other devices take MindSpore's own.

MindSpore's convolution of each channel alone, and that of the three channels of a picture, take 10 to 20 times as long
on CPU as the same sums written as products. The values are the operators' within float32 rounding, and so are the
gradients, of pictures and of weights.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


def on_cpu() -> bool:
    """Whether the cells built now are for CPU."""
    return ms.get_context("device_target") == "CPU"


def convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int, size: int) -> nn.Conv2d:
    """A convolution without bias for the device that is set now, padded as TensorFlow does.

    Args:
        inputs: Channels.
        outputs: Channels.
        kernel: Width.
        stride: Of both axes.
        groups: 1, or as many as channels.
        size: Height and width of what comes in; for any other size give nn.Conv2d.
    """
    kind = nn.Conv2d
    if on_cpu() and kernel > 1:
        kind = _CpuConv2d if groups == 1 else _CpuDepthwiseConv2d
    layer = kind(inputs, outputs, kernel, stride, pad_mode="same", group=groups, has_bias=False)
    if kind is not nn.Conv2d:
        layer.prepare(size)
    return layer


def reached(kernel: int, stride: int, size: int) -> np.ndarray:
    """The row that each output sees through each row of the kernel: (outputs, kernel); `size` is the row of zeros."""
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + kernel - size, 0) // 2
    rows = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] - before
    return np.where((rows >= 0) & (rows < size), rows, size).astype(np.int32)


class _CpuConv2d(nn.Conv2d):
    """All channels: what each output sees is laid out as a column, and the kernels are multiplied by all columns."""

    def prepare(self, size: int) -> None:
        """Makes the table of what each output sees."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        table = reached(kernel, stride, size)
        self.size, self.side, self.width = size, len(table), kernel
        self.table, self.product = Tensor(table.reshape(-1)), ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        count, channels, side, width = x.shape[0], x.shape[1], self.side, self.width
        x = ops.concat((x, ops.fill(x.dtype, (count, channels, 1, self.size), 0.0)), 2)
        x = ops.concat((x, ops.fill(x.dtype, (count, channels, self.size + 1, 1), 0.0)), 3)
        seen = ops.gather(ops.gather(x, self.table, 2), self.table, 3)
        seen = ops.transpose(ops.reshape(seen, (count, channels, side, width, side, width)), (1, 3, 5, 0, 2, 4))
        kernels = ops.reshape(self.weight, (self.out_channels, -1))
        y = self.product(kernels, ops.reshape(seen, (channels * width * width, -1)))
        return ops.transpose(ops.reshape(y, (self.out_channels, count, side, side)), (1, 0, 2, 3))


class _CpuDepthwiseConv2d(nn.Conv2d):
    """Each channel alone: the rows that an output row sees, side by side, times a band matrix made of the kernel."""

    def prepare(self, size: int) -> None:
        """Makes the tables of rows and of the band."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        table = reached(kernel, stride, size)
        # band[j, i, o] is 1 where output o sees input i through column j of the kernel.
        band = (table.T[:, None] == np.arange(size)[None, :, None]).astype(np.float32)
        self.size, self.side, self.width = size, len(table), kernel
        self.table, self.band = Tensor(table.reshape(-1)), Tensor(band.reshape(kernel, -1))
        self.product, self.products = ops.MatMul(), ops.BatchMatMul()

    def construct(self, x: Tensor) -> Tensor:
        count, channels, size, side, width = x.shape[0], x.shape[1], self.size, self.side, self.width
        bands = self.product(ops.reshape(self.weight, (channels * width, width)), self.band)
        x = ops.concat((ops.transpose(x, (1, 0, 2, 3)), ops.fill(x.dtype, (channels, count, 1, size), 0.0)), 2)
        rows = ops.reshape(ops.gather(x, self.table, 2), (channels, count * side, width * size))
        y = self.products(rows, ops.reshape(bands, (channels, width * size, side)))
        return ops.transpose(ops.reshape(y, (channels, count, side, side)), (1, 0, 2, 3))
