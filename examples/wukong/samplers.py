"""Sampling from a trained network: classifier-free guidance with DDIM or DPM-Solver++(2M).

Both solvers follow the same ordinary differential equation, and each of their steps is a linear combination

    x_next = cx x + c0 x0 + cp x0_previous,    x0 = (x - s_t eps) / a_t  or  a_t x - s_t v

of the current latents, the network's present guess at the clean ones and its guess one step earlier. The coefficients
are computed here in float64 and enter the one compiled step as a tensor, so all steps of all solvers share one graph.
"""

from collections.abc import Iterator

import mindspore as ms
import numpy as np
from diffusion import Schedule
from mindspore import nn, ops

SOLVERS = ("ddim", "dpm++")


def sampling_times(schedule: Schedule, steps: int) -> np.ndarray:
    """The timesteps at which the network is asked, from T - 1 downwards in equal strides ("trailing", Lin et al. 2024).

    Raises:
        ValueError: unless 1 <= steps <= T.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"sampling takes 1 to {schedule.timesteps} steps, got {steps!r}")
    return np.round(np.arange(steps, 0, -1) * schedule.timesteps / steps).astype(np.int32) - 1


def ddim_coefficients(abar: float, abar_next: float) -> tuple[float, float, float]:
    """(cx, c0, cp) of one DDIM step without added noise (Song et al. 2021, eq. 12 with sigma = 0).

    Args:
        abar: abar at the current time.
        abar_next: abar at the next time; 1 is the clean image.
    """
    ratio = np.sqrt((1 - abar_next) / (1 - abar))
    return ratio, np.sqrt(abar_next) - ratio * np.sqrt(abar), 0.0


def dpm_coefficients(abar: float, abar_next: float, abar_previous: float | None) -> tuple[float, float, float]:
    """(cx, c0, cp) of one DPM-Solver++(2M) step (Lu et al. 2022, algorithm 2).

    With lambda = log(a / s), h = lambda_next - lambda and r = (lambda - lambda_previous) / h:
    x_next = (s_next / s) x - a_next (exp(-h) - 1) ((1 + 1/(2r)) x0 - 1/(2r) x0_previous).

    Args:
        abar: abar at the current time.
        abar_next: abar at the next time.
        abar_previous: abar one step earlier; ``None`` at the first step, which is of first order. So is the step to the
            clean image (``abar_next == 1``), where h is infinite.
    """
    if abar_previous is None or abar_next == 1:
        return ddim_coefficients(abar, abar_next)

    def half_log_snr(value: float) -> float:
        return 0.5 * np.log(value / (1 - value))

    h = half_log_snr(abar_next) - half_log_snr(abar)
    r = (half_log_snr(abar) - half_log_snr(abar_previous)) / h
    whole = -np.sqrt(abar_next) * np.expm1(-h)
    return np.sqrt((1 - abar_next) / (1 - abar)), whole * (1 + 0.5 / r), -whole * 0.5 / r


def sampling_plan(schedule: Schedule, solver: str, steps: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields for every step its timestep and the values (a_t, s_t, cx, c0, cp), float64.

    Raises:
        ValueError: for an unknown solver or a number of steps outside [1, T].
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    times = sampling_times(schedule, steps)
    levels = np.append(schedule.alphas_cumprod[times], 1.0)
    for i, time in enumerate(times):
        if solver == "ddim":
            coefficients = ddim_coefficients(levels[i], levels[i + 1])
        else:
            coefficients = dpm_coefficients(levels[i], levels[i + 1], levels[i - 1] if i else None)
        yield int(time), np.array([np.sqrt(levels[i]), np.sqrt(1 - levels[i]), *coefficients])


class GuidedStep(nn.Cell):
    """One step of a sampler with classifier-free guidance (Ho and Salimans 2022).

    eps = e_empty + g (e_prompt - e_empty).

    Both predictions are one batch of twice the size. The names of the network's parameters stay as they are.

    Args:
        unet: A cell called as ``(x, timesteps, context)``.
        prediction: What it predicts, "epsilon" or "v"; guidance mixes v likewise.
    """

    def __init__(self, unet: nn.Cell, prediction: str = "epsilon") -> None:
        super().__init__(auto_prefix=False)
        self.unet, self.predicts_v = unet, prediction == "v"

    def construct(
        self, x: ms.Tensor, previous: ms.Tensor, timesteps: ms.Tensor, context: ms.Tensor, values: ms.Tensor
    ) -> tuple[ms.Tensor, ms.Tensor]:
        """Makes the step.

        Args:
            x: Latents (B, C, H, W).
            previous: The clean latents predicted one step earlier, like ``x``; anything finite at the first step.
            timesteps: The present time, int32 (2B,).
            context: (2B, L, D), the empty prompt's B times and then the prompts'.
            values: float32 (6,): the guidance g, then what :func:`sampling_plan` gives.

        Returns:
            The next latents and the predicted clean latents.
        """
        eps = self.unet(ops.concat((x, x), 0), timesteps, context).astype(x.dtype)
        empty, prompted = eps[: x.shape[0]], eps[x.shape[0] :]
        eps = empty + values[0] * (prompted - empty)
        clean = values[1] * x - values[2] * eps if self.predicts_v else (x - values[2] * eps) / values[1]
        return values[3] * x + values[4] * clean + values[5] * previous, clean


def sample(
    step: nn.Cell,
    noise: np.ndarray,
    context: np.ndarray,
    empty: np.ndarray,
    schedule: Schedule,
    *,
    solver: str = "dpm++",
    steps: int = 25,
    guidance: float = 5.0,
) -> np.ndarray:
    """Turns noise into clean latents.

    Args:
        step: A :class:`GuidedStep`; keep it, and calls with the same shapes compile nothing.
        noise: Standard normal latents (B, C, H, W).
        context: The prompts' embeddings (B, L, D).
        empty: The empty prompt's embedding (1, L, D).
        schedule: The schedule the network was trained with.
        solver: One of ``SOLVERS``.
        steps: Number of calls of the network.
        guidance: The scale g; 1 is the plain conditional model.

    Returns:
        Latents (B, C, H, W), float32, in the scale the network was trained in.

    Raises:
        ValueError: for an unknown solver, a number of steps outside [1, T], or batch sizes that differ.
    """
    batch = noise.shape[0]
    if context.shape[0] != batch:
        raise ValueError(f"one prompt for each image: got noise for {batch} images and {context.shape[0]} prompts")
    both = ms.Tensor(np.concatenate([np.repeat(empty, batch, axis=0), context]).astype(np.float32))
    x = ms.Tensor(noise.astype(np.float32))
    clean = ops.zeros_like(x)
    for time, values in sampling_plan(schedule, solver, steps):
        timesteps = ms.Tensor(np.full(2 * batch, time, np.int32))
        x, clean = step(x, clean, timesteps, both, ms.Tensor(np.append(guidance, values), ms.float32))
    return x.asnumpy()
