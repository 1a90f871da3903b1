"""Random numbers that depend only on their purpose.

Every draw is a pure function of (run seed, epoch, sample, purpose), and no global generator is used. So a resumed run,
or a run with another number of ranks or another decoding order, draws the same numbers. The function is a 64-bit mixer
(splitmix64) and not the generator of a library, because no library promises the same stream in its next version.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence

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


def hash64_of(*parts: Iterable[str]) -> int:
    """`hash64` of texts that come in pieces, which need not be in memory together."""
    found, before = hashlib.blake2b(digest_size=8), ""
    for pieces in parts:
        found.update(f"{before}str:".encode())
        before = "\0"
        for piece in pieces:
            found.update(piece.encode("utf-8", "surrogateescape"))
    return int.from_bytes(found.digest(), "little")


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


LONGEST_SORTED = 2**20
"""Longest range of which `Order` keeps an array, 8 MiB at most. Longer ones take neither memory nor time to begin."""
_ROUNDS = 8


class Order:
    """A permutation of range(length) that is asked for some of its places.

    Up to LONGEST_SORTED it is `permutation`. Beyond, it is computed for the places asked for: a number below side**2 is
    written as two digits, left * side + right, and a Feistel network of 8 rounds mixes them, each round being
    (left, right) -> (right, (left + mixed(right)) mod side). Each round can be undone, so the network is a permutation
    of range(side**2); a result beyond the range goes through it again until it lies inside (cycle walking; Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002). `side` is the smallest number whose square is not below
    `length`, so that is rarely needed.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._sorted = permutation(length, seed) if length <= LONGEST_SORTED else None
        self._side = np.uint64(math.isqrt(length - 1) + 1) if length else np.uint64(0)
        self._salts = [hash64("order", seed, number) for number in range(_ROUNDS)]

    def __getitem__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What stands at these places, int64 in the shape of `places`, each in range(length)."""
        if self._sorted is not None:
            return self._sorted[places]
        found = self._mix(places.astype(np.uint64))
        while len(outside := np.flatnonzero(found >= self._length)):
            found[outside] = self._mix(found[outside])
        return found.astype(np.int64)

    def _mix(self, numbers: UInt64Array) -> UInt64Array:
        left, right = np.divmod(numbers, self._side)
        for salt in self._salts:
            left, right = right, (left + mix64(right, salt) % self._side) % self._side
        mixed: UInt64Array = left * self._side + right
        return mixed
