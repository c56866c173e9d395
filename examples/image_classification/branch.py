"""A low-rank branch beside a whole net, net(x) + x A B, as a cell that is saved, scaled and merged like any other."""

import numpy as np
from mindspore import Tensor, nn, ops

BRANCH = "branch"


class WithBranch(nn.Cell):
    """A net and beside it a linear layer on the same pictures: net(x) + W flat(x), where W starts as 0.

    The layer is an nn.Dense called `branch`, so that `get_pet_model` puts a LoRA on it as on any other: with A and B
    the net gives net(x) + s B A flat(x), which is the tutorials' x A B. To `save_adapter`, `set_lora_scale` and
    `adapters_disabled` it is a layer like all others. `merge` writes s B A into W, and the branch stays beside the
    net: no layer of a net that is not linear could take it up.

    Args:
        net: Pictures (batch, ...) to (batch, outputs).
        inputs: Numbers of a picture.
        outputs: Of the net.
    """

    def __init__(self, net: nn.Cell, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net, self.inputs = net, inputs
        # As numbers: an initializer would be drawn again for every net.
        self.branch = nn.Dense(inputs, outputs, Tensor(np.zeros((outputs, inputs), np.float32)), has_bias=False)

    def embed(self, x: Tensor) -> Tensor:
        """What the net's last layer sees."""
        return self.net.embed(x)

    def construct(self, x: Tensor) -> Tensor:
        return self.net(x) + self.branch(ops.reshape(x, (x.shape[0], self.inputs)))
