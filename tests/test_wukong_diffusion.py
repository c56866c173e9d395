"""The noise schedule, the forward process, the loss and the samplers, against independent float64 NumPy."""

import math
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "wukong"))

from diffusion import DiffusionLoss, ForwardProcess, Schedule, draw_noise, min_snr_weights  # noqa: E402
from samplers import SOLVERS, GuidedStep, sample, sampling_plan, sampling_times  # noqa: E402

MODES = [pytest.param(ms.GRAPH_MODE, id="graph"), pytest.param(ms.PYNATIVE_MODE, id="pynative")]


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def reference_abar(count: int = 1000) -> list[float]:
    """The running product written as a plain loop."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    product, out = 1.0, []
    for i in range(count):
        product *= 1.0 - (low + (high - low) * i / (count - 1)) ** 2
        out.append(product)
    return out


class Gaussian(nn.Cell):
    """The exact eps of data drawn from N(mean, std^2), each pixel by itself; the context is the mean.

    E[eps | x_t] = s_t (x_t - a_t m) / (a_t^2 std^2 + s_t^2).
    """

    def __init__(self, schedule: Schedule, std: float) -> None:
        super().__init__()
        abar = schedule.alphas_cumprod
        self.signal = ms.Tensor(np.sqrt(abar), ms.float32)
        self.sigma = ms.Tensor(np.sqrt(1 - abar), ms.float32)
        self.factor = ms.Tensor(np.sqrt(1 - abar) / (abar * std**2 + 1 - abar), ms.float32)

    def construct(self, x, timesteps, context):
        signal = self.signal[timesteps].reshape((-1, 1, 1, 1))
        factor = self.factor[timesteps].reshape((-1, 1, 1, 1))
        return factor * (x - signal * context.mean(axis=(1, 2)).reshape((-1, 1, 1, 1)))


def gaussian_eps(x: float, time: int, mean: float, std: float, abar: list[float]) -> float:
    a2 = abar[time]
    return math.sqrt(1 - a2) * (x - math.sqrt(a2) * mean) / (a2 * std**2 + 1 - a2)


def test_schedule_values():
    schedule = Schedule()
    assert schedule.betas[0] == pytest.approx(0.00085, rel=1e-12)
    assert schedule.betas[-1] == pytest.approx(0.012, rel=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod, reference_abar(), rtol=1e-10)
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.00466009, rel=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [{"timesteps": 0}, {"timesteps": 2.5}, {"linear_start": 0.0}, {"linear_start": 0.02}, {"linear_end": 1.0}],
)
def test_schedule_refuses(arguments):
    with pytest.raises(ValueError, match="a schedule needs"):
        Schedule(**arguments)


def test_min_snr_weights():
    schedule, abar = Schedule(), reference_abar()
    weights = min_snr_weights(schedule, 5.0)
    for t in (0, 100, 300, 999):
        snr = abar[t] / (1 - abar[t])
        assert weights[t] == pytest.approx(min(snr, 5.0) / snr, rel=1e-9)
        for_v = min_snr_weights(Schedule(prediction="v"), 5.0)[t]
        assert for_v == pytest.approx(min(snr, 5.0) / (snr + 1), rel=1e-9)
    assert (min_snr_weights(schedule, None) == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_forward_process(mode):
    ms.set_context(mode=mode)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 4, 2, 2))
    times = np.array([0, 500, 999], np.int32)
    abar = np.array(reference_abar())[times].reshape(-1, 1, 1, 1)
    targets = {"epsilon": noise, "v": np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0}
    for prediction, target in targets.items():
        got = ForwardProcess(Schedule(prediction=prediction))(
            ms.Tensor(x0, ms.float32), ms.Tensor(times), ms.Tensor(noise, ms.float32))
        expected = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
        np.testing.assert_allclose(got[0].asnumpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1].asnumpy(), target, rtol=1e-5, atol=1e-6)


class Zero(nn.Cell):
    """Predicts nothing: the loss is the target's square."""

    def construct(self, x, timesteps, context):
        return x * 0


