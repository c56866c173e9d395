"""The nets by name, and how they get their weights."""

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from branch import WithBranch
from efficientnet_lite import EfficientNetLite, lite0_weights
from image_common import UserError, explained
from mindspore import Tensor, nn
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch_file import read_tensors
from vgg import STAGES, VGG

from mindpet_lite.names.parameter_names import pytorch_name

LITE0, RANDOM = "efficientnet-lite0", "random"
NETS = (LITE0, *STAGES)
# What counts batches, which nothing here computes with.
UNUSED = "num_batches_tracked"


def make_net(name: str, classes: int, size: int, weights: Path | None) -> nn.Cell:
    """A net with its weights, and a new last layer.

    Args:
        name: One of NETS.
        classes: Outputs of the last layer.
        size: Height and width of the pictures.
        weights: Their file; `random` for random ones; without, those of the installed package.

    Raises:
        UserError: There are no such weights, or they are those of another net; the net has no pictures of this size.
    """
    if name == LITE0:
        net: nn.Cell = EfficientNetLite(classes, size)
    else:
        if size % 32:
            raise UserError(f"{name} halves a picture five times: --size must be a multiple of 32, got {size}")
        if weights is None:
            raise UserError(f"no package has weights of {name}: give --weights a file with names of mindcv's or "
                            f"torchvision's, or --weights {RANDOM} for a trial")
        net = VGG(STAGES[name], classes, size)
    if str(weights) != RANDOM:
        fill(net, weights or lite0_weights(), net.head_path)
    return net


def with_branch(net: nn.Cell, classes: int, size: int) -> WithBranch:
    """The net with a low-rank branch beside it."""
    return WithBranch(net, 3 * size * size, classes)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by PyTorch's names: of torch.save's, safetensors, or a MindSpore checkpoint.

    Raises:
        UserError: It is none of them, or is damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}")
    with explained(f"the weights in {path} cannot be used", ValueError, TypeError, SafetensorError):
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".ckpt":
            return {pytorch_name(name): item.asnumpy() for name, item in ms.load_checkpoint(str(path)).items()}
        return read_tensors(path)


def fill(net: nn.Cell, path: Path, without: str = "") -> None:
    """Gives a net the weights of a file; names and shapes are checked before any is set.

    Args:
        net: Any whose names are those of the file.
        path: See `read_weights`.
        without: The path of a layer that keeps its own values, whatever the file has for it.

    Raises:
        UserError: The file cannot be read, may do more than hold tensors, or fits another net.
    """
    def counts(name: str) -> bool:
        return not name.endswith(UNUSED) and not (without and name.startswith(f"{without}."))

    tensors: dict[str, Any] = {name: value for name, value in read_weights(path).items() if counts(name)}
    wanted = {pytorch_name(name): item for name, item in net.parameters_and_names() if counts(name)}
    other = f"the weights in {path} are those of another net"
    strange = sorted(tensors.keys() ^ wanted.keys())
    if strange:
        raise UserError(f"{other}: {strange[0]} is in {'the file' if strange[0] in tensors else 'the net'} only")
    for name, item in wanted.items():
        if tensors[name].shape != tuple(item.shape):
            raise UserError(f"{other}: {name} is {tensors[name].shape} there, {tuple(item.shape)} here")
    for name, item in wanted.items():
        item.set_data(Tensor(np.asarray(tensors[name], np.float32)))
