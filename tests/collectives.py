"""Counts what ranks send each other in a piece of work: by torch's profiler, which sees DDP's own collectives too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Collective:
    """One collective of this rank."""

    name: str
    """Such as all_reduce."""
    payload_bytes: int
    """What this rank puts in."""

    def sent_bytes(self, world_size: int) -> float:
        """What a ring sends of it from this rank: twice (N-1)/N of a sum, N-1 times one's own rows of a gather."""
        if self.name == "all_reduce":
            return 2 * (world_size - 1) / world_size * self.payload_bytes
        assert self.name == "all_gather", f"{self.name} is not counted: say here what it sends"
        return (world_size - 1) * self.payload_bytes


def collectives_of(work: Callable[[], object]) -> list[Collective]:
    """The collectives of a piece of work over gloo, in float32 or another type of 4 bytes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        work()
        dist.barrier()
    found = []
    for event in recorded.events():
        if event.name.startswith("gloo:") and "barrier" not in event.name:
            shapes = [shape for shape in event.input_shapes if shape]
            found.append(Collective(event.name.removeprefix("gloo:"), 4 * sum(prod(shape) for shape in shapes)))
    return found


def without_gradients(found: list[Collective], *modules: torch.nn.Module) -> tuple[list[Collective], int]:
    """The collectives that carry no gradients, and the bytes of those that do.

    Gradients are told by their sizes: DDP's buckets are sums that together hold each parameter once.
    """
    wanted = 4 * sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    sums = [one for one in found if one.name == "all_reduce"]
    buckets: list[Collective] = []
    for one in sorted(sums, key=lambda one: -one.payload_bytes):
        if sum(bucket.payload_bytes for bucket in buckets) + one.payload_bytes <= wanted:
            buckets.append(one)
    carried = sum(bucket.payload_bytes for bucket in buckets)
    assert carried == wanted, f"{carried} bytes of gradients were found, {wanted} are there: {found}"
    rest = Counter(found)
    rest.subtract(Counter(buckets))
    return list(rest.elements()), wanted
