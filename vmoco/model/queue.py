"""The queue of keys from earlier steps, which are the negatives, and the temporal decay of their weight.

The queue is outside DDP, as plain tensors. Each rank enqueues the same gathered keys in the same (plan) order, so the
queues stay equal and are never sent. Each key has the id of its video, because a key of the query's own video is not a
negative.
"""

from __future__ import annotations

import math

import torch

from vmoco.config import MocoSettings


class KeyQueue:
    """A ring of K keys.

    Args:
        length: K.
        embedding_dim: D.
        device: where the tensors live.

    Attributes:
        keys: float32 (K, D), unit rows; zero in an empty slot.
        video_ids: int64 (K,), the video of each key; -1 in an empty slot.
        born: int64 (K,), the step at which each key was enqueued; -1 in an empty slot.
        pointer: slot of the next key.
    """

    def __init__(self, length: int, embedding_dim: int, *, device: torch.device | str = "cpu") -> None:
        self.keys = torch.zeros(length, embedding_dim, device=device)
        self.video_ids = torch.full((length,), -1, dtype=torch.int64, device=device)
        self.born = torch.full((length,), -1, dtype=torch.int64, device=device)
        self.pointer = 0

    @property
    def length(self) -> int:
        return len(self.keys)

    @property
    def num_filled(self) -> int:
        """Slots that hold a key."""
        return int((self.born >= 0).sum())

    @torch.no_grad()  # keys are targets: no gradient ever flows into the queue
    def enqueue(self, keys: torch.Tensor, video_ids: torch.Tensor, *, step: int) -> None:
        """Replaces the oldest keys by a batch, in order; wraps at the end.

        Args:
            keys: float32 (G, D), in plan order; G at most K.
            video_ids: int64 (G,).
            step: the step that computed them.
        """
        assert len(keys) <= self.length, "the settings check that the batch fits the queue"
        slots = (self.pointer + torch.arange(len(keys), device=self.keys.device)) % self.length
        self.keys[slots] = keys
        self.video_ids[slots] = video_ids
        self.born[slots] = step
        self.pointer = (self.pointer + len(keys)) % self.length

    def ages(self, step: int, *, unit: str) -> torch.Tensor:
        """Age of each slot at a step, int64 (K,): the newest keys have age 1; an empty slot has no meaningful age.

        With unit "step": optimizer steps since the key was enqueued. With "key": its place, counted from the newest.
        """
        if unit == "step":
            return step - self.born
        slots = torch.arange(self.length, device=self.keys.device)
        return (self.pointer - 1 - slots) % self.length + 1

    def negatives_of(self, video_ids: torch.Tensor) -> torch.Tensor:
        """Which slots are negatives of which query, bool (B, K): filled ones, of another video than the query's."""
        return (self.born >= 0)[None, :] & (self.video_ids[None, :] != video_ids[:, None])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The complete queue, for a checkpoint."""
        pointer = torch.tensor(self.pointer, dtype=torch.int64)
        return {"keys": self.keys, "video_ids": self.video_ids, "born": self.born, "pointer": pointer}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores `state_dict` bit for bit.

        Raises:
            ValueError: the saved queue has another length or width.
        """
        if state["keys"].shape != self.keys.shape:
            raise ValueError(
                f"the checkpoint's queue is {tuple(state['keys'].shape)}, this run's {tuple(self.keys.shape)}: "
                "set --moco.queue-size and --model.embedding-dim as they were"
            )
        self.keys.copy_(state["keys"])
        self.video_ids.copy_(state["video_ids"])
        self.born.copy_(state["born"])
        self.pointer = int(state["pointer"])


def decay_at(step: int, settings: MocoSettings, *, total_steps: int, difference: torch.Tensor) -> float | torch.Tensor:
    """t at a step, in (0, 1] (VideoMoCo, section 3.3); if it is adversarial a float64 scalar, else a number.

    linear and cosine reach decay_end at the last step. step reaches it in two equal steps at 60 % and 80 % of the run,
    as the learning rate does. adversarial is e^(L_G) of the previous step without lambda (the authors' journal version
    includes lambda = 100, so that a mean difference of 0.02 gives 0.14).

    Args:
        step: the step about to be taken, counted from 0.
        settings: t at the start, its schedule and its end.
        total_steps: length of the run.
        difference: mean |q - q_real| of the previous step over all clips, float32 scalar; 0 before G starts.
    """
    start, end = settings.decay, settings.decay_end
    if settings.decay_schedule == "constant":
        return start
    if settings.decay_schedule == "adversarial":
        return torch.exp(-difference.double())  # stays on the device: to read it would wait for the previous step
    if settings.decay_schedule == "step":
        return start + (end - start) * ((step >= 0.6 * total_steps) + (step >= 0.8 * total_steps)) / 2
    done = step / max(total_steps - 1, 1)
    if settings.decay_schedule == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return start + (end - start) * done


def key_weights(ages: torch.Tensor, decay: float | torch.Tensor) -> torch.Tensor:
    """t ** age for each key: int64 (K,) -> float32 (K,) in (0, 1]. t is a number or a float64 scalar."""
    # In float64: 0.99999 ** 65536 loses three digits in float32.
    log = decay.log() if isinstance(decay, torch.Tensor) else math.log(decay)
    return torch.exp(ages.double() * log).float()


def oldest_key_weight(decay: float, *, queue_size: int, global_batch: int, age_unit: str) -> float:
    """Weight of the oldest key of a full queue: shows what a setting of t means."""
    oldest = queue_size if age_unit == "key" else math.ceil(queue_size / global_batch)
    return decay**oldest
