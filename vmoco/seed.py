"""Random numbers that depend only on their purpose.

Every draw is a pure function of (run seed, epoch, sample, purpose), and no global generator is used. So a resumed run,
or a run with another number of ranks or another decoding order, draws the same numbers. The function is a 64-bit mixer
(splitmix64) and not the generator of a library, because no library promises the same stream in its next version.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@functools.lru_cache(4096)  # most parts are names of purposes, which every batch needs again
def hash64(*parts: str | int) -> int:
    """A stable 64-bit hash of the parts, for names and purposes. It is slow; `mix64` is the fast one, for arrays."""
    assert all(type(part) in (str, int) for part in parts), (
        f"{parts}: only str and int, because a NumPy integer would give another hash than the equal int"
    )
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def mix64(seeds: UInt64Array, salt: int) -> UInt64Array:
    """One 64-bit number per seed, mixed with the salt (the finaliser of splitmix64), in the shape of `seeds`."""
    return _mixed(np.atleast_1d(np.asarray(seeds, np.uint64)) + _step(salt)).reshape(np.shape(seeds))


def _step(salt: int) -> np.uint64:
    return np.uint64((salt + 1) * _GOLDEN % 2**64)


def _mixed(z: UInt64Array) -> UInt64Array:
    z ^= z >> np.uint64(30)
    z *= _MIX_1  # arrays wrap around at 2**64 without a warning, as intended
    z ^= z >> np.uint64(27)
    z *= _MIX_2
    z ^= z >> np.uint64(31)
    return z


def uniform(seeds: UInt64Array, salt: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per seed, float64, in the shape of `seeds`. Different salts give independent numbers."""
    return _unit(mix64(seeds, salt))


def uniforms(seeds: UInt64Array, salts: Sequence[int]) -> npt.NDArray[np.float64]:
    """`uniform` of seeds (N,) for several salts at once: (N, number of salts)."""
    return _unit(_mixed(seeds[:, None] + (np.array(salts, np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)))


def _unit(mixed: UInt64Array) -> npt.NDArray[np.float64]:
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length: int, seed: int) -> npt.NDArray[np.int64]:
    """A permutation of range(length), int64 (length,): the sorting order of mixed counters."""
    keys = mix64(np.arange(length, dtype=np.uint64), 0) ^ np.uint64(seed)
    return np.argsort(mix64(keys, seed), kind="stable").astype(np.int64)
