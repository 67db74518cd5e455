"""Blocks of holders draw what each holder alone would; a device's streams are as good."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from common.privacy.noise import SeededRandomness, simulation_key
from simulations import randomness as module
from simulations.randomness import (
    BlockRandomness,
    DeviceRandomness,
    Streams,
    block_randomness,
    squares,
)

CPU = torch.device("cpu")
LEVEL = 1e-6  # of one test; all are seeded

Make = Callable[[Sequence[bytes]], Streams]
blocks = pytest.mark.parametrize(
    "make", [BlockRandomness, lambda keys: DeviceRandomness(keys, CPU)], ids=["block", "device"]
)


def keys_of(holders: int, first: int = 0) -> list[bytes]:
    return [simulation_key("block", first + h) for h in range(holders)]


def calls(draw: st.DrawFn, holders: int) -> list[tuple[object, ...]]:
    """Calls in any order, with the holders' sizes or counts."""
    sizes = st.lists(st.integers(0, 9), min_size=holders, max_size=holders)
    some = st.one_of(
        st.tuples(st.just("uniform"), sizes, st.integers(0, 3)),
        st.tuples(st.just("normal"), st.integers(0, 12)),
        st.tuples(st.just("draws"), sizes, st.integers(0, 3)),
    )
    return draw(st.lists(some, min_size=1, max_size=5))


def made(block: Streams, call: tuple[object, ...]) -> Tensor:
    name, *arguments = call
    result = getattr(block, str(name))(*arguments)
    assert isinstance(result, Tensor)
    return result


def alone(source: SeededRandomness, call: tuple[object, ...], holder: int) -> tuple[Tensor, float]:
    """What one holder draws by itself, in the block's shape, and what is beyond it."""
    if call[0] == "normal":
        return source.normal((call[1],), std=1.0), 0.0
    _, sizes, k = call
    if call[0] == "uniform":
        steps = [source.uniform(sizes[holder]) for _ in range(k)]
        none = torch.empty(0, sizes[holder], dtype=torch.float64)
        return torch.stack(steps) if steps else none, 1.0
    return source.draws(sizes[holder] * k).view(sizes[holder], k), 0.0


@given(st.data(), st.integers(1, 4), st.integers(1, 40))
def test_a_block_draws_bit_for_bit_what_its_holders_draw(
    data: st.DataObject, holders: int, part: int
) -> None:
    keys = keys_of(holders)
    block = BlockRandomness(keys)
    sources = [SeededRandomness.of_key(key) for key in keys]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART", part)  # so that a block's noise is made in several parts
        for call in data.draw(st.composite(calls)(holders)):
            result = made(block, call)
            widest = call[1] if call[0] == "normal" else max(call[1])
            assert widest in result.shape
            for h, source in enumerate(sources):
                expected, beyond = alone(source, call, h)
                own = result[h][tuple(slice(n) for n in expected.shape)]
                assert own.dtype == expected.dtype
                assert torch.equal(own, expected)
                rest = torch.ones_like(result[h], dtype=torch.bool)
                rest[tuple(slice(n) for n in expected.shape)] = False
                assert (result[h][rest] == beyond).all()


@pytest.mark.parametrize("n", [4130, 4131, 70_000, 200_001])
def test_a_models_noise_is_the_holders_own_bit_for_bit(n: int) -> None:
    """At sizes where vector instructions, parts and remainders of parts all take part."""
    keys = keys_of(37 if n < 10_000 else 2)
    block = BlockRandomness(keys)
    sources = [SeededRandomness.of_key(key) for key in keys]
    for _ in range(2):
        alone = torch.stack([source.normal((n,), std=1.0) for source in sources])
        assert torch.equal(block.normal(n), alone)


