"""Random numbers against splitmix64 written in plain Python integers, and against published and `b2sum` values."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmoco import seed as seeds_of
from vmoco.seed import LONGEST_SORTED, Order, hash64, mix64, permutation, uniform, uniforms

UINT64 = st.integers(0, 2**64 - 1)


def plain_mix(seed: int, salt: int) -> int:
    """Output number `salt` of the splitmix64 generator (Steele et al., 2014) that starts at `seed`."""
    z = (seed + (salt + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_mixer_gives_the_published_numbers() -> None:
    """Salts 0, 1 and 2 on seed 0 are the first outputs of splitmix64 seeded with 0, as its authors list them."""
    zero = np.zeros(1, np.uint64)
    assert [int(mix64(zero, salt)[0]) for salt in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@given(seeds=st.lists(UINT64, min_size=1, max_size=5), salt=UINT64)
def test_mixer_equals_the_plain_version(seeds: list[int], salt: int) -> None:
    """Seeds and salts of any size, also where the arithmetic wraps around."""
    assert mix64(np.array(seeds, np.uint64), salt).tolist() == [plain_mix(seed, salt) for seed in seeds]


@given(seed=UINT64, salt=UINT64)
def test_uniform_is_the_upper_bits_as_a_fraction(seed: int, salt: int) -> None:
    """The upper 53 bits over 2**53: in [0, 1), exactly."""
    (found,) = uniform(np.array([seed], np.uint64), salt)
    assert found == (plain_mix(seed, salt) // 2**11) / 2**53
    assert 0 <= found < 1


@pytest.mark.parametrize("salt", [0, 1, hash64("augment", "flip")])
def test_uniform_is_uniform_also_for_neighbouring_seeds(salt: int) -> None:
    """20,000 seeds in a row fill 20 bins evenly: chi-square of 19 degrees below its 0.9999 quantile, 50.8."""
    counts, _ = np.histogram(uniform(np.arange(20_000, dtype=np.uint64), salt), bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 50.8


def test_salts_are_independent() -> None:
    """Over 20,000 seeds the correlation of any two salts stays within four standard deviations (0.028) of 0."""
    seeds = np.arange(20_000, dtype=np.uint64)
    salts = [0, 1, 2, hash64("window"), hash64("augment", "top"), hash64("augment", "left")]
    correlation = np.corrcoef([uniform(seeds, salt) for salt in salts])
    assert np.abs(correlation - np.eye(len(salts))).max() < 4 / np.sqrt(20_000)


def test_hash_is_that_of_another_tool() -> None:
    """The value that `printf 'str:drop\\0int:3' | b2sum -l 64` prints, read as little endian."""
    assert hash64("drop", 3) == int.from_bytes(bytes.fromhex("38bb74895c49faf0"), "little")


def test_hash_separates_types_and_parts() -> None:
    """The same characters give other hashes as a number or a text, in one part or two, or in another order."""
    things = [("1",), (1,), ("ab",), ("a", "b"), ("b", "a"), ("a", "b", ""), ("", "a", "b"), (1, 2), (12,), ("1", 2)]
    assert len({hash64(*parts) for parts in things}) == len(things)


@given(length=st.integers(0, 200), seed=UINT64)
def test_permutation_is_the_plain_one(length: int, seed: int) -> None:
    """Every index appears once, in the order of the counters mixed twice in plain integers."""
    keys = [plain_mix(plain_mix(place, 0) ^ seed, seed) for place in range(length)]
    found = permutation(length, seed).tolist()
    assert sorted(found) == list(range(length))
    assert found == sorted(range(length), key=keys.__getitem__)


def test_permutations_of_different_seeds_have_little_in_common() -> None:
    """For 200 pairs of adjacent seeds, 1 place in 100 agrees on average, as with random permutations."""
    agreeing = [(permutation(100, seed) == permutation(100, seed + 1)).sum() for seed in range(200)]
    assert 0.6 < np.mean(agreeing) < 1.4


def test_uniforms_are_uniform_for_each_salt() -> None:
    """For each salt they give the same bits as `uniform`."""
    seeds, salts = np.arange(5, dtype=np.uint64) * np.uint64(2**61 + 7), [0, 3, 2**64 - 1]
    expected = np.stack([uniform(seeds, salt) for salt in salts], axis=1)
    np.testing.assert_array_equal(uniforms(seeds, salts), expected)


def computed(length: int, seed: int) -> Order:
    """An order without an array, which shorter ranges have not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds_of, "LONGEST_SORTED", 0)
        return Order(length, seed)


