"""Small encoders for tests: made as a run makes them, and tracked as a worker tracks them, without Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from vmoco import tracking
from vmoco.config import PretrainSettings
from vmoco.data.manifest import Manifest
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.encoders.promotion import Score
from vmoco.model.backbone import build_backbone
from vmoco.presets import PRESETS
from vmoco.train.run_folder import CHECKPOINTS, Checkpoint, checkpoints_to_json
from vmoco.train.state import TrainState

TINY = PRESETS["tiny"][1]


def encoder_of(name: str = "r3d_nano", *, num_frames: int = 8, size: int = 32, fps: float = 25.0) -> Encoder:
    """A randomly initialised encoder, the same one each time."""
    torch.manual_seed(0)
    backbone = build_backbone(name, num_frames=num_frames, size=size)
    return Encoder(backbone, Preprocessing(num_frames, fps, size), {"backbone": name}).eval()


def clips(count: int = 3, *, num_frames: int = 8, height: int = 40, width: int = 48) -> torch.Tensor:
    """Frames of noise, uint8 (count, T, H, W, 3)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


def settings_for(manifest: Manifest, name: str = "a-run", *, seed: int = 0) -> PretrainSettings:
    """The smallest preset on a data set."""
    return TINY.model_copy(
        update={
            "data": TINY.data.model_copy(update={"uri": (manifest.uri,)}),
            "run": TINY.run.model_copy(update={"name": name, "seed": seed}),
        }
    )


def save_checkpoint(folder: Path, manifest: Manifest, *, run_id: str | None = "a run", seed: int = 0) -> TrainState:
    """Writes the checkpoint of an untrained state; returns the state."""
    settings = settings_for(manifest, seed=seed)
    state = TrainState(settings, manifest_hash=manifest.hash, device=torch.device("cpu"))
    folder.mkdir(parents=True)
    state.save(folder, run_id=run_id)
    return state


def tracked_run(
    folder: Path,
    manifest: Manifest,
    *,
    name: str = "a-run",
    steps: tuple[int, ...] = (0,),
    scores: Mapping[int, Score] = MappingProxyType({}),
) -> str:
    """A run with metrics and kept checkpoints, whose weights differ from step to step; returns its MLflow id."""
    run_id = tracking.create_run(settings_for(manifest, name), tags={})
    rows = []
    for step in steps:
        kept = folder / name / f"step-{step:08d}"
        save_checkpoint(kept, manifest, run_id=run_id, seed=step)
        record = json.loads((kept / "state.json").read_text())
        (kept / "state.json").write_text(json.dumps(record | {"step": step}))
        rows.append(Checkpoint(step, str(kept), record["sha256"], scores.get(step)))
    spool = tracking.spool(tracking.tracking_uri(), run_id)
    for step in range(5):
        spool.points({"loss": 5.0 - step, "effective_rank": 3.0 + step}, step=step)
    spool.document(CHECKPOINTS, checkpoints_to_json(rows))
    assert spool.close() == ""
    return run_id