@blocks
@given(data=st.data(), holders=st.integers(1, 5))
def test_numbers_do_not_depend_on_how_holders_are_divided(
    make: Make, data: st.DataObject, holders: int
) -> None:
    cut = data.draw(st.integers(0, holders))
    whole, first, second = make(keys_of(holders)), make(keys_of(cut)), make(keys_of(holders)[cut:])
    for call in data.draw(st.composite(calls)(holders)):
        together = made(whole, call)
        for part, rows in ((first, slice(None, cut)), (second, slice(cut, None))):
            its = call if call[0] == "normal" else (call[0], call[1][rows], *call[2:])
            result = made(part, its)
            inside = together[rows][tuple(slice(n) for n in result.shape)]
            assert torch.equal(inside, result)


@blocks
def test_successive_calls_go_on_and_streams_do_not_move_each_other(make: Make) -> None:
    sizes = [3, 5, 0]
    once, often = make(keys_of(3)), make(keys_of(3))
    often.normal(7)
    often.draws(sizes, 2)
    steps = [often.uniform(sizes, k) for k in (2, 1, 3)]
    assert torch.equal(torch.cat(steps, dim=1), once.uniform(sizes, 6))
    rest = often.draws(sizes, 1)
    expected = once.draws([3 * s for s in sizes], 1)  # the first 2·s numbers went by above
    for h, size in enumerate(sizes):
        assert torch.equal(rest[h, :size], expected[h, 2 * size : 3 * size])
    assert not torch.equal(often.normal(7), once.normal(7))


@blocks
def test_padding_is_never_sampled_and_sizes_may_be_zero(make: Make) -> None:
    block = make(keys_of(3))
    uniform, draws = block.uniform([2, 0, 4], 3), block.draws([2, 0, 4], 5)
    assert uniform.shape == (3, 3, 4)
    assert draws.shape == (3, 4, 5)
    assert uniform.dtype == draws.dtype == torch.float64
    assert (uniform[0, :, 2:] == 1).all()
    assert (uniform[1] == 1).all()
    assert (uniform[0, :, :2] < 1).all()
    assert (uniform[2] < 1).all()
    assert not draws[0, 2:].any()
    assert not draws[1].any()
    assert draws[0, :2].all()
    assert draws[2].all()


@blocks
def test_blocks_without_holders_or_numbers_are_ordinary(make: Make) -> None:
    assert make([]).normal(4).shape == (0, 4)
    assert make([]).uniform([], 2).shape == (0, 2, 0)
    assert make([]).draws([], 2).shape == (0, 0, 2)
    assert make(keys_of(2)).normal(0).shape == (2, 0)
    assert make(keys_of(2)).uniform([0, 0], 3).shape == (2, 3, 0)


@blocks
def test_every_holder_needs_a_size(make: Make) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        make(keys_of(3)).uniform([2, 2], 1)


def test_the_device_decides_the_kind() -> None:
    assert isinstance(block_randomness(keys_of(1), CPU), BlockRandomness)
    assert isinstance(block_randomness(keys_of(1), torch.device("meta")), DeviceRandomness)


# -- quality ---------------------------------------------------------------------------------


def fits(draws: Tensor, law: str, scale: float = 1.0) -> bool:
    return bool(stats.kstest(draws.double().flatten().numpy() / scale, law).pvalue > LEVEL)


@blocks
def test_numbers_have_their_distribution_and_no_other(make: Make) -> None:
    block = make(keys_of(20))
    for noise in (block.normal(2001), torch.cat([block.normal(5) for _ in range(400)], dim=1)):
        assert noise.dtype == torch.float32
        assert fits(noise, "norm")
        assert fits(noise[:, 0], "norm")  # across holders, at one place
        assert not fits(noise, "norm", 2 / 3)
        assert not fits(noise, "norm", 3 / 2)
    for uniform in (block.uniform([500] * 20, 4), block.draws([500] * 20, 4)):
        assert fits(uniform, "uniform")
        assert fits((uniform * 2.0**20) % 1, "uniform")  # the lower bits
        assert fits((uniform * 2.0**38) % 1, "uniform")
        assert not fits(uniform, "uniform", 0.95)


