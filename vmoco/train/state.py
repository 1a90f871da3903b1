"""The training state: everything that a run needs to continue as if it had never stopped, and nothing that follows.

A checkpoint is a folder of three files: `state.safetensors` (encoders, generator, queue, both optimizers),
`settings.json` (the resolved settings, the same bytes as in MLflow and with the encoder) and `state.json` (step, data
set, hashes; written last). There is no random state, because every draw is a function of seed and step. There is no
state of the loader, because its position is the step. Training waits only for a snapshot, a copy in memory;
`vmoco/train/checkpoint_writer.py` writes it while the next steps run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import vmoco
from vmoco import storage
from vmoco.config import PretrainSettings
from vmoco.model.generator import Generator
from vmoco.model.moco import VideoMoco
from vmoco.train.optimizer import build_optimizer, load_slots, parameter_groups, slot_names, slots_of

VERSION = 2
STATE_TENSORS, STATE_SETTINGS, STATE_RECORD = "state.safetensors", "settings.json", "state.json"

_OF_ENCODERS = ("model.backbone", "model.embedding_dim", "model.head")
_OF_POSITIONS = ("data.num_frames", "augment.size")


def fixed_by_encoders(settings: PretrainSettings) -> tuple[str, ...]:
    """Fields that decide which tensors the two encoders have, heads included."""
    return (*_OF_ENCODERS, *(_OF_POSITIONS if settings.architecture.learns_positions else ()))


class DamagedCheckpointError(ValueError):
    """A checkpoint is not complete; an older one may be."""


@dataclass(frozen=True)
class Record:
    """Content of state.json."""

    step: int
    settings_hash: str
    """`PretrainSettings.content_hash` of the run that wrote it."""
    manifest_hash: str
    """Data set that it was trained on."""
    run_id: str | None
    """MLflow run that tracks it."""
    sha256: str
    """Of the tensors' file."""

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads the record of a checkpoint.

        Raises:
            ValueError: there is none, or it is of another version.
        """
        try:
            values = json.loads((folder / STATE_RECORD).read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise DamagedCheckpointError(f"{folder} is not a checkpoint of vmoco: {error}") from None
        if values.pop("version", None) != VERSION:
            raise ValueError(f"checkpoint {folder} is not of version {VERSION}: use the version of vmoco that wrote it")
        values.pop("vmoco", None)
        return cls(**values)


@dataclass
class Snapshot:
    """A copy of a training state in this machine's memory, which training does not change."""

    settings: PretrainSettings
    manifest_hash: str
    step: int
    tensors: dict[str, torch.Tensor]

    def write(self, folder: Path, *, run_id: str | None = None) -> Record:
        """Writes the copy as a checkpoint into an existing, empty folder of this machine.

        Raises:
            ValueError: it cannot be written.
        """
        try:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / STATE_TENSORS)
        except SafetensorError as error:  # also for a disk that is full
            raise ValueError(f"cannot write {folder / STATE_TENSORS}: {error}") from None
        (folder / STATE_SETTINGS).write_text(self.settings.canonical_json())
        record = Record(
            step=self.step,
            settings_hash=self.settings.content_hash(),
            manifest_hash=self.manifest_hash,
            run_id=run_id,
            sha256=storage.file_sha256(str(folder / STATE_TENSORS)),
        )
        text = json.dumps({"version": VERSION, "vmoco": vmoco.__version__, **vars(record)}, sort_keys=True, indent=1)
        storage.write_atomic(str(folder / STATE_RECORD), text.encode())
        return record


