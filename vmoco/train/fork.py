"""Begins a run from the training state of another: its encoders, generator, queue, optimizers and step.

The settings of the method may differ, so that a schedule can be changed on the way; the networks, the length of the
queue, the kind of optimizer and the data may not. With equal settings it is as if the other run went on.
"""

from __future__ import annotations

import json

import torch

from vmoco import storage
from vmoco.config import PretrainSettings
from vmoco.train.resume import local_copy
from vmoco.train.state import RECORD, SETTINGS, TrainState, read_settings

FIXED = (
    "model.backbone",
    "model.embedding_dim",
    "model.head",
    "generator.hidden_channels",
    "moco.queue_size",
    "train.optimizer",
)
"""Fields that decide which tensors a training state has."""


def check_fork(settings: PretrainSettings, manifest_hash: str) -> None:
    """Checks, by its small files alone, that a run can begin from the checkpoint that it names.

    Raises:
        ValueError: it cannot.
    """
    uri = settings.run.fork
    assert uri is not None, "asked before"
    try:
        record = json.loads(storage.read_bytes(storage.join(uri, RECORD)))
        donor = PretrainSettings.model_validate_json(storage.read_bytes(storage.join(uri, SETTINGS)))
    except FileNotFoundError:
        raise ValueError(
            f"run.fork {uri} is no checkpoint: give the folder of one, as checkpoints.json of a run lists them"
        ) from None
    if record["manifest_hash"] != manifest_hash:
        raise ValueError(
            f"run.fork {uri} was trained on data set {record['manifest_hash']}, data.uri is {manifest_hash}: give the "
            "data set that it was trained on"
        )
    if record["step"] >= settings.last_step:
        raise ValueError(
            f"run.fork {uri} is of step {record['step']}, and this run ends at {settings.last_step}: raise "
            "train.steps or train.stop-after"
        )
    pairs = {name: (_field(donor, name), _field(settings, name)) for name in FIXED}
    changed = [f"{name.replace('_', '-')} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise ValueError(f"run.fork {uri} has other tensors ({', '.join(changed)}): set these as they were")


def _field(settings: PretrainSettings, name: str) -> object:
    group, _, field = name.partition(".")
    return getattr(getattr(settings, group), field)


def fork(uri: str, state: TrainState, *, autocast_dtype: torch.dtype | None = None) -> None:
    """Fills a new state with that of a checkpoint; every rank calls it.

    Raises:
        ValueError: it is damaged, or does not fit.
    """
    device = state.difference.device
    with local_copy(uri) as place:
        donor = TrainState(
            read_settings(place), manifest_hash=state.manifest_hash, device=device, autocast_dtype=autocast_dtype
        )
        donor.load(place)
    for part in ("query", "key", "generator", "queue"):
        getattr(state.moco, part).load_state_dict(getattr(donor.moco, part).state_dict())
    for mine, other in (
        (state.query_optimizer, donor.query_optimizer),
        (state.generator_optimizer, donor.generator_optimizer),
    ):
        # Its slots; the learning rate and its like are this run's.
        mine.load_state_dict({"state": other.state_dict()["state"], "param_groups": mine.state_dict()["param_groups"]})
    state.difference.copy_(donor.difference)
    state.step = donor.step