@blocks
def test_numbers_are_independent(make: Make) -> None:
    """Between holders, calls, streams and neighbours, and half a call apart."""
    n = 20_000
    block = make(keys_of(3))
    rows = [*block.normal(n), *block.normal(n)]
    rows += [*block.uniform([n] * 3, 1)[:, 0], *block.draws([n] * 3, 1)[..., 0]]
    for lag in (1, 2, n // 2):
        rows.append(rows[0].roll(lag))
    matrix = np.corrcoef(torch.stack([row.double() for row in rows]).numpy())
    bound = float(stats.norm.isf(LEVEL / 2)) / np.sqrt(n)
    assert np.abs(matrix[np.triu_indices(len(rows), 1)]).max() < bound
    same = make([simulation_key("same")] * 2).normal(n)  # the bound can be passed
    assert np.corrcoef(same.numpy())[0, 1] > bound


@blocks
def test_tails_are_normal(make: Make) -> None:
    draws = make(keys_of(10)).normal(20_000)
    for k in (3.0, 4.0):
        beyond = int((draws.abs() > k).sum())
        assert stats.binomtest(beyond, draws.numel(), 2 * stats.norm.sf(k)).pvalue > LEVEL
    assert draws.isfinite().all()


def test_blocks_may_be_used_from_several_threads_at_once() -> None:
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        block = BlockRandomness(keys_of(5, first=10 * i))
        results[i] = torch.cat([block.normal(3001) for _ in range(20)], dim=1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(results)
    for i, result in together.items():
        work(i)
        assert torch.equal(results[i], result)


# -- squares ---------------------------------------------------------------------------------


def squares32(counter: int, key: int) -> int:
    """The paper's algorithm, on unsigned integers."""
    mask = 2**64 - 1
    x = y = (counter * key) & mask
    z = (y + key) & mask
    for addend in (y, z, y):
        x = (x * x + addend) & mask
        x = (x >> 32) | ((x << 32) & mask)
    return ((x * x + z) & mask) >> 32


def unsigned(word: int, bits: int = 64) -> int:
    return word % 2**bits


words = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=20))
def test_squares_is_the_published_algorithm(pairs: list[tuple[int, int]]) -> None:
    counters, keys = torch.tensor(pairs).T
    expected = [squares32(unsigned(counter), unsigned(key)) for counter, key in pairs]
    result = squares(counters, keys)
    assert [unsigned(word, 32) for word in result.tolist()] == expected
    assert torch.equal(result, result.to(torch.int32).long())


def test_a_devices_numbers_are_squares_of_its_counters() -> None:
    """Normals take a word each, uniforms two; every stream its own key, all one start."""
    key = simulation_key("layout")
    *stream_keys, start = (int.from_bytes(key[i : i + 8], "little") for i in range(0, 32, 8))
    sampling, noise, draws = (stream_key | 1 for stream_key in stream_keys)

    def word(place: int, stream_key: int) -> int:
        return squares32((start + place) % 2**64, stream_key)

    def uniform(place: int, stream_key: int) -> float:
        high, low = word(2 * place, stream_key), word(2 * place + 1, stream_key)
        return ((high << 32 | low) >> 11) * 2.0**-53

    device = DeviceRandomness([key], CPU)
    assert device.uniform([3], 2)[0].flatten().tolist() == [uniform(i, sampling) for i in range(6)]
    assert device.draws([2], 2)[0].flatten().tolist() == [uniform(i, draws) for i in range(4)]
    assert device.uniform([1], 1).item() == uniform(6, sampling)
    device.normal(3)  # uses four words
    signed = torch.tensor([word(i, noise) for i in range(4, 10)]).to(torch.int32)
    assert torch.equal(device.normal(6)[0], module.standard_normal(signed))
