"""PyTorch's numbers from a seed, bit for bit: as stored here, and as PyTorch itself gives them."""
from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from mindpet_lite.formats import torch_arithmetic, torch_random
from mindpet_lite.formats.torch_random import TorchGenerator

SIZES = (1, 15, 16, 17, 100)
# What PyTorch 2.13.0 gives (CPU build, Linux, x86 with AVX2 or AVX-512): test_pytorch_gives_what_is_stored.
# float32 as bits, one generator's calls of `mixed`; and by seed, digests of `every_call` for each of SIZES.
MIXED = """
    3f61dc66 3f6a3db3 3ec406b8 bf544e43 bfce8df3 be5bdb81 3e990e13 bc2f400b 3f052751 3fd23771 be236d85 befeaae4
    3fdbd280 3ea34448 bed95a8d 3e9c8774 bf464bb2 3d0f003f 3ea4679d 3fc96bbb bf19e472 bfa31763 4007dbb6 bf9e091d
    bef9cfd9 bfb582fd 3f6571d7 3d4c6997 2 5 6 1 3 0 4 bf9fe516 3f07fd47 be7e3b5f be31b49a 77088763605 382025442444
    3e4ea034 3f7320f1"""
DIGESTS = {
    0: "510f9ff4ef8ae498 37257e1dccb34862 e6488d95aaf44dd8 740c869630a0b625 593cc0c7e64b5239",
    42: "b8ade922f534398e 8d489a556898cf29 704e5dd412219279 de389d95c04ce373 9320876a72de13fe",
    2 ** 32 + 5: "ec08d7a0c40fc755 8eb91bf6ba89d07c 0c91e53ffb987ebd a9637c86f00054d5 1af9e85c9a648037",
    -1: "5743b8dc1da9d214 9bf2555890f764c4 ead3e2a96a9facb9 183dbaf4a20cd3cc ff22e80b3de8e853"}
# The first of torch.randperm(214_748_364), the shortest of PyTorch's second way, from seed 1.
LONG = [81757386, 14531738, 31696440, 103595746, 185007634]


class Torch:
    """PyTorch's generator with the methods of ours."""

    def __init__(self, seed):
        import torch
        self.torch, self.generator = torch, torch.Generator().manual_seed(seed)

    def rand(self, *shape):
        return self.torch.rand(shape, generator=self.generator).numpy()

    def uniform(self, shape, low, high, dtype="float32"):
        tensor = self.torch.empty(shape, dtype=getattr(self.torch, dtype))
        return tensor.uniform_(low, high, generator=self.generator).float().numpy()

    def kaiming_uniform(self, shape, a=0, dtype="float32"):
        tensor = self.torch.empty(shape, dtype=getattr(self.torch, dtype))
        return self.torch.nn.init.kaiming_uniform_(tensor, a, generator=self.generator).float().numpy()

    def randn(self, *shape):
        return self.torch.randn(shape, generator=self.generator).numpy()

    def normal(self, shape, mean, std):
        return self.torch.empty(shape).normal_(mean, std, generator=self.generator).numpy()

    def randint(self, low, high, shape):
        return self.torch.randint(low, high, shape, generator=self.generator).numpy()

    def randperm(self, n, count=None):
        return self.torch.randperm(n, generator=self.generator)[:count].numpy()


def mixed(generator):
    """Return the numbers of calls that differ in kind and in size: each starts where the one before it stopped."""
    return [generator.rand(3), generator.randn(5), generator.randn(20), generator.randperm(7), generator.randn(4),
            generator.randint(-5, 2 ** 40, (2,)), generator.rand(2)]


def every_call(generator, size):
    """Return the numbers of each method, for tensors of a size and of other shapes."""
    return {
        "rand": generator.rand(size), "randn": generator.randn(size), "normal": generator.normal((size,), -0.3, 1.7),
        "uniform": generator.uniform((size, 2), -0.3, 1.7), "kaiming": generator.kaiming_uniform((size, 3)),
        "kaiming of three axes": generator.kaiming_uniform((3, 2, size), math.sqrt(5)),
        "bfloat16": generator.kaiming_uniform((size, 1, 7), math.sqrt(5), "bfloat16"),
        "bfloat16 from 1": generator.uniform((size, 2), 1, 1.25, "bfloat16"),
        "integers from 32 bits": generator.randint(-3, 2 ** 28 - 4, (size,)),
        "integers from 64 bits": generator.randint(-3, 2 ** 28 - 3, (size,)),
        "all integers": generator.randint(-2 ** 63, 2 ** 63 - 1, (size, 2)),
        "randperm": generator.randperm(size), "start of randperm": generator.randperm(3 * size, size),
        "none": generator.randn(0), "one": generator.rand()}


