"""Random numbers against splitmix64 written in plain Python integers, and against published and `b2sum` values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmoco.seed import hash64, mix64, permutation, uniform, uniforms

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
