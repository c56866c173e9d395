"""Files between a model of mindone and the model of the same weights in PyTorch: PEFT's and diffusers', out and in."""
from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from mindone_models import CASES
from mindspore import Tensor
from whole import Called

import mindpet_lite as mp
from mindpet_lite.graph.adapters import deltas
from mindpet_lite.names.parameter_names import pytorch_name

MISSING = [name for name in ("mindone", "torch", "peft", "diffusers") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.integrations, pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: make integrations")]

# The part of a pipeline that each model of diffusers is, and the pipeline.
PARTS = {"unet": ("unet", "StableDiffusionPipeline"), "sd3": ("transformer", "StableDiffusion3Pipeline"),
         "flux": ("transformer", "FluxPipeline")}


@pytest.fixture(scope="module", autouse=True)
def library():
    import mint_on_cpu
    mint_on_cpu.install()
    mint_on_cpu.mend_mindone()


def pair(name):
    """Return mindone's model and PyTorch's of the same class, config and weights."""
    import diffusers
    import torch
    import transformers
    net = CASES[name][0]().set_train(False)
    kind = type(net).__name__
    torch.manual_seed(0)
    model = (getattr(transformers, kind)(net.config) if hasattr(transformers, kind)
             else getattr(diffusers, kind).from_config(dict(net.config))).eval()
    with torch.no_grad():
        for item in model.parameters():
            # Norms and biases too get values that differ from one to the next.
            item.add_(torch.randn_like(item) * 0.05)
    values = {path: item.detach().numpy() for path, item in model.named_parameters()}
    items = {pytorch_name(path): item for path, item in net.parameters_and_names()}
    assert values.keys() <= items.keys()
    for path, value in values.items():
        assert items[path].shape == value.shape, path
        items[path].set_data(Tensor(value))
    return net, model


def ours(name, net):
    _, call, inputs, *_ = CASES[name]
    return Called(net, call)(*inputs).asnumpy()


def theirs(name, model):
    import torch
    _, call, inputs, *_ = CASES[name]
    values = (torch.from_numpy(item.asnumpy()) for item in inputs)
    with torch.no_grad():
        return call(model, *(item if item.is_floating_point() else item.long() for item in values)).numpy()


def assert_close(found, wanted):
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def lora_of_peft(name):
    import peft
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=CASES[name][3], fan_in_fan_out=name.startswith("gpt2"))


def vary(model):
    """Give PEFT's factors random values, and return how many there are."""
    import torch
    factors = [item for path, item in model.named_parameters() if "lora_" in path]
    with torch.no_grad():
        for item in factors:
            item.copy_(torch.randn_like(item) / 10)
    return len(factors)


def adapted(name, net):
    """Adapt a net, give the factors random values, and return its output."""
    mp.get_pet_model(net, mp.LoraConfig(2, 3, target_modules=CASES[name][3]))
    generator = np.random.default_rng(3)
    for item in net.trainable_params():
        item.set_data(Tensor((generator.standard_normal(item.shape) / 10).astype(np.float32)))
    return ours(name, net)


@pytest.mark.parametrize("name", CASES)
def test_pefts_directory_out_and_in(name, pynative_mode):
    import peft
    net, model = pair(name)
    plain = theirs(name, model)
    assert_close(ours(name, net), plain)
    tuned = peft.get_peft_model(model, lora_of_peft(name)).eval()
    assert vary(tuned) == 2 * CASES[name][4]
    tuned.save_pretrained("theirs")
    wanted = theirs(name, tuned)
    assert np.abs(wanted - plain).max() > 1e-3 * np.abs(plain).max()
    assert len(deltas(mp.load_adapter(net, "theirs"))) == CASES[name][4]
    assert_close(ours(name, net), wanted)

    net, model = pair(name)
    wanted = adapted(name, net)
    mp.save_adapter(net, "ours")
    assert_close(theirs(name, peft.PeftModel.from_pretrained(model, "ours").eval()), wanted)


@pytest.mark.parametrize("name", PARTS)
def test_diffusers_own_files_out_and_in(name, pynative_mode):
    """The file of one model, and the file of a pipeline, where each key names the part."""
    import diffusers
    import peft
    part, pipeline = PARTS[name]
    net, model = pair(name)
    model.add_adapter(lora_of_peft(name))
    assert vary(model) == 2 * CASES[name][4]
    wanted = theirs(name, model)
    model.save_lora_adapter("model")
    getattr(diffusers, pipeline).save_lora_weights("pipeline", **{
        f"{part}_lora_layers": peft.get_peft_model_state_dict(model),
        f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict()})
    for folder in ("model", "pipeline"):
        net, model = pair(name)
        mp.load_adapter(net, f"{folder}/pytorch_lora_weights.safetensors")
        assert len(deltas(net)) == CASES[name][4]
        assert_close(ours(name, net), wanted)

    net, model = pair(name)
    wanted = adapted(name, net)
    mp.save_adapter(net, "ours.safetensors", format="diffusers", component=part)
    # Of a file that is given without `weight_name`, diffusers does not read the config.
    model.load_lora_adapter(".", prefix=part, weight_name="ours.safetensors")
    assert_close(theirs(name, model), wanted)
