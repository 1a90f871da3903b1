"""What ranks exchange: by gloo on CPUs, by nccl on GPUs. One process alone exchanges nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SLOW_STEP_SECONDS = 1800.0
"""Longest wait for the other ranks until the first step is done: a resume from a slow store, or a first compile."""
STEP_SECONDS = 120.0
"""Longest wait for the other ranks in every later step. A rank that waits longer gives up, and the run restarts."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_at_most(seconds: float) -> None:
    """Sets how long the collectives that this rank starts from now on wait for the other ranks."""
    if dist.is_initialized():
        # Versions of torch before 2.14 have it under its former, private name.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=seconds))


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Wraps a module so that its gradients are averaged over ranks in backward; one process gets it unchanged."""
    if not dist.is_initialized():
        return module
    # Weights of 1x1x1 kernels have two equivalent memory layouts, and DDP warns that it chose the other one.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # torch 2.14 announces a new name for broadcast_buffers, which older versions do not have.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # running statistics are averaged by `start_average`, from all ranks
            # By default DDP sorts its buckets again after the first backward. A resumed run would then add up its
            # first gradients in another order than an uninterrupted run. This keeps the first layout.
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )


def start_gather(rows: torch.Tensor, counts: list[int]) -> Callable[[], torch.Tensor]:
    """Starts to join the rows of all ranks in rank order, on every rank, while other work goes on.

    Args:
        rows: (counts[rank], ...) of this rank.
        counts: number of rows of each rank; every rank knows it from the plan.

    Returns:
        A function that waits for the rows of all ranks and returns them. On a GPU only the device waits.
    """
    if world_size() == 1:
        return lambda: rows
    # Ranks may hold different numbers of rows; the collective needs equal ones, so shorter ones are padded.
    longest = max(counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    work = dist.all_gather(parts, padded, async_op=True)

    def joined() -> torch.Tensor:
        work.wait()  # for every other rank's rows
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return joined


def gather_rows(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Joins the rows of all ranks as `start_gather` does, and waits for them."""
    return start_gather(rows, counts)()


def sum_(numbers: torch.Tensor) -> torch.Tensor:
    """Adds a tensor up over ranks, in place; every rank waits for all."""
    if world_size() > 1:
        dist.all_reduce(numbers)
    return numbers


def start_average(tensors: list[torch.Tensor]) -> Callable[[], None]:
    """Starts the mean of each tensor over ranks, in one collective, while other work goes on.

    Every rank has the same weight, also if one has fewer micro-batches than another.

    Returns:
        A function that waits for all ranks and replaces each tensor by its mean; all ranks get the same bits.
    """
    if world_size() == 1 or not tensors:
        return lambda: None
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    work = dist.all_reduce(flat, async_op=True)

    def replace() -> None:
        work.wait()
        parts = flat.div_(world_size()).split([tensor.numel() for tensor in tensors])
        # One launch for many tensors: a GPU would need longer to start a copy for each than to copy.
        torch._foreach_copy_(tensors, [part.view_as(each) for each, part in zip(tensors, parts, strict=True)])

    return replace


def gather_text(text: str) -> list[str]:
    """One text of each rank, in rank order; for messages, not for the hot path."""
    if world_size() == 1:
        return [text]
    texts: list[str] = [""] * world_size()
    dist.all_gather_object(texts, text)
    return texts


def agree(number: int) -> int:
    """The number of rank 0, on every rank; every rank waits for it."""
    if world_size() == 1:
        return number
    numbers = [number]
    dist.broadcast_object_list(numbers, src=0)
    return numbers[0]


def require_own_gpu(device: torch.device) -> None:
    """Checks that no other rank computes on the GPU of this one; every rank waits for all.

    Raises:
        ValueError: another one does. NCCL would refuse it too, in the first collective and without naming the GPU.
    """
    if device.type != "cuda":
        return
    uuids = gather_text(str(torch.cuda.get_device_properties(device).uuid))
    sharing = [str(each) for each, uuid in enumerate(uuids) if uuid == uuids[rank()]]
    if len(sharing) > 1:
        raise ValueError(
            f"ranks {', '.join(sharing)} have the same GPU {uuids[rank()]}, and each worker needs one of its own: "
            f"lower --scaling.num-workers {len(uuids)}, or give each container of the cluster GPUs of its own (see "
            "jobs/check.py cluster)"
        )
