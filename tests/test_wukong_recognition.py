"""The measure of what a person sees: values by a plain loop, shifts, ranks."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "wukong"))

from recognition import distances, found  # noqa: E402


def brute_force(one: np.ndarray, other: np.ndarray) -> float:
    """Written with loops: luminance, means of 2 x 2 pixels, the least over 25 shifts with white coming in."""
    def grey(image):
        return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]

    def cells(image):
        return np.array([[image[2 * i:2 * i + 2, 2 * j:2 * j + 2].mean() for j in range(16)] for i in range(16)])

    best = np.inf
    for down in range(-2, 3):
        for right in range(-2, 3):
            moved = np.ones((3, 32, 32))
            for y in range(32):
                for x in range(32):
                    if 0 <= y - down < 32 and 0 <= x - right < 32:
                        moved[:, y, x] = one[:, y - down, x - right]
            best = min(best, ((cells(grey(moved)) - cells(grey(other))) ** 2).sum())
    return best


def test_distances_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    drawn, targets = rng.uniform(-1, 1, (2, 2, 3, 32, 32)).astype(np.float32)
    expected = [[brute_force(one, other) for other in targets] for one in drawn]
    np.testing.assert_allclose(distances(drawn, targets), expected, rtol=1e-4)


def test_moved_pictures_are_found_and_others_are_not():
    rng = np.random.default_rng(1)
    targets = np.ones((12, 3, 32, 32), np.float32)
    targets[:, :, 8:24, 8:24] = rng.choice([-1.0, 1.0], (12, 1, 4, 4)).repeat(4, 2).repeat(4, 3)
    moved = np.roll(targets, (2, -1), (2, 3))
    assert found(moved, targets) == (12, 12, 12)
    assert found(np.roll(moved, 1, 0), targets).top1 == 0
    assert found(targets[[0] * 12], targets).top1 == 1


def test_one_of_five_nearest():
    """Grey pictures of falling brightness: the k-th nearest of a picture is the k-th in the row."""
    targets = np.stack([np.full((3, 32, 32), 0.9 - 0.1 * i, np.float32) for i in range(8)])
    drawn = np.stack([targets[0]] * 8)
    result = found(drawn, targets)
    assert (result.top1, result.top5, result.count) == (1, 5, 8) and str(result) == "  1 and   5 of 8"