@pytest.mark.parametrize("mode", MODES)
def test_loss_of_v_and_of_class_images(mode):
    ms.set_context(mode=mode)
    rng = np.random.default_rng(4)
    x0, noise = rng.standard_normal((2, 4, 2, 3, 3))
    times = np.array([3, 400, 950, 20], np.int32)
    abar = np.array(reference_abar())[times].reshape(-1, 1, 1, 1)
    tensors = ms.Tensor(x0, ms.float32), ms.Tensor(np.zeros((4, 1, 1)), ms.float32), ms.Tensor(times), ms.Tensor(
        noise, ms.float32)
    square = ((np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0) ** 2).mean((1, 2, 3))
    got = DiffusionLoss(Zero(), Schedule(prediction="v"))(*tensors)
    np.testing.assert_allclose(got.asnumpy(), square.mean(), rtol=1e-5)
    plain = (noise ** 2).mean((1, 2, 3))
    got = DiffusionLoss(Zero(), Schedule(), prior_weight=0.3)(*tensors)
    np.testing.assert_allclose(got.asnumpy(), plain[:2].mean() + 0.3 * plain[2:].mean(), rtol=1e-5)


def test_noise_offset():
    """With eps + 0.5 eps' a pixel has the variance 1.25, and the mean of a channel 0.25 + 1 / pixels."""
    shape = (400, 4, 8, 8)
    _, plain = draw_noise(np.random.default_rng(0), shape, Schedule())
    _, noise = draw_noise(np.random.default_rng(0), shape, Schedule(), 0.5)
    added = noise - plain
    np.testing.assert_allclose(added, np.broadcast_to(added[..., :1, :1], shape), atol=1e-6)
    assert noise.var() == pytest.approx(1.25, rel=0.05)
    assert noise.mean((2, 3)).var() == pytest.approx(0.25 + 1 / 64, rel=0.1)
    _, again = draw_noise(np.random.default_rng(0), shape, Schedule(), 0.0)
    np.testing.assert_array_equal(again, plain)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_from_v_is_the_step_from_the_same_epsilon(mode):
    """A network that says v = a eps - s x0 says the same of the clean image as one that says eps."""
    ms.set_context(mode=mode)
    a, s = 0.8, 0.6
    rng = np.random.default_rng(5)
    x, eps = rng.standard_normal((2, 3, 2, 4, 4)).astype(np.float32)
    clean = (x - s * eps) / a

    class Says(nn.Cell):
        def __init__(self, value):
            super().__init__()
            self.value = ms.Tensor(np.concatenate([value, value]), ms.float32)

        def construct(self, x, timesteps, context):
            return self.value

    values = ms.Tensor([3.0, a, s, 0.5, 0.25, 0.125], ms.float32)
    inputs = ms.Tensor(x), ms.Tensor(eps), ms.Tensor(np.zeros(6, np.int32)), ms.Tensor(np.zeros((6, 1, 1), np.float32))
    results = [GuidedStep(Says(value), kind)(*inputs, values) for value, kind in (
        (eps, "epsilon"), (a * eps - s * clean, "v"))]
    np.testing.assert_allclose(results[0][1].asnumpy(), clean, rtol=1e-4, atol=1e-5)
    for first, second in zip(*results):
        np.testing.assert_allclose(first.asnumpy(), second.asnumpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss(mode, gamma):
    ms.set_context(mode=mode)
    rng = np.random.default_rng(1)
    x0, noise = rng.standard_normal((2, 3, 4, 2, 2))
    context = rng.standard_normal((3, 5, 6))
    times = np.array([3, 400, 950], np.int32)
    abar = reference_abar()
    expected = 0.0
    for i, t in enumerate(times):
        x = math.sqrt(abar[t]) * x0[i] + math.sqrt(1 - abar[t]) * noise[i]
        eps = gaussian_eps(x, t, context[i].mean(), 0.7, abar)
        snr = abar[t] / (1 - abar[t])
        weight = 1.0 if gamma is None else min(snr, gamma) / snr
        expected += weight * ((eps - noise[i]) ** 2).mean() / len(times)
    loss = DiffusionLoss(Gaussian(Schedule(), 0.7), Schedule(), gamma)
    got = loss(
        ms.Tensor(x0, ms.float32), ms.Tensor(context, ms.float32), ms.Tensor(times), ms.Tensor(noise, ms.float32)
    )
    np.testing.assert_allclose(got.asnumpy(), expected, rtol=1e-5)


def test_loss_and_step_keep_the_names():
    net = nn.SequentialCell(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    names = [p.name for p in net.get_parameters()]
    DiffusionLoss(net, Schedule())
    GuidedStep(net)
    assert [p.name for p in net.get_parameters()] == names


def test_draw_noise_is_seeded_stratified_and_normal():
    times, noise = draw_noise(np.random.default_rng(7), (50, 4, 8, 8), Schedule())
    again = draw_noise(np.random.default_rng(7), (50, 4, 8, 8), Schedule())
    assert (times == again[0]).all() and (noise == again[1]).all()
    assert times.dtype == np.int32 and noise.dtype == np.float32
    assert sorted(times // 20) == list(range(50))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_sampling_times():
    assert sampling_times(Schedule(), 4).tolist() == [999, 749, 499, 249]
    assert sampling_times(Schedule(), 1000).tolist() == list(range(999, -1, -1))
    for wrong in (0, 1001, 2.0, True):
        with pytest.raises(ValueError, match="sampling takes 1 to 1000 steps"):
            sampling_times(Schedule(), wrong)
    with pytest.raises(ValueError, match="unknown solver 'plms'; choose one of ddim, dpm\\+\\+"):
        list(sampling_plan(Schedule(), "plms", 4))


def reference_sample(x: float, solver: str, steps: int, mean: float, std: float) -> float:
    """The samplers as their papers write them, one float64 number at a time."""
    abar = reference_abar()
    times = [round(1000 * k / steps) - 1 for k in range(steps, 0, -1)]
    old_x0 = old_lambda = None
    for i, t in enumerate(times):
        a, s = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        eps = gaussian_eps(x, t, mean, std, abar)
        x0 = (x - s * eps) / a
        if i == steps - 1:
            return x0
        a_next, s_next = math.sqrt(abar[times[i + 1]]), math.sqrt(1 - abar[times[i + 1]])
        if solver == "ddim":
            x = a_next * x0 + s_next * eps
            continue
        lam, lam_next = math.log(a / s), math.log(a_next / s_next)
        h = lam_next - lam
        guess = x0
        if old_x0 is not None:
            r = (lam - old_lambda) / h
            guess = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old_x0
        x = s_next / s * x - a_next * (math.exp(-h) - 1) * guess
        old_x0, old_lambda = x0, lam
    raise AssertionError("unreachable")


def draw(solver: str, steps: int, guidance: float, noise: np.ndarray, means: list[float], std: float) -> np.ndarray:
    schedule = Schedule()
    context = np.array(means, np.float64).reshape(-1, 1, 1) * np.ones((1, 3, 2))
    step = GuidedStep(Gaussian(schedule, std))
    empty = np.zeros((1, 3, 2))
    return sample(step, noise, context, empty, schedule, solver=solver, steps=steps, guidance=guidance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_equal_the_papers(mode, solver):
    ms.set_context(mode=mode)
    noise = np.random.default_rng(2).standard_normal((2, 1, 2, 2))
    got = draw(solver, 7, 1.0, noise, [1.5, -0.5], 0.4)
    expected = [[reference_sample(v, solver, 7, m, 0.4) for v in n.ravel()] for n, m in zip(noise, [1.5, -0.5])]
    np.testing.assert_allclose(got.reshape(2, 4), expected, rtol=2e-4, atol=2e-5)


def test_guidance_extrapolates_from_the_empty_prompt():
    # eps is linear in the mean, and the empty prompt's mean is 0: guidance g acts as a mean g times as large.
    noise = np.random.default_rng(3).standard_normal((2, 1, 2, 2))
    np.testing.assert_allclose(
        draw("ddim", 5, 3.0, noise, [0.5, -1.0], 0.6), draw("ddim", 5, 1.0, noise, [1.5, -3.0], 0.6), atol=2e-4
    )


@pytest.mark.parametrize(("solver", "steps"), [("ddim", 500), ("dpm++", 100)])
def test_samplers_reach_the_gaussian(solver, steps):
    # The exact flow from N(0, 1) at T, seen by the model as N(a_T m, a_T^2 std^2 + s_T^2), to N(m, std^2) is affine.
    mean, std = 1.0, 0.5
    noise = np.random.default_rng(4).standard_normal((1, 1, 8, 8))
    abar = reference_abar()[-1]
    spread = math.sqrt(abar * std**2 + 1 - abar)
    exact = mean + std * (noise - math.sqrt(abar) * mean) / spread
    np.testing.assert_allclose(draw(solver, steps, 1.0, noise, [mean], std), exact, atol=0.03)


def test_one_prompt_for_each_image():
    with pytest.raises(ValueError, match="one prompt for each image: got noise for 2 images and 1 prompts"):
        draw("ddim", 2, 1.0, np.zeros((2, 1, 2, 2)), [1.0], 0.5)
