"""Memory for batches that is used again once nobody holds the batch any more.

New memory costs more than the copy into it: the system hands it out page by page, zeroed. A tensor and all its views
keep one NumPy array alive, and when that goes its memory comes back. For GPUs torch does the same with page-locked
memory, and also waits for copies that are under way.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import numpy.typing as npt
import torch


class BatchMemory:
    """Hands out uint8 tensors.

    Args:
        pin_memory: page-locked, for a GPU.
    """

    def __init__(self, *, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = {}

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor whose content is whatever it was."""
        if self._pin_memory:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else np.empty(size, np.uint8)
        lent = memory.reshape(shape)  # another object than `memory`: it lives as long as somebody has the tensor
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)
