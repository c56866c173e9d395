"""The graphs whose operators `ascend_ops.py` looks up: those of the examples, of every method, and of a Llama.

The cells of the examples are built as on Ascend: of MindSpore's own operators, not of those written out for CPU.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
from llama import Llama, Sizes
from mindspore import Tensor, mint, nn, ops

from mindpet_lite import DeltaEMA, GradientAccumulation, get_pet_model, net_recompute, quantize_base
from mindpet_lite.delta import METHODS, RDropLoss, rdrop_repeat
from mindpet_lite.delta.hosts import QUANTISED
from mindpet_lite.delta.hosts.transposed import Conv1D

WUKONG = Path(__file__).resolve().parents[1] / "examples" / "wukong"
sys.path.insert(0, str(WUKONG))
import finetune  # noqa: E402
import layers  # noqa: E402
import pipeline  # noqa: E402
from base import Base, load_base  # noqa: E402
from diffusion import draw_noise  # noqa: E402
from samplers import GuidedStep  # noqa: E402
from settings import Settings  # noqa: E402
from training import Trained, make_step  # noqa: E402

# Behind Wukong's, whose scripts have the names that are asked for here.
sys.path.append(str(WUKONG.parent / "causal_lm"))
import decoder  # noqa: E402
import generation  # noqa: E402
import operators  # noqa: E402

layers.on_cpu = lambda: False
operators.fused = lambda: True

STEPS = 5
OPTIONS = {"gradient_accumulation": 2, "ema_decay": 0.99, "min_snr_gamma": 5.0, "lora_dropout": 0.1, "recompute": True,
           "train_text_encoder": True, "lora_plus_ratio": 4.0, "fp16": True}


@dataclasses.dataclass(frozen=True)
class Graph:
    """Something that compiles when it runs.

    Args:
        name: in reports.
        run: builds cells and runs them with `STEPS` different inputs.
        compiles: how many graphs that may compile.
        has_kernels: whether CPU has the kernels; else nothing is run, and only what the front-end made is looked at.
    """

    name: str
    run: Callable[[], None]
    compiles: int = 1
    has_kernels: bool = True


def wukong_base(fp16: bool) -> Base:
    """Return the example's base; with fp16 its U-Net has the GELU of Stable Diffusion, too."""
    return load_base(WUKONG / "base", **({"use_fp16": True, "exact_gelu": True} if fp16 else {}))


def train_wukong(base: Base, settings: Settings) -> None:
    """Make training steps of the example from random numbers."""
    finetune.adapt(base, settings)
    trained = Trained(base, settings)
    step, _ = make_step(base, settings, trained)
    trained.set_train(True)
    rng = np.random.default_rng(0)
    shape = (settings.batch_size, *pipeline.latent_shape(base, settings.image_size))
    sizes = base.config["text_encoder"]
    words = (settings.batch_size, sizes["context_length"])
    for _ in range(STEPS):
        latents = rng.standard_normal(shape, np.float32)
        text = rng.integers(0, sizes["vocab_size"], words, np.int32) if settings.train_text_encoder else \
            rng.standard_normal((*words, sizes["width"]), np.float32)
        step(*map(Tensor, (latents, text, *draw_noise(rng, shape, base.schedule))))


def sample_wukong(base: Base, settings: Settings) -> None:
    """Draw twice, by both solvers, and encode what was drawn."""
    finetune.adapt(base, settings)
    step, prompts = GuidedStep(base.unet, base.schedule.prediction), ["狐狸", "苹果"]
    for seed, (solver, steps) in enumerate((("dpm++", STEPS), ("ddim", 2))):
        noise = pipeline.start_noise(pipeline.latent_shape(base, settings.image_size), len(prompts), seed)
        images = pipeline.generate(base, step, prompts, noise, solver=solver, steps=steps, guidance=3.0 + seed)
        pipeline.encode_images(base, images)


