"""Trains the small base, in three stages, from folders of images with Chinese captions.

    python prepare_data.py --styles noto flat solid noto-v1 firefox --out work/data
    python pretrain.py autoencoder --data work/data/flat work/data/noto --work work/base
    python pretrain.py text        --data work/data/{noto,flat,solid,noto-v1,firefox} --work work/base
    python pretrain.py unet        --data work/data/{noto,flat,solid,noto-v1,firefox} --work work/base --out base

The first stage learns to compress pictures; the second teaches the text encoder to tell captions apart by what their
pictures look like; the third learns the U-Net on the latents and on the texts as the encoder gives them. A run that
was stopped goes on where it was saved last when it is started again with the same arguments. Everything random follows
from the seed and the step, so a continued run sees what an unbroken one would have seen.
"""

import argparse
import sys
from pathlib import Path

import extras  # noqa: F401  # isort: skip  # first, to say which packages are missing
import mindspore as ms
import numpy as np
from autoencoder import AutoencoderKL
from base import BaseError, load_weights, save_base, save_weights
from data import DataError, load_folder
from diffusion import DiffusionLoss, Schedule, draw_noise
from mindspore import nn, ops
from pretrain_loop import Trainer, TrainingError
from text_encoder import TextEncoder
from tokenizer import CharTokenizer
from training import learning_rates
from unet import UNetModel

from mindpet_lite import BatchSampler

SIZE = 32
LATENTS = 8
AUTOENCODER = {
    "ddconfig": {"double_z": True, "z_channels": LATENTS, "resolution": SIZE, "in_channels": 3, "out_ch": 3, "ch": 32,
                 "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "groups": 8},
    "embed_dim": LATENTS,
}
UNET = {
    "image_size": SIZE // 4, "in_channels": LATENTS, "out_channels": LATENTS, "model_channels": 96,
    "attention_resolutions": [1, 2], "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4, "context_dim": 128,
}
TEXT_WIDTH = {"output_dim": 128, "width": 128, "layers": 3, "heads": 4}
CONTEXT_LENGTH = 16
# v, not the noise: where there is hardly anything but noise, and the text alone says what to draw, the error of the
# picture counts fully in v and next to nothing in eps.
SCHEDULE = {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012, "prediction": "v"}
KL_WEIGHT = 2e-4
DROPPED = 0.1
# Ways people ask for a picture, so that a prompt need not be the bare caption, which stays the most frequent by far.
# The name comes before the style: the text encoder reads from left to right, so all styles share the name's vectors.
# {word} is a made-up word in the style's place. It says nothing of the style: what is drawn stays the name's, so that
# a style with a new word can be taught.
TEMPLATES = ("{name}，{style}",) * 12 + ("一个{name}，{style}", "{name}的图片，{style}", "{style}的{name}", "{name}")
TEMPLATES += ("{name}，{word}",) * 3


class AutoencoderLoss(nn.Cell):
    """mean |decoded - img| + mean (decoded - img)^2 + KL_WEIGHT * KL(N(mean, var) || N(0, 1)) per latent value."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__(auto_prefix=False)
        self.autoencoder = autoencoder

    def construct(self, img: ms.Tensor, noise: ms.Tensor) -> ms.Tensor:
        decoded, moments = self.autoencoder(img, noise)
        mean, logvar = ops.split(moments, moments.shape[1] // 2, axis=1)
        logvar = ops.clamp(logvar, -30.0, 20.0)
        kl = 0.5 * (mean * mean + ops.exp(logvar) - 1.0 - logvar).mean()
        error = decoded - img
        return ops.abs(error).mean() + (error * error).mean() + KL_WEIGHT * kl


class TextLoss(nn.Cell):
    """mean (head(last vector of the text) - latents)^2: the text alone says what the picture looks like on average.

    The gradient of the diffusion loss reaches the text encoder only through noise and the whole U-Net, and tells words
    apart slowly: by colour first. This one tells them apart in minutes. The last vector has read the whole text.
    """

    def __init__(self, text_encoder: nn.Cell, head: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.text_encoder, self.head = text_encoder, head

    def construct(self, ids: ms.Tensor, latents: ms.Tensor) -> ms.Tensor:
        error = self.head(self.text_encoder(ids)[:, -1]) - latents
        return (error * error).mean()


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Varies pictures (B, 3, S, S) in [-1, 1], so that an autoencoder learns more than their few colours and places.

    Each is shifted by up to 2 pixels and mirrored or not; one in eight changes its channels' order, one in
    sixteen is inverted, one in ten becomes grey and one in ten black on white.
    """
    out = []
    for image in images:
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), constant_values=1.0)
        top, left = rng.integers(0, 5, 2)
        image = padded[:, top:top + image.shape[1], left:left + image.shape[2]]
        image = image[:, :, ::-1] if rng.random() < 0.5 else image
        image = image[rng.permutation(3)] if rng.random() < 0.125 else image
        kind = rng.random()
        if kind < 0.2:
            image = np.repeat(image.mean(0, keepdims=True), 3, axis=0)
        if kind < 0.1:
            image = np.clip(4 * (image - rng.uniform(-0.5, 0.5)), -1, 1)
        out.append(-image if rng.random() < 0.0625 else image)
    return np.stack(out).astype(np.float32)


