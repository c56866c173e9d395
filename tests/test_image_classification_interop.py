"""Our EfficientNet-Lite0 beside PyTorch's: the real weights give the same outputs; PEFT reads our adapter."""
from __future__ import annotations

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

pytestmark = pytest.mark.interop
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

HERE = Path(__file__).resolve().parent.parent / "examples" / "image_classification"
sys.path.append(str(HERE))

import efficientnet_lite  # noqa: E402
import image_nets  # noqa: E402
import torch_file  # noqa: E402
from image_common import UserError  # noqa: E402
from image_folder import load  # noqa: E402

from mindpet_lite import LoraConfig, freeze_statistics, get_pet_model, save_adapter  # noqa: E402


class Same(torch.nn.Conv2d):
    """A convolution padded as TensorFlow does."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(torch.nn.functional.pad(x, pads))


class Block(torch.nn.Module):
    def __init__(self, inputs, kernel, stride, expansion, outputs):
        super().__init__()
        wide, self.adds = inputs * expansion, stride == 1 and inputs == outputs
        if expansion > 1:
            self._expand_conv = Same(inputs, wide, 1, bias=False)
            self._bn0 = torch.nn.BatchNorm2d(wide, 1e-3)
        self._depthwise_conv = Same(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = torch.nn.BatchNorm2d(wide, 1e-3)
        self._project_conv = Same(wide, outputs, 1, bias=False)
        self._bn2 = torch.nn.BatchNorm2d(outputs, 1e-3)

    def forward(self, x):
        y = self._bn0(self._expand_conv(x)).clamp(0, 6) if hasattr(self, "_expand_conv") else x
        y = self._bn1(self._depthwise_conv(y)).clamp(0, 6)
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class Lite0(torch.nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2, bias=False), torch.nn.BatchNorm2d(32, 1e-3)
        self._blocks, inputs = torch.nn.Sequential(), 32
        for count, kernel, stride, expansion, outputs in efficientnet_lite.LITE0:
            for number in range(count):
                self._blocks.append(Block(inputs, kernel, 1 if number else stride, expansion, outputs))
                inputs = outputs
        self._conv_head, self._bn1 = Same(320, 1280, 1, bias=False), torch.nn.BatchNorm2d(1280, 1e-3)
        self._fc = torch.nn.Linear(1280, classes)

    def forward(self, x):
        x = self._blocks(self._bn0(self._conv_stem(x)).clamp(0, 6))
        return self._fc(self._bn1(self._conv_head(x)).clamp(0, 6).mean((2, 3)))


@pytest.fixture(scope="module")
def weights() -> Path:
    try:
        return efficientnet_lite.lite0_weights()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(weights) -> torch.nn.Module:
    net = Lite0()
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


def test_our_reader_finds_what_torch_finds(weights, tmp_path):
    expected = torch.load(weights, weights_only=True)
    torch.save(expected, tmp_path / "new.pth")
    for path in (weights, tmp_path / "new.pth"):
        found = torch_file.read_tensors(path)
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)


@pytest.mark.parametrize("size", [224, 128, 99])
def test_the_real_weights_give_torchs_outputs(mode, weights, theirs, size):
    net = image_nets.EfficientNetLite(1000, size)
    image_nets.fill(net, weights)
    x = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(net.set_train(False)(ms.Tensor(x)).asnumpy(), expected, atol=1e-4)


def test_a_penguin_is_a_king_penguin(graph_mode, weights):
    net = image_nets.EfficientNetLite(1000, 224)
    image_nets.fill(net, weights)
    pictures = load([HERE / "data" / "heldout" / "bird" / "penguin-noto.png"], 224)
    assert net.set_train(False)(ms.Tensor(pictures)).asnumpy().argmax() == 145  # of ImageNet's 1000 classes


def test_peft_reads_our_adapter(graph_mode, weights, tmp_path):
    net = image_nets.make_net("efficientnet-lite0", 9, 64, weights)
    freeze_statistics(net)
    get_pet_model(net, LoraConfig(lora_rank=4, lora_alpha=8, target_modules=rf"(.*\.)?({net.targets})",
                                  modules_to_save=["_fc"]))
    rng = np.random.default_rng(0)
    for item in net.trainable_params():
        item.set_data(ms.Tensor(0.05 * rng.standard_normal(item.shape).astype(np.float32)))
    base = Lite0(9)
    tensors = {name: value for name, value in torch.load(weights, weights_only=True).items() if "_fc" not in name}
    base.load_state_dict(tensors, strict=False)
    model = peft.PeftModel.from_pretrained(base, str(save_adapter(net, tmp_path / "adapter"))).eval()
    x = rng.standard_normal((2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(x)).numpy()
    np.testing.assert_allclose(net.set_train(False)(ms.Tensor(x)).asnumpy(), expected, atol=1e-4)
