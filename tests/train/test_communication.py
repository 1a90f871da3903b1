"""Ranks send each other gradients, keys and a few sums: never a pixel."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from tests.collectives import Collective, collectives_of, without_gradients
from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from tests.train.test_step import ADVERSARIAL, CPU
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.train import distributed
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep


def one_step(folder: str) -> tuple[list[Collective], dict[str, int]]:
    """What a step sends besides gradients, and the sizes that it may have."""
    manifest = Manifest.load(folder)
    state = TrainState(ADVERSARIAL, manifest_hash=manifest.hash, device=CPU)
    step = TrainStep(ADVERSARIAL, state, CPU)
    loader = Loader(manifest, ADVERSARIAL, rank=distributed.rank(), world_size=distributed.world_size())
    step(loader.batch(0))
    batch = loader.batch(1)
    rest, _ = without_gradients(collectives_of(lambda: step(batch)), state.moco.query, state.moco.generator)
    statistics = 4 * sum(tensor.numel() for tensor in state.moco.running_statistics())
    sizes = {
        "keys": 4 * max(batch.clips_per_rank) * ADVERSARIAL.model.embedding_dim,
        "statistics": statistics,
        "pixels": prod(batch.key.frames.shape),
    }
    return rest, sizes


def test_no_pixels_are_sent(tmp_path: Path) -> None:
    """Besides gradients a step gathers this rank's keys and adds up running statistics and some numbers: a list."""
    make_data_set(tmp_path)
    for rest, sizes in run_on_ranks(2, one_step, str(tmp_path)):
        gathers = [one.payload_bytes for one in rest if one.name == "all_gather"]
        sums = sorted(one.payload_bytes for one in rest if one.name == "all_reduce")
        assert gathers == [sizes["keys"]]
        assert sums[-1] == sizes["statistics"]
        assert sum(sums[:-1]) < 300  # losses and flags, and which parameters DDP used
        assert sum(gathers) + sum(sums) < sizes["pixels"] / 10


def test_a_key_has_other_batch_mates_than_its_query(tmp_path: Path) -> None:
    """In what ranks load: over 6 steps of 3 micro-batches a key shares fewer than half of its mates with its query."""
    manifest = make_data_set(tmp_path)
    size, shared = ADVERSARIAL.train.micro_batch, []
    for step in range(6):
        # what each rank loads, in the order in which it is normalised
        parts = [Loader(manifest, ADVERSARIAL, rank=rank, world_size=2).batch(step) for rank in range(2)]
        queries = [place for part in parts for place in range(part.share.start, part.share.stop)]
        keys = [int(place) for part in parts for place in part.key_order[part.share]]
        for part in parts:  # what is loaded for a key is the clip of the query that it belongs to
            order = part.key_order[part.share].tolist()
            everyone = np.concatenate([each.query.frames.numpy() for each in parts])
            assert np.array_equal(part.key.frames.numpy(), everyone[order])
        mates_of = {}
        for name, places in (("query", queries), ("key", keys)):
            for first in range(0, len(places), size):
                together = set(places[first : first + size])
                mates_of |= {(name, place): together - {place} for place in together}
        shared += [len(mates_of["query", at] & mates_of["key", at]) / (size - 1) for at in queries]
    assert np.mean(shared) < 0.5