def wukong_graphs() -> Iterator[Graph]:
    """Yield training and sampling, plain and in float16 with most of the options."""
    plain, rich = Settings(batch_size=4), Settings(batch_size=4, **OPTIONS)
    for name, settings in (("Wukong", plain), ("Wukong fp16", rich)):
        yield Graph(f"{name} training", lambda settings=settings: train_wukong(wukong_base(settings.fp16), settings))
        # The U-Net, the text encoder, the autoencoder's decoder and encoder, and a convolution beside each of these.
        yield Graph(f"{name} sampling", lambda settings=settings: sample_wukong(wukong_base(settings.fp16), settings),
                    compiles=6)


class Loss(nn.Cell):
    """Mean square of what layers give one after the other, in float32."""

    def __init__(self, *cells: nn.Cell) -> None:
        super().__init__()
        self.layers = nn.SequentialCell(*cells)

    def construct(self, x: Tensor) -> Tensor:
        return ops.square(self.layers(x).astype(ms.float32)).mean()


def train(net: nn.Cell, inputs: Callable[[np.random.Generator], Tensor], **options) -> None:
    """Adapt the layers of a net that `options` name, and train with all that GradientAccumulation can do."""
    get_pet_model(net, METHODS[options.pop("method")](**options))
    optimizer = nn.AdamWeightDecay(net.trainable_params(), 1e-3)
    step = GradientAccumulation(net, optimizer, 2, 1.0, ms.amp.DynamicLossScaler(1024.0, 2, 10),
                                DeltaEMA(net, 0.99, warm_up=True)).set_train()
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        step(inputs(rng))


def numbers(*shape: int, dtype: ms.Type = ms.float32) -> Callable[[np.random.Generator], Tensor]:
    """Return what draws a tensor of a shape."""
    return lambda rng: Tensor(rng.standard_normal(shape, np.float32)).astype(dtype)


def ids(limit: int, *shape: int) -> Callable[[np.random.Generator], Tensor]:
    """Return what draws ids below a limit."""
    return lambda rng: Tensor(rng.integers(0, limit, shape, np.int32))


