"""Models of mindcv 0.3, in small."""
from __future__ import annotations

import importlib.util

import pytest
from whole import go_through, pictures

import mindpet_lite as mp

pytestmark = [pytest.mark.integrations, pytest.mark.skipif(
    importlib.util.find_spec("mindcv") is None, reason="needs mindcv 0.3.0: make integrations")]


def vgg():
    from mindcv.models.vgg import VGG
    return VGG("vgg11", num_classes=5)


def resnet():
    from mindcv.models.resnet import BasicBlock, ResNet
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


def vit():
    from mindcv.models.vit import VisionTransformer
    return VisionTransformer(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=5)


def swin():
    from mindcv.models.swintransformer import SwinTransformer
    return SwinTransformer(image_size=32, patch_size=2, num_classes=5, embed_dim=32, depths=[1, 1], num_heads=[2, 4],
                           window_size=4)


def call(net, x):
    return net(x)


# Model, size of its pictures, targets, and how many layers they are.
CASES = {"resnet": (resnet, 32, ["conv1", "conv2"], 9), "resnet-linear": (resnet, 32, "all-linear", 1),
         "vit": (vit, 32, ["qkv"], 2), "vit-linear": (vit, 32, "all-linear", 9),
         "vit-patches": (vit, 32, ["patch_embed.proj"], 1), "swin": (swin, 32, ["q", "v"], 4),
         "swin-linear": (swin, 32, "all-linear", 14)}


@pytest.mark.parametrize("name", CASES)
def test_a_model_goes_through_all_steps(name, mode, tmp_path):
    make, size, targets, count = CASES[name]
    go_through(make, call, (pictures(2, 3, size, size),), mp.LoraConfig(4, 8, target_modules=targets), tmp_path, count)


def test_vgg(graph_mode, tmp_path):
    go_through(vgg, call, (pictures(1, 3, 224, 224),),
               mp.LoraConfig(4, 8, target_modules=["features.0", "features.3", "classifier.0"]), tmp_path, 3)
