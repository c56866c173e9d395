"""A Wukong checkpoint and a Stable Diffusion 1.5 folder at their real sizes: written, loaded by the example, compared.

    python benchmarks/full_checkpoints.py                       # both; 4.3 GB and 2.1 GB of disk, one after the other
    python benchmarks/full_checkpoints.py --kind diffusers --folder /big/disk

The weights are random, each parameter's from its name, so that every one is compared with what was written. The
checkpoint is float32 and written by MindSpore; the folder is float16, its U-Net in two shards. Writing and loading are
processes of their own. Memory is the largest resident size of the loading process, above that after the imports.
"""
import argparse
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from mindpet_lite import yaml_files
from mindpet_lite.formats.files import to_header

WUKONG = Path(__file__).resolve().parent.parent / "examples" / "wukong"
sys.path.insert(0, str(WUKONG))

CONFIGS = {
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3]},
    "vae/config.json": {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
        "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4},
    "text_encoder/config.json": {
        "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
        "num_hidden_layers": 12, "vocab_size": 49408},
    "scheduler/scheduler_config.json": {
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000},
    "tokenizer/vocab.json": {"<|startoftext|>": 49406, "<|endoftext|>": 49407},
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
}
NAMES = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
SHARDS = {"unet": 2, "text_encoder": 1, "vae": 1}
HALF = np.dtype("<f2")


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32) - np.float32(0.5)


def peak() -> int:
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def wukong_model(folder: Path) -> dict:
    config = yaml_files.read_yaml(WUKONG / "configs" / "wukong_full_lora.yaml")
    return {**config["model"], "vocabulary": str(folder / "vocab.txt")}


def write_wukong(folder: Path) -> None:
    import mindspore as ms
    from base import MODELS
    from checkpoint import PREFIXES
    from loading import new

    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    entries = []
    for name, model in MODELS.items():
        for path, parameter in new(model, **wukong_model(folder)[name]).parameters_and_names():
            full = PREFIXES[name] + path
            entries.append({"name": full, "data": ms.Tensor(value(full, parameter.shape))})
    ms.save_checkpoint(entries, str(folder / "wukong.ckpt"))


def write_diffusers(folder: Path) -> None:
    from base import MODELS
    from diffusers_base import FOLDERS, origins_of
    from diffusers_config import read_configs
    from loading import new, part_shape

    for name, config in CONFIGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    config = read_configs(folder)
    for name, model in MODELS.items():
        shapes = {}
        for path, parameter in new(model, **config[name]).parameters_and_names():
            parts = origins_of(config)[name](path)
            shapes |= {names[-1]: part_shape(parameter, len(parts)) for names in parts}
        write_shards(folder / FOLDERS[name], NAMES[FOLDERS[name]], shapes, SHARDS[FOLDERS[name]])


def write_shards(folder: Path, name: str, shapes: dict[str, tuple[int, ...]], shards: int) -> None:
    table, names = {}, list(shapes)
    for number in range(shards):
        file = f"{name}-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else f"{name}.safetensors"
        some = names[len(names) * number // shards:len(names) * (number + 1) // shards]
        header, order = to_header({one: (HALF, shapes[one]) for one in some})
        with (folder / file).open("wb") as target:
            target.write(header)
            for one in order:
                target.write(value(one, shapes[one]).astype(HALF).tobytes())
        table |= dict.fromkeys(some, file)
    if shards > 1:
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def load_wukong(folder: Path):
    from checkpoint import PREFIXES, load_checkpoint_base

    base = load_checkpoint_base(folder / "wukong.ckpt", wukong_model(folder))
    return base, {name: lambda path, prefix=prefix: ((prefix + path,),) for name, prefix in PREFIXES.items()}


def load_diffusers(folder: Path):
    from diffusers_base import load_diffusers_base, origins_of

    base = load_diffusers_base(folder)
    return base, origins_of(base.config)


def load(folder: Path, kind: str) -> None:
    """Load a base, print what it took, and compare every weight with what was written."""
    import diffusers_base  # noqa: F401
    from base import MODELS
    from loading import part_shape

    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.perf_counter()
    base, origins = {"wukong": load_wukong, "diffusers": load_diffusers}[kind](folder)
    seconds, above = time.perf_counter() - start, peak() - before
    weights, wrong = 0, []
    for name in MODELS:
        for path, parameter in getattr(base, name).parameters_and_names():
            parts = origins[name](path)
            expected = [value(names[-1], part_shape(parameter, len(parts))) for names in parts]
            if kind == "diffusers":
                expected = [part.astype(HALF).astype(np.float32) for part in expected]
            if not np.array_equal(parameter.asnumpy(), np.concatenate(expected)):
                wrong.append(f"{name}: {path}")
            weights += parameter.asnumpy().size
    print(base.report.table())
    print(f"{weights:,} weights, {4 * weights / 1e9:.2f} GB in float32: loaded in {seconds:.1f} s, memory "
          f"{above / 1e9:.2f} GB = {above / (4 * weights):.2f} copies; {len(wrong)} parameters differ")
    if wrong:
        sys.exit("\n".join(wrong))


def run(work, *arguments) -> None:
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("wukong", "diffusers"), help="default: both")
    parser.add_argument("--folder", help="on the disk to write to; default: that for temporary files")
    args = parser.parse_args()
    for kind, write in (("wukong", write_wukong), ("diffusers", write_diffusers)):
        if args.kind in (None, kind):
            folder = Path(tempfile.mkdtemp(dir=args.folder))
            try:
                run(write, folder)
                size = sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())
                print(f"{kind}: {size / 1e9:.2f} GB on the disk")
                run(load, folder, kind)
            finally:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
