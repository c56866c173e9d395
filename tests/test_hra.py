"""What only HRA does: its formula by matrices, its starts, and what it refuses."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import nn
from nets import inputs, numbers, unchanged

import mindpet_lite as mp


def adapted(layer, **settings):
    net = nn.SequentialCell(layer)
    return mp.get_pet_model(net, mp.HRAConfig(target_modules=["0"], **settings))


def reflections(u):
    """Return the matrices I - 2 u uᵀ / ||u||²."""
    return [np.eye(len(u)) - 2 * np.outer(column, column) / (column @ column) for column in u.T]


@pytest.mark.parametrize("apply_GS", [False, True])
def test_the_formula(apply_GS, mode):
    net = adapted(nn.Dense(6, 4), r=3, apply_GS=apply_GS, init_weights=False)
    x, u = inputs(5, 6), numbers(net[0].mindpet_delta_hra_u)
    if apply_GS:
        u = np.linalg.qr(u)[0]
        chain = np.eye(6) - 2 * u @ u.T
    else:
        chain = np.linalg.multi_dot(reflections(u))
    assert np.allclose(chain @ chain.T, np.eye(6))
    wanted = numbers(x) @ (numbers(net[0].weight) @ chain).T + numbers(net[0].bias)
    np.testing.assert_allclose(net(x).asnumpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_convolution_is_reflected_over_channels_and_kernel(mode):
    net = adapted(nn.Conv2d(2, 3, (1, 2), pad_mode="valid"), r=2, init_weights=False)
    u, x = numbers(net[0].mindpet_delta_hra_u), inputs(1, 2, 3, 4)
    assert u.shape == (4, 2)
    kernel = (numbers(net[0].weight).reshape(3, 4) @ np.linalg.multi_dot(reflections(u))).reshape(3, 2, 1, 2)
    data = numbers(x)
    wanted = sum(np.einsum("oc,nchw->nohw", kernel[:, :, 0, at], data[..., at:at + 3]) for at in range(2))
    np.testing.assert_allclose(net(x).asnumpy(), wanted, rtol=1e-5, atol=1e-5)


def test_starts():
    paired = numbers(adapted(nn.Dense(8, 4), r=4)[0].mindpet_delta_hra_u)
    assert np.array_equal(paired[:, ::2], paired[:, 1::2]) and np.linalg.matrix_rank(paired) == 2
    for settings in ({"init_weights": False}, {"apply_GS": True}):
        assert np.linalg.matrix_rank(numbers(adapted(nn.Dense(8, 4), r=4, **settings)[0].mindpet_delta_hra_u)) == 4


def test_what_cannot_start_at_the_base_is_refused_but_loads():
    net = nn.SequentialCell(nn.Dense(8, 4))
    with unchanged(net), pytest.raises(ValueError, match="0: r must be even.*got 3: take 4.*init_weights=False"):
        mp.get_pet_model(net, mp.HRAConfig(r=3, target_modules=["0"]))
    own = adapted(nn.Dense(8, 4), r=3, init_weights=False)
    mp.save_adapter(own, "adapter")
    mp.load_adapter(net, "adapter")
    assert np.array_equal(*(numbers(item[0].mindpet_delta_hra_u) for item in (own, net)))


def test_groups_are_refused():
    net = nn.SequentialCell(nn.Conv2d(4, 4, 1, group=2))
    with unchanged(net), pytest.raises(ValueError, match="0: HRA knows no convolution with groups"):
        mp.get_pet_model(net, mp.HRAConfig(target_modules=["0"]))


@pytest.mark.parametrize(("settings", "error"), [({"r": 0}, ValueError), ({"r": 2.0}, TypeError),
                                                 ({"apply_GS": 1}, TypeError), ({"init_weights": "no"}, TypeError)])
def test_wrong_settings(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        mp.HRAConfig(target_modules=["0"], **settings)