def load_pictures(folders: list[Path]) -> tuple[np.ndarray, list[str]]:
    """Reads all folders; says on stderr which rows were skipped."""
    images, texts = [], []
    for folder in folders:
        some, captions, skipped = load_folder(folder, SIZE)
        for message in skipped:
            print(f"pretrain.py: {folder}: skipped {message}", file=sys.stderr)
        images.append(some)
        texts += captions
    return np.concatenate(images), texts


def settings(args: argparse.Namespace, images: int) -> dict:
    """What must be the same when a run is continued. The number of steps may change: it only bends the rate."""
    return {"stage": args.stage, "seed": args.seed, "batch": args.batch, "rate": args.rate, "images": images}


def encode(autoencoder: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """The means of the latents (n, C, h, w)."""
    parts = [autoencoder.encode_moments(ms.Tensor(images[i:i + 64])).asnumpy() for i in range(0, len(images), 64)]
    return np.concatenate(parts)[:, :LATENTS]


def standardise(weights: dict[str, np.ndarray], latents: np.ndarray) -> None:
    """Gives every channel of the latents mean 0 and variance 1 by changing the two 1x1 convolutions around them.

    With z' = (z - m) / s the mean's rows of quant_conv are divided by s and moved by m, the log-variance's biases
    fall by 2 log s, and post_quant_conv undoes it: W z + b = (W s) z' + (W m + b).
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    weight, bias = weights["quant_conv.weight"], weights["quant_conv.bias"]
    weight[:LATENTS] /= std.reshape(-1, 1, 1, 1)
    bias[:LATENTS] = (bias[:LATENTS] - mean) / std
    bias[LATENTS:] -= 2 * np.log(std)
    weight, bias = weights["post_quant_conv.weight"], weights["post_quant_conv.bias"]
    bias += weight[:, :, 0, 0] @ mean
    weight *= std.reshape(1, -1, 1, 1)


def train_autoencoder(args: argparse.Namespace) -> None:
    """The first stage: writes ``autoencoder.safetensors`` into the work folder."""
    images, _ = load_pictures(args.data)
    autoencoder = AutoencoderKL(**AUTOENCODER)
    rates = learning_rates(args.rate, args.rate / 100, 100, args.steps)
    trainer = Trainer({"autoencoder": autoencoder}, AutoencoderLoss(autoencoder), args.work / "autoencoder", rates,
                      1e-4, settings(args, len(images)), 0.99)
    sampler = BatchSampler(len(images), args.batch, args.seed)
    sampler.step = trainer.step

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([args.seed, 1, step])
        noise = rng.standard_normal((args.batch, LATENTS, UNET["image_size"], UNET["image_size"]), dtype=np.float32)
        return augment(images[next(sampler)], rng), noise

    def save() -> None:
        target = args.work / "autoencoder.safetensors"
        weights = {path: value.copy() for path, value in trainer.averaged("autoencoder").items()}
        save_weights(weights, target)
        fresh = AutoencoderKL(**AUTOENCODER)
        load_weights(fresh, target)
        standardise(weights, encode(fresh, images))
        save_weights(weights, target)

    trainer.run(batch, args.save_every, save)


class Corpus:
    """The pictures as latents and their captions "name，style", and the configuration of a base that learns from them.

    Attributes:
        latents: (n, C, h, w), of standard deviation 1.
        texts: The n captions.
        tokenizer: Texts to ids.
        autoencoder: The frozen first stage.
        config: What config.yaml of the base will hold.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        images, self.texts = load_pictures(args.data)
        self.autoencoder = AutoencoderKL(**AUTOENCODER)
        load_weights(self.autoencoder, args.work / "autoencoder.safetensors")
        latents = encode(self.autoencoder, images)
        scale = float(1 / latents.std())
        self.latents = latents * np.float32(scale)
        frames = [template.format(name="", style="", word="") for template in TEMPLATES]
        self.characters = sorted(set("".join([*self.texts, *frames])))
        self.tokenizer = CharTokenizer("".join(self.characters), CONTEXT_LENGTH)
        self.config = {
            "unet": UNET,
            "text_encoder": {"context_length": CONTEXT_LENGTH, "vocab_size": self.tokenizer.vocab_size,
                             **TEXT_WIDTH},
            "autoencoder": AUTOENCODER, "schedule": SCHEDULE, "scale_factor": scale,
            "vocabulary": "".join(self.characters),
        }

    def ids(self, chosen: np.ndarray, rng: np.random.Generator, dropped: float = 0.0) -> np.ndarray:
        """Ids (B, L) of some captions, each in one of the ways of TEMPLATES, or empty with this probability."""
        texts = []
        for i in chosen:
            name, _, style = self.texts[i].partition("，")
            word, template = "".join(rng.choice(self.characters, 2)), TEMPLATES[rng.integers(len(TEMPLATES))]
            texts.append("" if rng.random() < dropped else template.format(name=name, style=style, word=word))
        return np.array([self.tokenizer(text) for text in texts], np.int32)

    def text_encoder(self) -> TextEncoder:
        """A new text encoder."""
        return TextEncoder(**self.config["text_encoder"])


def train_text(args: argparse.Namespace) -> None:
    """The second stage: writes ``text_encoder.safetensors`` into the work folder."""
    corpus = Corpus(args)
    text_encoder = corpus.text_encoder()
    head = nn.Dense(TEXT_WIDTH["width"], corpus.latents[0].size)
    rates = learning_rates(args.rate, args.rate / 100, 100, args.steps)
    trainer = Trainer({"text_encoder": text_encoder, "head": head}, TextLoss(text_encoder, head), args.work / "text",
                      rates, 1e-4, settings(args, len(corpus.latents)), 0.99)
    sampler = BatchSampler(len(corpus.latents), args.batch, args.seed)
    sampler.step = trainer.step

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng, chosen = np.random.default_rng([args.seed, 3, step]), next(sampler)
        return corpus.ids(chosen, rng), corpus.latents[chosen].reshape(args.batch, -1)

    trainer.run(batch, args.save_every,
                lambda: save_weights(trainer.averaged("text_encoder"), args.work / "text_encoder.safetensors"))


def train_unet(args: argparse.Namespace) -> None:
    """The third stage: writes the base into ``--out`` at every save."""
    corpus = Corpus(args)
    unet, text_encoder, schedule = UNetModel(**UNET), corpus.text_encoder(), Schedule(**SCHEDULE)
    load_weights(text_encoder, args.work / "text_encoder.safetensors")
    if args.start:
        load_weights(unet, args.start / "unet.safetensors")
    rates = learning_rates(args.rate, args.rate / 20, 200, args.steps)
    trainer = Trainer({"unet": unet}, DiffusionLoss(unet, schedule), args.work / "unet", rates, 1e-3,
                      settings(args, len(corpus.latents)), 0.998)
    sampler = BatchSampler(len(corpus.latents), args.batch, args.seed)
    sampler.step = trainer.step

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng, chosen = np.random.default_rng([args.seed, 2, step]), next(sampler)
        context = text_encoder(ms.Tensor(corpus.ids(chosen, rng, DROPPED))).asnumpy()
        timesteps, noise = draw_noise(rng, (args.batch, *corpus.latents.shape[1:]), schedule)
        return corpus.latents[chosen], context, timesteps, noise

    def save() -> None:
        fixed = {name: {path: p.asnumpy() for path, p in net.parameters_and_names()}
                 for name, net in (("text_encoder", text_encoder), ("autoencoder", corpus.autoencoder))}
        save_base(args.out, corpus.config, {"unet": trainer.averaged("unet"), **fixed})

    trainer.run(batch, args.save_every, save)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    here = Path(__file__).resolve().parent
    for name, steps, batch, rate in (("autoencoder", 2000, 8, 1.5e-3), ("text", 4000, 64, 1e-3),
                                     ("unet", 6000, 32, 1e-3)):
        stage = stages.add_parser(name)
        stage.add_argument("--data", type=Path, nargs="+", required=True, help="folders made by prepare_data.py")
        stage.add_argument("--work", type=Path, default=here / "work" / "base",
                           help="checkpoints and logs (%(default)s)")
        stage.add_argument("--steps", type=int, default=steps, help="training steps (%(default)s)")
        stage.add_argument("--batch", type=int, default=batch, help="images per step (%(default)s)")
        stage.add_argument("--rate", type=float, default=rate, help="highest learning rate (%(default)s)")
        stage.add_argument("--seed", type=int, default=0, help="of weights, order and noise (%(default)s)")
        stage.add_argument("--save-every", type=float, default=180, help="seconds between saves (%(default)s)")
    stages.choices["unet"].add_argument("--out", type=Path, required=True, help="folder the base is written to")
    stages.choices["unet"].add_argument("--start", type=Path, help="folder of a base whose U-Net is trained further")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch) < 1 or args.seed < 0 or not args.rate > 0 or not args.save_every > 0:
        parser.error("--steps, --batch, --rate and --save-every must be above 0, and --seed at least 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse(argv)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(args.seed)
    try:
        {"autoencoder": train_autoencoder, "text": train_text, "unet": train_unet}[args.stage](args)
    except (DataError, BaseError, TrainingError, OSError) as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
