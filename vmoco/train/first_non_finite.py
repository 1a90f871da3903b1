"""Finds the first value of a step that is not finite, and names it.

Hooks look at the augmented clips, the output of each module, the losses, and in the backward at the gradient of each
output and weight. They only read, so the step keeps its bits. They wait for the device at each look: this is for a step
that is redone alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from vmoco.config import PretrainSettings
from vmoco.data.loader import RankBatch, View
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep


@dataclass(frozen=True)
class Finding:
    """A tensor with values that are not finite."""

    look: int
    """How many tensors this rank had looked at before: ranks look at the same ones in the same order."""
    rank: int
    name: str
    shape: Sequence[int]
    num_nan: int
    num_infinite: int
    largest: float | None
    """Largest magnitude of the finite values; None where there is none."""
    clip_ids: Sequence[str]
    """Clips in whose rows they are, if the rows are clips."""
    note: str = ""

    def __str__(self) -> str:
        counts = [(self.num_nan, "NaN"), (self.num_infinite, "infinite")]
        bad = " and ".join(f"{number:,} {kind}" for number, kind in counts if number)
        rest = "no value is finite" if self.largest is None else f"the largest finite value is {self.largest:.3g}"
        what = (
            f"has {bad} of {math.prod(self.shape):,} values, {rest}" if self.shape else f"is {bad.removeprefix('1 ')}"
        )
        parts = [f"rank {self.rank}: {self.name} {what}", self.note]
        parts.append(f"clips {', '.join(self.clip_ids)}" if self.clip_ids else "")
        return "; ".join(filter(None, parts))


class WatchedStep(TrainStep):
    """Takes steps as `TrainStep` does; between `watch` and `unwatch` it looks at all values.

    Args:
        settings: of the run.
        state: what is trained.
        device: where the networks are.
        rank: of this process.

    Attributes:
        findings: in the order in which they appeared.
    """

    def __init__(self, settings: PretrainSettings, state: TrainState, device: torch.device, *, rank: int) -> None:
        super().__init__(settings, state, device)
        self.findings: list[Finding] = []
        self._rank = rank
        self._looks = 0
        self._handles: list[Any] = []
        self._batch: RankBatch | None = None
        self._key_clip_ids: list[str] = []
        self._clip_ids: list[str] = []
        self._readers = WeakTensorKeyDictionary()  # names of the modules that read an output

    def watch(self, batch: RankBatch, *, key_clip_ids: list[str]) -> None:
        """Looks at all values of the step that is taken next.

        Args:
            batch: of that step.
            key_clip_ids: clip of each of this rank's keys.
        """
        self._batch, self._key_clip_ids = batch, key_clip_ids
        moco = self._moco
        for name, tensor in self._state.tensors().items():
            self._inspect(f"{name} before the step", tensor)
        for part, network in (("query", moco.query), ("key", moco.key), ("generator", moco.generator)):
            for name, module in network.named_modules(prefix=part):
                self._handles.append(module.register_forward_hook(self._output_hook(name)))
            for name, weight in network.named_parameters(prefix=part):
                if weight.requires_grad:
                    self._handles.append(weight.register_hook(self._gradient_hook(f"the gradient of {name}")))

    def unwatch(self) -> None:
        """Removes the hooks, after a look at the gradients as they are, averaged over ranks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._clip_ids = [], []
        moco = self._moco
        for part, network in (("query", moco.query), ("generator", moco.generator)):
            gradients = {name: p.grad for name, p in network.named_parameters(prefix=part) if p.grad is not None}
            for name, gradient in gradients.items():
                self._inspect(f"the gradient of {name}, averaged over ranks", gradient)
            if gradients:
                norm = nn.utils.get_total_norm(gradients.values())
                largest = max(gradients, key=lambda each: float(gradients[each].abs().max()))
                note = f"the largest gradient is that of {largest}, with {float(gradients[largest].abs().max()):.3g}"
                self._inspect(f"the norm of the gradient of {part}", norm, note=note)
        self._batch = None

    def look_at_state(self) -> None:
        """Looks at the state after a step."""
        for name, tensor in self._state.tensors().items():
            self._inspect(f"{name} after the update", tensor)

    def _augmented(self, view: View, micro: slice) -> torch.Tensor:
        if self._batch is None:
            return super()._augmented(view, micro)
        is_query = view is self._batch.query
        ids, first = (self._batch.clip_ids, micro.start or 0) if is_query else (self._key_clip_ids, self._place(view))
        self._clip_ids = ids[first : first + len(view.frames[micro])]
        kind = "query" if is_query else "key"
        self._look(f"the numbers that augment the {kind} clips", view.draws[micro])
        clips = super()._augmented(view, micro)
        self._look(f"the augmented {kind} clips", clips)
        return clips

    def _place(self, view: View) -> int:
        """Place of the first clip of a micro-batch among this rank's keys."""
        assert self._batch is not None, "called within a watched step"
        return int(view.frames.storage_offset()) // max(self._batch.key.frames[0].numel(), 1)

    def _output_hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                return
            given = [each for each in inputs if isinstance(each, torch.Tensor) and each.numel()]
            note = f"its input reaches {max(float(each.detach().abs().max()) for each in given):.3g}" if given else ""
            self._inspect(f"the output of {name}", output, note=note, by_clip=True)
            if not any(module.children()):
                for each in given:
                    self._readers.setdefault(each, []).append(name)
            if output.requires_grad:
                self._readers.setdefault(output, [])
                gradient_of = f"the gradient of the output of {name}"
                output.register_hook(self._gradient_hook(gradient_of, readers=self._readers[output]))

        return hook

    def _gradient_hook(self, name: str, *, readers: list[str] | None = None) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            # Modules read the output after this hook is made, so the list is complete only now.
            note = f"it comes from {' and '.join(readers)}" if readers else ""
            self._inspect(name, gradient, note=note, by_clip=readers is not None)

        return hook

    def _look(self, name: str, values: torch.Tensor) -> None:
        if self._batch is not None:
            self._inspect(name, values, by_clip=True)

    @torch.no_grad()  # reads only
    def _inspect(self, name: str, values: torch.Tensor, *, note: str = "", by_clip: bool = False) -> None:
        """Notes a finding if a value is not finite; with `by_clip` the rows are the clips of the micro-batch."""
        self._looks += 1
        finite = values.isfinite()
        if bool(finite.all()):
            return
        rows = (~finite).reshape(len(values), -1).any(dim=1).tolist() if by_clip and values.ndim else []
        clips = [clip for clip, bad in zip(self._clip_ids, rows, strict=False) if bad]
        rest = values[finite].abs()
        self.findings.append(
            Finding(
                look=self._looks,
                rank=self._rank,
                name=name,
                shape=tuple(values.shape),
                num_nan=int(values.isnan().sum()),
                num_infinite=int(values.isinf().sum()),
                largest=float(rest.max()) if len(rest) else None,
                clip_ids=clips,
                note=note,
            )
        )