def digest(arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def same(found, wanted):
    return (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def stored(generator):
    """Return what `DIGESTS` holds, of one generator."""
    return [digest(every_call(generator, size).values()) for size in SIZES]


def words(arrays):
    """Return what `MIXED` holds, of some arrays."""
    return [f"{value:08x}" if array.dtype == np.float32 else str(value) for array in arrays
            for value in (array.view(np.uint32) if array.dtype == np.float32 else array)]


def test_a_mixed_sequence_is_as_stored():
    assert words(mixed(TorchGenerator(42))) == MIXED.split()


@pytest.mark.parametrize("seed", DIGESTS)
def test_every_call_is_as_stored(seed):
    assert stored(TorchGenerator(seed)) == DIGESTS[seed].split()


def test_the_start_of_a_long_permutation_is_as_stored():
    assert TorchGenerator(1).randperm(214_748_364, 5).tolist() == LONG


@pytest.mark.parametrize("count", [1000, 150, 0])
def test_a_long_permutation_step_by_step(monkeypatch, count):
    monkeypatch.setattr(torch_random, "_LONG_PERMUTATION", 1000)
    monkeypatch.setattr(torch_random, "_PIECE", 100)
    ours, plain = TorchGenerator(5), TorchGenerator(5)
    wanted = list(range(1000))
    for place in range(1000):
        other = int(plain._wide_words(1)[0]) % (place + 1)
        wanted[place], wanted[other] = wanted[other], place
    assert ours.randperm(1000, count).tolist() == wanted[:count]
    assert ours.rand() == plain.rand()


def test_float64_rounds_without_harm_on_all_arguments(monkeypatch):
    step = 2 ** 15
    for start in range(0, 2 ** 24, step):
        fractions = np.arange(start, start + step).astype(np.float32) * np.float32(2 ** -24)
        arguments = np.float32(1) - fractions, torch_arithmetic.TWO_PI * fractions
        found = torch_arithmetic.log(arguments[0]), *torch_arithmetic.cosine_and_sine(arguments[1])
        with monkeypatch.context() as patch:
            patch.setattr(torch_arithmetic, "multiply_add", torch_arithmetic.fused)
            wanted = torch_arithmetic.log(arguments[0]), *torch_arithmetic.cosine_and_sine(arguments[1])
        assert all(same(*pair) for pair in zip(found, wanted))


def test_a_fused_sum_is_rounded_once():
    # The exact sum lies just above the middle of two float32, float64 rounds it to the middle.
    x, z = np.array([1 + 2.0 ** -12], np.float32), np.float32(2.0 ** -60)
    assert torch_arithmetic.fused(x, x[0], z)[0] == np.float32(1 + 2.0 ** -11 + 2.0 ** -23)
    assert torch_arithmetic.fused(x, x[0], -z)[0] == np.float32(1 + 2.0 ** -11)


@pytest.mark.parametrize("call, message", [
    (lambda: TorchGenerator(2 ** 64), "seed must be an integer"),
    (lambda: TorchGenerator(0).uniform((2,), 1, 0), "low is 1 and high is 0"),
    (lambda: TorchGenerator(0).uniform((2,), -3e38, 3e38), "float32 can hold"),
    (lambda: TorchGenerator(0).uniform((2,), 0, 1, "float16"), "float32 or bfloat16, but is 'float16'"),
    (lambda: TorchGenerator(0).kaiming_uniform((3,)), r"it is \(3,\)"),
    (lambda: TorchGenerator(0).normal((2,), 0, -1), "std is -1"),
    (lambda: TorchGenerator(0).normal((2,), math.nan, 1), "mean is nan"),
    (lambda: TorchGenerator(0).randint(3, 3, (2,)), "low is 3 and high is 3"),
    (lambda: TorchGenerator(0).randint(0, 2 ** 63, (2,)), "within int64"),
    (lambda: TorchGenerator(0).randperm(3, 4), "count is 4"),
    (lambda: TorchGenerator(0).randperm(-1), "n is -1")])
def test_what_no_generator_gives_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.interop
class TestBesidePyTorch:
    @pytest.fixture(autouse=True)
    def with_pytorch(self):
        torch = pytest.importorskip("torch", reason="pip install 'mindpet_lite[interop]'")
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            pytest.skip("on this processor PyTorch gives other last bits")

    def test_pytorch_gives_what_is_stored(self):
        assert words(mixed(Torch(42))) == MIXED.split()
        assert {seed: stored(Torch(seed)) for seed in DIGESTS} == {seed: text.split() for seed, text in DIGESTS.items()}

    def test_each_call_goes_on_where_the_last_one_stopped(self):
        for seed in (*range(20), 2 ** 31, 2 ** 32 - 1, 2 ** 63, 2 ** 64 - 1, -2 ** 63):
            ours, theirs = TorchGenerator(seed), Torch(seed)
            for size in (*range(1, 35), 623, 624, 625, 1000, 4097):
                wanted = every_call(theirs, size)
                for name, found in every_call(ours, size).items():
                    assert same(found, wanted[name]), (name, seed, size)

    def test_large_tensors(self):
        ours, theirs = TorchGenerator(3), Torch(3)
        for name, arguments in [("randn", (3_000_001,)), ("normal", ((1000, 1000), 0.3, 0.02)), ("rand", (3_000_001,)),
                                ("kaiming_uniform", ((1000, 1000), math.sqrt(5))), ("randperm", (300_000,)),
                                ("uniform", ((3_000_001,), 0.3, 0.7)), ("randint", (0, 99, (1_000_000,)))]:
            assert same(getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments)), name