class TrainState:
    """What is trained, and how far.

    Args:
        settings: of the run.
        manifest_hash: data set that it trains on.
        device: where the tensors live.
        autocast_dtype: arithmetic of the encoders.

    Attributes:
        moco: encoders, generator and queue.
        query_optimizer: of the query encoder.
        generator_optimizer: of the generator.
        step: optimizer steps taken.
        difference: float32 scalar, mean |q - q_real| of the last step over all clips; 0 before G starts.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        *,
        manifest_hash: str,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.settings = settings
        self.manifest_hash = manifest_hash
        self.moco = VideoMoco(settings, device=device, autocast_dtype=autocast_dtype)
        self.query_optimizer = build_optimizer(
            parameter_groups(self.moco.query, settings.train), settings.train, device=device
        )
        self.generator_optimizer = build_optimizer(self.moco.generator.parameters(), settings.train, device=device)
        self.step = 0
        # Kept, because the decay of the next step may follow from it (moco.decay-schedule adversarial).
        self.difference = torch.zeros((), device=device)

    def zero_grad(self) -> None:
        self.query_optimizer.zero_grad(set_to_none=True)
        self.generator_optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name: query.*, key.*, generator.*, queue.*, optimizer.*.*, difference."""
        named: dict[str, torch.Tensor] = {"difference": self.difference}
        for part, holder in self._parts().items():
            named |= {f"{part}.{name}": tensor for name, tensor in holder.state_dict().items()}
        for part, (optimizer, network) in self._optimizers().items():
            named |= {f"{part}.{name}": tensor for name, tensor in slots_of(optimizer, network).items()}
        return named

    def snapshot(self, *, reuse: Snapshot | None = None) -> Snapshot:
        """Copies everything into this machine's memory; returns when the state may change again.

        Args:
            reuse: an older snapshot that nobody needs any more. Its memory is overwritten, which saves the time to
                get new memory from the system.
        """
        mine = self.tensors()
        before = reuse.tensors if reuse else {}
        copies = {name: before[name] if name in before else _host_memory(tensor) for name, tensor in mine.items()}
        with torch.no_grad():  # bytes are copied, nothing is computed
            for name, tensor in mine.items():
                copies[name].copy_(tensor, non_blocking=True)
        if self.difference.device.type == "cuda":
            # The copies are queued behind the step; wait for them.
            torch.cuda.current_stream(self.difference.device).synchronize()
        return Snapshot(self.settings, self.manifest_hash, self.step, copies)

    def save(self, folder: Path, *, run_id: str | None = None) -> Record:
        """Writes a checkpoint into an existing, empty folder."""
        return self.snapshot().write(folder, run_id=run_id)

    def load(self, folder: Path) -> Record:
        """Restores a checkpoint bit for bit.

        Raises:
            ValueError: it is damaged, or of other settings or data; the state is unchanged then.
        """
        record = Record.read(folder)
        self._check(record, folder)
        tensors = read_tensors(folder, record)
        expected = self._expected_names(record.step)
        found = set(tensors)
        if expected != found:
            raise ValueError(
                f"checkpoint {folder} does not fit this run: missing {sorted(expected - found)[:3]}, "
                f"unknown {sorted(found - expected)[:3]}"
            )
        for name, mine in self.tensors().items():
            if name in tensors and tensors[name].shape != mine.shape:
                raise ValueError(
                    f"checkpoint {folder} is of another network: {name} is {tuple(tensors[name].shape)}, this run's "
                    f"{tuple(mine.shape)}: set the flags of --model and --generator as they were"
                )
        for part, holder in self._parts().items():
            holder.load_state_dict(_below(part, tensors))
        self._load_optimizers(tensors)
        self.difference.copy_(tensors["difference"])
        self.step = record.step
        return record

    def take_over(self, donor: TrainState) -> None:
        """Copies all of another state, whose networks and queue have the same shapes; the settings stay this run's."""
        for part, holder in self._parts().items():
            holder.load_state_dict(donor._parts()[part].state_dict())
        # The slots of the donor; learning rate, weight decay and momentum are this run's.
        self._load_optimizers(donor.tensors())
        self.difference.copy_(donor.difference)
        self.step = donor.step

    def begin_with(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Gives a new state the weights that its run starts from; step, queue, optimizers and `difference` stay new.

        Args:
            weights: of the backbone of both encoders; or query.*, key.* and perhaps generator.*, as `networks_in`
                returns them.
        """
        if not any(name.startswith("query.") for name in weights):
            for encoder in (self.moco.query, self.moco.key):
                encoder.backbone.load_state_dict(weights)
            return
        self.moco.query.load_state_dict(_below("query", weights))
        self.moco.key.load_state_dict(_below("key", weights))
        if generator := _below("generator", weights):
            self.moco.generator.load_state_dict(generator)

    def _expected_names(self, step: int) -> set[str]:
        """Names of all tensors of a checkpoint of that step."""
        names = {name for name in self.tensors() if not name.startswith("optimizer.")}
        started = {"optimizer.query": 0, "optimizer.generator": self.settings.generator_start}
        for part, (_, network) in self._optimizers().items():
            if step > started[part]:  # an optimizer makes its slots in its first step
                places = range(len(list(network.parameters())))
                names |= {f"{part}.{place}.{slot}" for place in places for slot in slot_names(self.settings.train)}
        return names

    def _parts(self) -> dict[str, Any]:
        moco = self.moco
        return {"query": moco.query, "key": moco.key, "generator": moco.generator, "queue": moco.queue}

    def _optimizers(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Module]]:
        return {
            "optimizer.query": (self.query_optimizer, self.moco.query),
            "optimizer.generator": (self.generator_optimizer, self.moco.generator),
        }

    def _load_optimizers(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for part, (optimizer, network) in self._optimizers().items():
            load_slots(optimizer, network, _below(part, tensors))

    def _check(self, record: Record, folder: Path) -> None:
        if record.manifest_hash != self.manifest_hash:
            raise ValueError(
                f"checkpoint {folder} was trained on data set {record.manifest_hash}, this run reads "
                f"{self.manifest_hash}: give --data.uri as it was, or another --run.name"
            )
        if record.settings_hash != self.settings.content_hash():
            changed = differences(read_settings(folder), self.settings)
            raise ValueError(
                f"checkpoint {folder} was trained with other settings ({changed}): "
                "set them as they were, or give another --run.name"
            )


def checkpoint_bytes(settings: PretrainSettings) -> int:
    """Size of a checkpoint of a run once both optimizers have taken a step; computes nothing and takes no memory."""
    state = TrainState(settings, manifest_hash="", device=torch.device("meta"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    slots = len(slot_names(settings.train) - {"step"})
    for optimizer in (state.query_optimizer, state.generator_optimizer):
        for group in optimizer.param_groups:
            size += slots * sum(each.numel() * each.element_size() for each in group["params"])
    return size


def read_settings(folder: Path) -> PretrainSettings:
    """The settings of a checkpoint.

    Raises:
        ValueError: they are missing, damaged, or unknown to this vmoco.
    """
    try:
        return parse_settings((folder / STATE_SETTINGS).read_bytes(), str(folder))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder} is not a checkpoint of vmoco: it has no {STATE_SETTINGS}") from None


def parse_settings(content: bytes, checkpoint: str) -> PretrainSettings:
    """The settings in the file of a checkpoint.

    Not by pydantic's `model_validate_json`, which writes its own words before and after our message.

    Raises:
        ValueError: they are damaged, or unknown to this vmoco.
    """
    try:
        return PretrainSettings(**json.loads(content))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"{STATE_SETTINGS} of checkpoint {checkpoint} is damaged: {error}") from None
    except ValueError as error:
        raise ValueError(f"this vmoco cannot read the settings of checkpoint {checkpoint}: {error}") from None


def differences(before: PretrainSettings, now: PretrainSettings, *, only: Collection[str] = ()) -> str:
    """The fields that decide the numbers and differ, as `--group.field 1 -> 2`.

    Args:
        before: settings of a checkpoint or of a run that has begun.
        now: settings as they were given.
        only: fields to compare, as `group.field`. Default: all.
    """
    old_fields, changed = before.content(), []
    for group, fields in now.content().items():
        for field, value in fields.items():
            if only and f"{group}.{field}" not in only:
                continue
            if (old := old_fields[group].get(field)) != value:
                changed.append(f"--{group}.{field.replace('_', '-')} {old} -> {value}")
    return ", ".join(changed)


def read_tensors(folder: Path, record: Record) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint after checking them against its record.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = folder / STATE_TENSORS
    if not path.exists():
        raise DamagedCheckpointError(f"checkpoint {folder} has no {STATE_TENSORS}")
    if (found := storage.file_sha256(str(path))) != record.sha256:
        raise DamagedCheckpointError(
            f"{path} is damaged: its SHA-256 is {found[:12]}..., its record says {record.sha256[:12]}..."
        )
    return load_file(path)


def networks_in(folder: Path, settings: PretrainSettings) -> dict[str, torch.Tensor]:
    """The networks of a checkpoint that a run with these settings can start from (`TrainState.begin_with`).

    Returns:
        query.* and key.*, heads and batch-normalisation statistics included, and generator.* if its shapes are those
        of the generator of `settings`.

    Raises:
        ValueError: the checkpoint is damaged or not one, or its encoders have other shapes.
    """
    record = Record.read(folder)
    if changed := differences(read_settings(folder), settings, only=fixed_by_encoders(settings)):
        raise ValueError(f"checkpoint {folder} has other encoders ({changed}): set these as they were")
    tensors = read_tensors(folder, record)
    with torch.device("meta"):  # only names and shapes are needed
        wanted = Generator(settings.generator).state_dict()
    generator = _below("generator", tensors)
    fits = {name: tensor.shape for name, tensor in generator.items()} == {n: t.shape for n, t in wanted.items()}
    parts = ("query.", "key.", "generator.") if fits else ("query.", "key.")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}


def _host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a copy: in the tensor's own layout, so that copying is moving bytes; page-locked for a GPU."""
    return torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.device.type == "cuda")


def _below(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(part) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(part + ".")}
