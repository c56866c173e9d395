"""Denoising diffusion: the noise schedule, the forward process and the training loss.

The forward process mixes clean latents ``x0`` with Gaussian noise ``eps`` at a time ``t`` (Ho et al. 2020, eq. 4):

    x_t = a_t x0 + s_t eps,    a_t = sqrt(abar_t),    s_t = sqrt(1 - abar_t),    abar_t = prod_{i <= t} (1 - beta_i)

The network predicts ``eps``, or, where the schedule says so, ``v = a_t eps - s_t x0`` (Salimans and Ho 2022). Latents
are what the autoencoder gives times ``scale_factor`` (Rombach et al. 2022), so that their standard deviation is about
one.
"""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import nn, ops


@dataclass(frozen=True)
class Schedule:
    """The noise levels of latent diffusion: beta is linear in its square root.

    Attributes:
        timesteps: Number of noise levels T.
        linear_start: beta of the first level.
        linear_end: beta of the last level.
        prediction: What the network predicts, "epsilon" or "v".

    Raises:
        ValueError: unless T >= 1 and 0 < linear_start <= linear_end < 1, or for another prediction.
    """

    timesteps: int = 1000
    linear_start: float = 0.00085
    linear_end: float = 0.012
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ValueError(f"a schedule needs a whole number of timesteps >= 1, got {self.timesteps!r}")
        if not 0 < self.linear_start <= self.linear_end < 1:
            raise ValueError(
                "a schedule needs 0 < linear_start <= linear_end < 1, "
                f"got linear_start={self.linear_start!r}, linear_end={self.linear_end!r}"
            )
        if self.prediction not in ("epsilon", "v"):
            raise ValueError(f"a schedule's prediction is epsilon or v, got {self.prediction!r}")

    @property
    def betas(self) -> np.ndarray:
        """beta_t, float64, shape (T,)."""
        return np.linspace(self.linear_start**0.5, self.linear_end**0.5, self.timesteps) ** 2

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, the share of the signal's variance that is left at t; float64, shape (T,)."""
        return np.cumprod(1.0 - self.betas)


def min_snr_weights(schedule: Schedule, gamma: float | None) -> np.ndarray:
    """Loss weight of each timestep (Hang et al. 2023), with SNR = abar / (1 - abar).

    min(SNR_t, gamma) / SNR_t for a network that predicts epsilon, min(SNR_t, gamma) / (SNR_t + 1) for v: the same
    weight of the error in the clean image.

    Args:
        schedule: The noise schedule.
        gamma: The cap on the signal-to-noise ratio; ``None`` weighs all timesteps alike (Ho et al. 2020).

    Returns:
        float64 array of shape (T,).
    """
    if gamma is None:
        return np.ones(schedule.timesteps)
    snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
    return np.minimum(snr, gamma) / (snr + 1 if schedule.prediction == "v" else snr)


class ForwardProcess(nn.Cell):
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, and what the network is to predict there, inside a graph.

    Args:
        schedule: The noise schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.signal = ms.Tensor(np.sqrt(schedule.alphas_cumprod), ms.float32)
        self.sigma = ms.Tensor(np.sqrt(1.0 - schedule.alphas_cumprod), ms.float32)
        self.predicts_v = schedule.prediction == "v"

    def construct(self, x0: ms.Tensor, timesteps: ms.Tensor, noise: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        """Gives x_t and the target, both (B, C, H, W), for ``x0`` and ``noise`` at ``timesteps`` (B,), int32."""
        shape = (-1, 1, 1, 1)
        signal = ops.gather(self.signal, timesteps, 0).reshape(shape)
        sigma = ops.gather(self.sigma, timesteps, 0).reshape(shape)
        signal, sigma = signal.astype(x0.dtype), sigma.astype(x0.dtype)
        target = signal * noise - sigma * x0 if self.predicts_v else noise
        return signal * x0 + sigma * noise, target


class DiffusionLoss(nn.Cell):
    """Mean of w_t |target - unet(x_t, t, context)|^2, in float32; the target is eps or v.

    With a ``prior_weight`` r the second half of each batch is DreamBooth's class images (Ruiz et al. 2023), and the
    loss is the mean over the first half plus r times the mean over the second.

    All that is random comes in as tensors (see :func:`draw_noise`), so a run follows from its seed. The names of the
    network's parameters stay as they are.

    Args:
        unet: A cell called as ``(x, timesteps, context)``.
        schedule: The noise schedule.
        gamma: See :func:`min_snr_weights`.
        prior_weight: r; None where a batch has no class images.
    """

    def __init__(self, unet: nn.Cell, schedule: Schedule, gamma: float | None = None,
                 prior_weight: float | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.unet, self.prior_weight = unet, prior_weight
        self.forward_process = ForwardProcess(schedule)
        self.weights = ms.Tensor(min_snr_weights(schedule, gamma), ms.float32)

    def construct(self, x0: ms.Tensor, context: ms.Tensor, timesteps: ms.Tensor, noise: ms.Tensor) -> ms.Tensor:
        """Gives the scalar loss of latents (B, C, H, W), context (B, L, D), timesteps (B,) and noise (B, C, H, W)."""
        noisy, target = self.forward_process(x0, timesteps, noise)
        error = self.unet(noisy, timesteps, context).astype(ms.float32) - target.astype(ms.float32)
        losses = ops.gather(self.weights, timesteps, 0) * (error * error).mean(axis=(1, 2, 3))
        if self.prior_weight is None:
            return losses.mean()
        half = losses.shape[0] // 2
        return losses[:half].mean() + self.prior_weight * losses[half:].mean()


class TextToImageLoss(nn.Cell):
    """A loss of latents and context, with the text encoder in the graph, so that it can be trained too."""

    def __init__(self, loss: DiffusionLoss, text_encoder: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.loss, self.text_encoder = loss, text_encoder

    def construct(self, x0: ms.Tensor, ids: ms.Tensor, timesteps: ms.Tensor, noise: ms.Tensor) -> ms.Tensor:
        """Gives the scalar loss of latents, ids (B, L), timesteps and noise."""
        return self.loss(x0, self.text_encoder(ids), timesteps, noise)


def draw_noise(rng: np.random.Generator, shape: tuple[int, ...], schedule: Schedule,
               offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draws the timesteps (B,) int32 and the noise (B, C, H, W) float32 of one training batch.

    The timesteps are stratified, one from each of B equal slices of [0, T) in shuffled order: every one is still
    uniform over [0, T), and the loss of a small batch varies less (low-discrepancy sampling, Kingma et al. 2021). With
    an offset o the noise of a channel is eps + o eps', eps' one number for all its pixels: so the network can learn to
    change how bright a whole image is (Guttenberg 2023).

    Args:
        rng: The generator everything is drawn from.
        shape: Shape of the latents, batch first.
        schedule: The noise schedule.
        offset: o.
    """
    batch = shape[0]
    points = (rng.permutation(batch) + rng.random(batch)) / batch
    timesteps = np.minimum((points * schedule.timesteps).astype(np.int32), schedule.timesteps - 1)
    noise = rng.standard_normal(shape, dtype=np.float32)
    if offset:
        noise += np.float32(offset) * rng.standard_normal((*shape[:2], 1, 1), dtype=np.float32)
    return timesteps, noise