@given(length=st.integers(1, 300), seed=UINT64, data=st.data())
def test_short_order_is_the_permutation(length: int, seed: int, data: st.DataObject) -> None:
    """Of any places, in any order and also twice: data sets of less than a million videos keep their order."""
    places = data.draw(st.lists(st.integers(0, length - 1), max_size=20))
    assert Order(length, seed)[np.array(places, np.int64)].tolist() == permutation(length, seed)[places].tolist()


@given(length=st.integers(1, 5000), seed=UINT64)
def test_computed_order_is_a_permutation(length: int, seed: int) -> None:
    """Every number once; and a part of the places, asked for alone, has the same numbers."""
    order = computed(length, seed)
    found = order[np.arange(length)].tolist()
    assert sorted(found) == list(range(length))
    assert order[np.arange(length)[::-7]].tolist() == found[::-7]


def test_computed_order_prefers_no_number() -> None:
    """Over 4,000 seeds each of 8 places holds each of 50 numbers 80 times: chi-square below its 0.9999 quantile."""
    drawn = np.array([computed(50, seed)[np.arange(8)] for seed in range(4000)])
    for place in range(8):
        counts = np.bincount(drawn[:, place], minlength=50)
        assert ((counts - 80) ** 2 / 80).sum() < 96.0  # 49 degrees of freedom


def test_computed_order_separates_neighbours() -> None:
    """The step from one place to the next, and what adjacent places hold, are as in random permutations of 1,000.

    Two seeds agree at one place on average, and each pair of neighbours is as often ascending as descending.
    """
    orders = np.array([computed(1000, seed)[np.arange(1000)] for seed in range(300)])
    agreeing = (orders[1:] == orders[:-1]).sum(axis=1)
    assert abs(agreeing.mean() - 1) < 4 / np.sqrt(299)
    ascending = (np.diff(orders, axis=1) > 0).mean()
    assert abs(ascending - 0.5) < 4 * np.sqrt(1 / 12 / 1000 / 300)  # variance of the number of ascents: (n + 1) / 12
    steps = np.abs(np.diff(orders, axis=1))
    adjacent = (steps == 1).sum(axis=1).mean()  # 2 (n - 1) / n on average
    assert abs(adjacent - 2) < 4 * np.sqrt(2 / 300)
    middle = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(middle) < 4 / np.sqrt(300 * 999) + 1 / 999


def test_order_of_a_billion_needs_no_memory() -> None:
    """Begun at once, and a batch of places gives distinct numbers from the whole range."""
    tracemalloc.start()
    try:
        found = Order(10**9, 1)[np.arange(5 * 10**8, 5 * 10**8 + 4096)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**21
    assert len(set(found.tolist())) == 4096
    tenths = Counter((found // 10**8).tolist())
    assert sorted(tenths) == list(range(10))
    assert sum((count - 409.6) ** 2 / 409.6 for count in tenths.values()) < 33.7  # 9 degrees of freedom


@pytest.mark.parametrize("length", [LONGEST_SORTED, LONGEST_SORTED + 1])
def test_order_is_one_on_both_sides_of_the_limit(length: int) -> None:
    """The longest range that is sorted, and the shortest that is not, are permutations."""
    assert np.bincount(Order(length, 2)[np.arange(length)], minlength=length).tolist() == [1] * length
