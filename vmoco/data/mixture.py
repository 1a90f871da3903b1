"""The data sets that a run trains on: one, or several that are drawn from by weight.

The sets may differ in the size, length, rate and encoding of their clips. Each keeps its own epochs, and the plan says
which set gives each clip of a batch (`vmoco/data/plan.py`). A video that one set holds out is not trained on in any
set: files with the same content are found by their hashes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmoco import storage
from vmoco.clip_settings import DataSettings
from vmoco.data.clip_index import ClipIndex
from vmoco.data.manifest import Manifest
from vmoco.seed import UInt64Array, hash64


@dataclass(frozen=True)
class Mixture:
    """One data set, or several with their weights."""

    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...] = ()
    """Share of the draws that each set gives, adding up to 1."""

    @classmethod
    def load(cls, data: DataSettings, *, check_shards: bool = True) -> Mixture:
        """Opens the data sets of a run.

        Args:
            data: settings.
            check_shards: as `Manifest.load`.

        Raises:
            ValueError: as `Manifest.load`; or two places hold the same data set.
        """
        manifests = tuple(Manifest.load(uri, check_shards=check_shards) for uri in data.uri)
        for first, second in itertools.combinations(manifests, 2):
            if first.hash == second.hash:
                raise ValueError(
                    f"--data.uri: {first.uri} and {second.uri} have the same clips: name one of them, and give it "
                    "more weight by --data.weights"
                )
        return cls.of(manifests, data.weights)

    @classmethod
    def of(cls, data: Manifest | Mixture | Sequence[Manifest], weights: Sequence[float] = ()) -> Mixture:
        """The data sets as a mixture; without weights, each set has that of its number of clips."""
        if isinstance(data, Mixture):
            return data
        manifests = (data,) if isinstance(data, Manifest) else tuple(data)
        shares = np.array(weights or [max(each.counts["clips"], 1) for each in manifests], np.float64)
        return cls(manifests, tuple((shares / shares.sum()).tolist()))

    @property
    def is_one(self) -> bool:
        """Whether it is a single data set."""
        return len(self.manifests) == 1

    @property
    def hash(self) -> str:
        """16 hex digits: the hash of the data set, or one over the hashes of all, in their order."""
        hashes = [each.hash for each in self.manifests]
        return hashes[0] if self.is_one else hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]

    @property
    def uri(self) -> str:
        """Where the sets are, as text."""
        return ", ".join(each.uri for each in self.manifests)

    @property
    def counts(self) -> dict[str, int]:
        """`Manifest.counts`, added up over the sets."""
        names = dict.fromkeys(name for each in self.manifests for name in each.counts)
        return {name: sum(each.counts.get(name, 0) for each in self.manifests) for name in names}

    @property
    def names(self) -> tuple[str, ...]:
        """A short name of each set, for metrics: the last part of its place, with a number where two are equal."""
        ends = [re.sub(r"[^\w.-]", "_", each.uri.rstrip("/").rpartition("/")[2]) or "data" for each in self.manifests]
        return tuple(
            end if ends.count(end) == 1 else f"{end}-{ends[: place + 1].count(end)}" for place, end in enumerate(ends)
        )

    def indexes(self, data: DataSettings) -> list[ClipIndex]:
        """The clips that training takes of each set.

        Raises:
            ValueError: as `Selection` and `Selection.check`.
        """
        return [ClipIndex.of(each, data, others=self.others(each)) for each in self.manifests]

    def others(self, manifest: Manifest) -> tuple[Manifest, ...]:
        """The sets without one of them."""
        return tuple(each for each in self.manifests if each is not manifest)

    def stream_seed(self, place: int, seed: int) -> int:
        """Seed of the order of a set: that of the run, and in a mixture another one for each set."""
        return seed if self.is_one else hash64("data set", seed, self.manifests[place].hash) % 2**63

    @functools.cached_property
    def fps(self) -> float:
        """The median rate of all clips, frames per second."""
        rates: Counter[float] = Counter()
        for each in self.manifests:
            for piece in each.batches(["fps"]):
                values, counts = np.unique(piece["fps"].to_numpy(), return_counts=True)
                rates.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        values = np.array(sorted(rates))
        ends = np.cumsum([rates[value] for value in values.tolist()])
        # The middle value, or the mean of the two in the middle, as np.median has it.
        middle = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
        return float(values[middle].mean())


@dataclass(frozen=True)
class Shared:
    """Videos with the same content in two data sets."""

    first: Manifest
    second: Manifest
    videos: int
    held_out: int
    """Those of them that one set holds out and the other does not: no set trains on them."""


def shared_videos(mixture: Mixture) -> list[Shared]:
    """Counts the videos that two sets have in common, for each two that have any; reads the manifests once."""
    found = []
    contents = [_contents(each) for each in mixture.manifests] if not mixture.is_one else []
    for (first, mine), (second, theirs) in itertools.combinations(zip(mixture.manifests, contents, strict=False), 2):
        common, at, other = np.intersect1d(mine[0], theirs[0], assume_unique=True, return_indices=True)
        if len(common):
            found.append(Shared(first, second, len(common), int((mine[1][at] != theirs[1][other]).sum())))
    return found


def _contents(manifest: Manifest) -> tuple[UInt64Array, npt.NDArray[np.bool_]]:
    """Of each video of a data set, without repetition: 64 bits of its hash, and whether it is held out."""
    hashes, held = [], []
    for piece in manifest.batches(["video_sha256", "held_out"]):
        videos = piece["video_sha256"].combine_chunks().dictionary_encode()
        _, first = np.unique(videos.indices.to_numpy(), return_index=True)
        chosen = piece.take(first)
        hashes.append(np.array([int(text[-16:], 16) for text in chosen["video_sha256"].to_pylist()], np.uint64))
        held.append(chosen["held_out"].to_numpy(zero_copy_only=False))
    values, at = np.unique(np.concatenate(hashes), return_index=True)
    return values, np.concatenate(held)[at]


def absolute(data: DataSettings) -> DataSettings:
    """The settings with the complete place of each data set.

    Raises:
        ValueError: none is given, or a place cannot be read from other machines.
    """
    if not data.uri:
        raise ValueError("--data.uri is missing: give the data set that jobs/ingest.py made")
    places = tuple(storage.absolute_uri(storage.require_absolute(uri, "data.uri")) for uri in data.uri)
    if repeated := [uri for uri, count in Counter(places).items() if count > 1]:
        raise ValueError(
            f"--data.uri names {repeated[0]} twice: name it once, and give it more weight by --data.weights"
        )
    return data.model_copy(update={"uri": places})