class RDrop(nn.Cell):
    """The loss of a classifier with R-Drop."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SequentialCell(nn.Dense(6, 8), nn.Dropout(p=0.1), nn.Dense(8, 4))
        self.loss = RDropLoss()

    def construct(self, x: Tensor) -> Tensor:
        (x,) = rdrop_repeat(x)
        return self.loss(self.net(x), ops.zeros(x.shape[0], ms.int32))


def layer_graphs(dtype: ms.Type) -> Iterator[Graph]:
    """Yield LoRA on each kind of layer and the other methods, computed in a type."""
    lora, kind = {"method": "lora", "lora_rank": 2, "lora_alpha": 4}, str(dtype)
    on_cpu = dtype != ms.bfloat16

    def graph(name: str, make: Callable[[], list[nn.Cell]], inputs: Callable, has_kernels: bool = on_cpu,
              **options) -> Graph:
        return Graph(f"{name}, {kind}", lambda: train(Loss(*make()), inputs, target_modules=r".*\.0", **options),
                     has_kernels=has_kernels)

    def dense() -> nn.Cell:
        return nn.Dense(6, 4, dtype=dtype)

    def quantised(bits: str) -> nn.Cell:
        # For nf4 more than one block, the last of which is not full.
        return quantize_base(nn.SequentialCell(nn.Dense(32, 5, dtype=dtype)), bits)[0]

    def conv1d() -> nn.Cell:
        layer = Conv1D(4, 6)
        for item in layer.get_parameters():
            item.set_dtype(dtype)
        return layer

    x = numbers(2, 3, 6, dtype=dtype)
    yield graph("LoRA on Dense", lambda: [nn.Dense(6, 4, activation="relu", dtype=dtype)], x, lora_dropout=0.1, **lora)
    yield graph("DoRA on Dense", lambda: [dense()], x, use_dora=True, **lora)
    yield graph("LoRA on mint Linear", lambda: [mint.nn.Linear(6, 4, dtype=dtype)], x, **lora)
    for axes, module in ((1, "Conv1d"), (2, "Conv2d"), (3, "Conv3d")):
        image = numbers(2, 4, *[5] * axes, dtype=dtype)
        plain, minted = getattr(nn, module), getattr(mint.nn, module)
        yield graph(f"LoRA on {module}", lambda kind=plain: [kind(4, 6, 3, has_bias=True, dtype=dtype)], image, **lora)
        yield graph(f"LoRA on mint {module}", lambda kind=minted: [kind(4, 6, 3, dtype=dtype)], image,
                    has_kernels=False, **lora)
    table, words = Tensor(np.ones((7, 4)), dtype), ids(7, 2, 3)
    yield graph("LoRA on Embedding", lambda: [nn.Embedding(7, 4, embedding_table=table, dtype=dtype)], words, **lora)
    yield graph("LoRA on mint Embedding", lambda: [mint.nn.Embedding(7, 4, dtype=dtype)], words, **lora)
    yield graph("Adapter", lambda: [dense()], x, method="adapter", bottleneck_size=3)
    yield graph("Low-rank adapter", lambda: [dense()], x, method="low_rank_adapter", reduction_factor=2,
                low_rank_size=1)
    yield graph("Prefix-Tuning", lambda: [dense()], x, method="prefixtuning", prefix_token_num=3, embed_dim=5,
                mid_dim=7)
    yield graph("P-Tuning v2", lambda: [dense()], x, method="ptuning2", pre_seq_len=3, prefix_projection=True,
                projection_dim=7)
    yield graph("BitFit", lambda: [dense()], x, method="bitfit")
    yield graph("HiRA", lambda: [dense()], x, method="hira", r=2, hira_dropout=0.1)
    yield graph("HRA", lambda: [dense()], x, method="hra", r=2, apply_GS=True)
    yield graph("LoRA on GPT-2's Conv1D", lambda: [conv1d()], x, **lora)
    rows = numbers(2, 3, 32, dtype=dtype)
    for bits in QUANTISED:
        yield graph(f"LoRA on {bits}", lambda bits=bits: [quantised(bits)], rows, **lora)


def other_graphs() -> Iterator[Graph]:
    """Yield R-Drop and a Llama."""
    lora = {"method": "lora", "lora_rank": 2, "lora_alpha": 4}
    yield Graph("R-Drop", lambda: train(RDrop(), numbers(2, 6), target_modules=["2"], **lora))
    yield Graph("Llama", lambda: train(Llama(Sizes(16, 32, 1, 4, 2, 20), 6), ids(20, 2, 7),
                                       target_modules=["q_proj", "v_proj"], **lora))


def small_decoder() -> decoder.Decoder:
    """Return the causal language model of the example in small sizes."""
    return decoder.Decoder(decoder.Sizes(16, 32, 1, 4, 2, 20, 4, qkv_bias=True, context=16))


def train_decoder() -> None:
    """Train the decoder on the tokens of answers, its layers computed again."""
    net = small_decoder()
    get_pet_model(net, METHODS["lora"](lora_rank=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    net_recompute(net, r"model\.layers\.0")
    step = GradientAccumulation(decoder.AnswerLoss(net), nn.AdamWeightDecay(net.trainable_params(), [1e-3] * STEPS), 2,
                                1.0).set_train()
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        step(ids(20, 2, 8)(rng), ids(16, 6)(rng), ids(20, 6)(rng), numbers(6, 1)(rng), Tensor(6.0, ms.float32))


def decoder_graphs() -> Iterator[Graph]:
    """Yield the training and the answers of the causal language model, which use fused operators that CPU has not."""
    yield Graph("Decoder training", train_decoder, has_kernels=False)
    yield Graph("Decoder prompts", lambda: generation.Generator(small_decoder(), 2, 12).read([[1, 2, 3]] * 2),
                has_kernels=False)
    yield Graph("Decoder next token", lambda: generation.NextToken(generation.Cached(small_decoder(), 2, 12))(
        Tensor([1, 2], ms.int32), Tensor([3, 4], ms.int32)), has_kernels=False)


def all_graphs() -> Iterator[Graph]:
    """Yield everything."""
    yield from wukong_graphs()
    yield from decoder_graphs()
    for dtype in (ms.float32, ms.float16, ms.bfloat16):
        yield from layer_graphs(dtype)
    yield from other_graphs()
