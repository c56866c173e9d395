"""Every layout of the U-Net's fixture holds the same adapter; each format reads what others write."""
from __future__ import annotations

import json

import files
import numpy as np
import pytest
from adapters import A, B, assert_same, read, same_tensors

from mindpet_lite.formats import diffusers, kohya, mindformers, mindpet, peft
from mindpet_lite.formats.detect import detect
from mindpet_lite.formats.placed import placed

# By file: the codec, and alpha, where a file without one means alpha = rank and diffusers' converter wrote it so.
LAYOUTS = {"diffusers/pytorch_lora_weights": (diffusers, 8), "diffusers_adapter/pytorch_lora_weights": (diffusers, 8),
           "diffusers_lora_down/pytorch_lora_weights": (diffusers, 8),
           "diffusers_no_metadata/pytorch_lora_weights": (diffusers, 4),
           "diffusers_old/pytorch_lora_weights": (diffusers, 4),
           "kohya/lora": (kohya, 8), "kohya/lora_diffusers_util": (kohya, 4)}


@pytest.fixture
def unet(shared):
    return shared / "fixtures" / "peft" / "unet_tiny"


@pytest.fixture
def reference(unet):
    tensors, _ = read(unet / "peft" / "adapter_model.safetensors")
    return peft.decode(tensors, json.loads((unet / "peft" / "adapter_config.json").read_text()))


@pytest.mark.parametrize("file", LAYOUTS)
def test_every_layout_is_the_same_adapter(unet, reference, file):
    codec, alpha = LAYOUTS[file]
    tensors, metadata = read(unet / f"{file}.safetensors")
    assert detect(tensors, metadata, None) == codec.__name__.rpartition(".")[2]
    state = codec.decode(tensors, metadata)
    assert_same(state, reference, settings=alpha == 8, config=False)
    assert all(layer.settings == {"lora_rank": 4, "lora_alpha": alpha, "lora_dropout": 0.0}
               for layer in state.layers.values())
    assert_same(codec.decode(*codec.encode(state)), state)


@pytest.mark.parametrize("file", [file for file, (codec, _) in LAYOUTS.items() if codec is kohya])
def test_the_net_settles_kohyas_underscores(unet, reference, file):
    tensors, metadata = read(unet / f"{file}.safetensors")
    paths = [name.rpartition(".")[0] for name in read(unet / "base" / "diffusion_pytorch_model.safetensors")[0]]
    assert_same(kohya.decode(tensors, metadata, paths), reference, settings=False, config=False)
    behind = [f"model.unet.{path}" for path in paths]
    state = placed(kohya.decode(tensors, metadata, behind), behind)
    assert set(state.layers) == {f"model.unet.{path}" for path in reference.layers}


def test_keys_that_others_read(reference):
    tensors, metadata = diffusers.encode(reference)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert np.array_equal(tensors[f"unet.{path}.lora_A.weight"], reference.layers[path].tensors[A])
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"], config["unet.peft_type"]) == (4, 8, "LORA")
    tensors, metadata = kohya.encode(reference)
    name = f"lora_unet_{path.replace('.', '_')}"
    assert np.array_equal(tensors[f"{name}.lora_up.weight"], reference.layers[path].tensors[B])
    assert tensors[f"{name}.alpha"] == 8 and tensors[f"{name}.alpha"].shape == ()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8.0")
    tensors, _ = mindpet.encode(reference)
    assert np.array_equal(tensors[f"{path}.{A}"], reference.layers[path].tensors[A])


def test_the_file_of_diffusers_itself(unet, reference):
    wanted, metadata = read(unet / "diffusers" / "pytorch_lora_weights.safetensors")
    same_tensors(diffusers.encode(reference)[0], wanted, "the file")
    written = diffusers.encode(diffusers.decode(wanted, metadata))[1]["lora_adapter_metadata"]
    assert json.loads(written) == json.loads(metadata["lora_adapter_metadata"])


@pytest.mark.parametrize("codec", [diffusers, kohya, mindformers])
def test_pefts_config_comes_back_from_other_formats(unet, reference, codec):
    config = json.loads((unet / "peft" / "adapter_config.json").read_text())
    found = codec.decode(*codec.encode(reference))
    assert_same(found, reference)
    assert peft.encode(found)[1] == config


@pytest.mark.parametrize("name", [
    "lora_plain", "lora_rslora", "lora_dora", "lora_rank_alpha_pattern", "lora_lora_bias", "lora_init_pissa",
    "lora_regex"])
def test_llamas_through_diffusers(shared, name):
    state = files.load(shared / "fixtures" / "peft" / "llama_tiny" / name)
    assert_same(diffusers.decode(*diffusers.encode(state)), state)


def test_detect(unet, shared):
    folder = shared / "fixtures" / "peft" / "llama_tiny" / "lora_plain"
    config = json.loads((folder / "adapter_config.json").read_text())
    names = list(read(folder / "adapter_model.safetensors")[0])
    assert detect(names, {}, config) == "peft" and detect(names, {}, None) == "peft"
    assert detect([f"x.{A}", f"x.{B}"], {}, None) == "mindpet"
    assert detect(["mindpet_delta_lora_A", "mindpet_delta_lora_B"], {}, None) == "mindpet"
    assert detect([f"x.{A}", f"x.{B}"], {}, {"r": 2, "lora_alpha": 4}) == "mindformers"
    assert detect(["x.lora_a", "x.lora_b"], {}, None) == "mindformers"
    assert detect(["a.bias"], {"mindpet_lite": "{}"}, None) == "mindpet"
    assert detect(["a.bias"], {}, {"format": "mindpet_lite"}) == "mindpet_lite"
    assert detect(["x.anything"], {}, {"peft_type": "IA3"}) == "peft"
    for names in (["a.weight"], []):
        with pytest.raises(ValueError, match="no adapter of a format that can be read"):
            detect(names, {}, None)
