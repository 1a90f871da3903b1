"""How far the key encoder has moved on since the oldest keys of the queue came in (their staleness).

The clips of their step are loaded once more: plan and augmentation are functions of the step, so the view is the very
one that the key was made of. It is encoded in the micro-batch of then, because a key depends on its batch-mates too.
"""

from __future__ import annotations

import torch

from vmoco.data.loader import Loader
from vmoco.model.moco import running_statistics_kept
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep


@torch.no_grad()  # looks, and changes nothing: not even the running statistics
def oldest_key_similarity(step: TrainStep, state: TrainState, loader: Loader) -> float | None:
    """Mean cosine between the oldest keys and what the key encoder makes of their clips now.

    Over one micro-batch of the oldest step that is still whole in the queue; rank 0 alone, which holds its first.

    Returns:
        None where the queue is empty.
    """
    queue, batch = state.moco.queue, state.settings.train.global_batch
    age = min(state.step, queue.length // batch)
    if age == 0:
        return None
    view, places = loader.first_keys(state.step - age)
    slots = (queue.pointer - age * batch + torch.from_numpy(places)) % queue.length
    stored = queue.keys[slots.to(queue.keys.device)]
    with running_statistics_kept(state.moco.key):
        again = step.encode_keys(view)
    return float((stored * again).sum(dim=1).mean())
