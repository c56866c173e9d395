"""Denoising diffusion: the noise schedule, the forward process and the training loss.

The forward process mixes clean latents ``x0`` with Gaussian noise ``eps`` at a time ``t`` (Ho et al. 2020, eq. 4):

    x_t = a_t x0 + s_t eps,    a_t = sqrt(abar_t),    s_t = sqrt(1 - abar_t),    abar_t = prod_{i <= t} (1 - beta_i)

The network predicts ``eps``. Latents are what the autoencoder gives times ``scale_factor`` (Rombach et al. 2022), so
that their standard deviation is about one.
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

    Raises:
        ValueError: unless T >= 1 and 0 < linear_start <= linear_end < 1.
    """

    timesteps: int = 1000
    linear_start: float = 0.00085
    linear_end: float = 0.012

    def __post_init__(self) -> None:
        if not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ValueError(f"a schedule needs a whole number of timesteps >= 1, got {self.timesteps!r}")
        if not 0 < self.linear_start <= self.linear_end < 1:
            raise ValueError(
                "a schedule needs 0 < linear_start <= linear_end < 1, "
                f"got linear_start={self.linear_start!r}, linear_end={self.linear_end!r}"
            )

    @property
    def betas(self) -> np.ndarray:
        """beta_t, float64, shape (T,)."""
        return np.linspace(self.linear_start**0.5, self.linear_end**0.5, self.timesteps) ** 2

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, the share of the signal's variance that is left at t; float64, shape (T,)."""
        return np.cumprod(1.0 - self.betas)


def min_snr_weights(schedule: Schedule, gamma: float | None) -> np.ndarray:
    """Loss weight of each timestep, min(SNR_t, gamma) / SNR_t with SNR = abar / (1 - abar) (Hang et al. 2023).

    Args:
        schedule: The noise schedule.
        gamma: The cap on the signal-to-noise ratio; ``None`` weighs all timesteps alike (Ho et al. 2020).

    Returns:
        float64 array of shape (T,).
    """
    if gamma is None:
        return np.ones(schedule.timesteps)
    snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
    return np.minimum(snr, gamma) / snr


class ForwardProcess(nn.Cell):
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, inside a graph.

    Args:
        schedule: The noise schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.signal = ms.Tensor(np.sqrt(schedule.alphas_cumprod), ms.float32)
        self.sigma = ms.Tensor(np.sqrt(1.0 - schedule.alphas_cumprod), ms.float32)

    def construct(self, x0: ms.Tensor, timesteps: ms.Tensor, noise: ms.Tensor) -> ms.Tensor:
        """Noises ``x0`` and ``noise`` of shape (B, C, H, W) at ``timesteps`` (B,), int32; gives (B, C, H, W)."""
        shape = (-1, 1, 1, 1)
        signal = ops.gather(self.signal, timesteps, 0).reshape(shape)
        sigma = ops.gather(self.sigma, timesteps, 0).reshape(shape)
        return signal.astype(x0.dtype) * x0 + sigma.astype(x0.dtype) * noise


class DiffusionLoss(nn.Cell):
    """Mean of w_t |eps - unet(x_t, t, context)|^2, in float32.

    All that is random comes in as tensors (see :func:`draw_noise`), so a run follows from its seed. The names of the
    network's parameters stay as they are.

    Args:
        unet: A cell called as ``(x, timesteps, context)``.
        schedule: The noise schedule.
        gamma: See :func:`min_snr_weights`.
    """

    def __init__(self, unet: nn.Cell, schedule: Schedule, gamma: float | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.forward_process = ForwardProcess(schedule)
        self.weights = ms.Tensor(min_snr_weights(schedule, gamma), ms.float32)

    def construct(self, x0: ms.Tensor, context: ms.Tensor, timesteps: ms.Tensor, noise: ms.Tensor) -> ms.Tensor:
        """Gives the scalar loss of latents (B, C, H, W), context (B, L, D), timesteps (B,) and noise (B, C, H, W)."""
        predicted = self.unet(self.forward_process(x0, timesteps, noise), timesteps, context)
        error = predicted.astype(ms.float32) - noise.astype(ms.float32)
        per_image = (error * error).mean(axis=(1, 2, 3))
        return (ops.gather(self.weights, timesteps, 0) * per_image).mean()


def draw_noise(
    rng: np.random.Generator, shape: tuple[int, ...], schedule: Schedule
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the timesteps (B,) int32 and the noise (B, C, H, W) float32 of one training batch.

    The timesteps are stratified, one from each of B equal slices of [0, T) in shuffled order: every one is still
    uniform over [0, T), and the loss of a small batch varies less (low-discrepancy sampling, Kingma et al. 2021).

    Args:
        rng: The generator everything is drawn from.
        shape: Shape of the latents, batch first.
        schedule: The noise schedule.
    """
    batch = shape[0]
    points = (rng.permutation(batch) + rng.random(batch)) / batch
    timesteps = np.minimum((points * schedule.timesteps).astype(np.int32), schedule.timesteps - 1)
    return timesteps, rng.standard_normal(shape, dtype=np.float32)
