"""Ranks send each other gradients, keys and a few sums: never a pixel."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.collectives import Collective, collectives_of, without_gradients
from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from tests.train.test_step import ADVERSARIAL, CPU, changed
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


class Collectives(TorchDispatchMode):
    """Notes each collective and the bytes that this rank puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            own = args[1] if name == "allgather_" else args[0]
            self.found.append((name, sum(tensor.nbytes for tensor in own)))
        return func(*args, **(kwargs or {}))


BUDGET = {"gradients": 3, "used parameters": 2, "numbers": 1, "statistics": 1, "keys": 1}
"""Collectives of a step in which the generator trains. DDP's buckets: D has one of 1 MiB and one of 25, G has one."""


def test_a_step_has_a_fixed_number_of_collectives_at_16_ranks(tmp_path: Path) -> None:
    """Besides gradients: flags and losses as one sum, statistics as one, keys as one gather, DDP's map of parameters.

    The process group is torch's fake one: this rank does its part, and the others do not exist.
    """
    settings = changed(ADVERSARIAL, train={"global_batch": 64}, moco={"queue_size": 128}, scaling={"num_workers": 16})
    manifest = make_data_set(tmp_path)
    buckets: list[int] = []

    def note(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        buckets.append(bucket.buffer().nbytes)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    try:
        state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
        step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=16)
        for network in (step._query, step._generator):
            network.register_comm_hook(None, note)  # type: ignore[operator]
        step(loader.batch(0))
        batch = loader.batch(1)
        buckets.clear()
        with Collectives() as seen:
            step(batch)
    finally:
        dist.destroy_process_group()
    moco = state.moco
    parameters = [4 * sum(p.numel() for p in module.parameters()) for module in (moco.query, moco.generator)]
    assert sum(buckets) == sum(parameters)
    sums = sorted(size for name, size in seen.found if name == "allreduce_")
    gathers = [size for name, size in seen.found if name == "allgather_"]
    counts = [4 * len(list(module.parameters())) for module in (moco.query, moco.generator)]
    numbers = 4 * (7 + 3 + settings.data.num_frames)
    statistics = 4 * sum(tensor.numel() for tensor in moco.running_statistics())
    # DDP's own sums come from C++ and are seen too.
    assert sums == sorted([numbers, statistics, *counts])
    assert gathers == [4 * max(batch.clips_per_rank) * settings.model.embedding_dim]
    assert len(buckets) + len(sums) + len(gathers) == sum(BUDGET.values())
