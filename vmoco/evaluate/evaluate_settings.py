"""The settings of `jobs/evaluate.py`: one docstring per field, which `--help` shows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vmoco.evaluate.embed_settings import PoolSettings
from vmoco.settings import Settings

Protocol = Literal["label-free", "knn", "probe", "retrieval", "finetune"]


class FinetuneSettings(Settings):
    """Fine-tuning all weights, as for UCF101 and HMDB51."""

    epochs: int = Field(50, ge=1)
    """Passes over the training videos, one clip of each in a pass; the last weights are tested, not the best ones."""
    batch_size: int = Field(32, ge=2)
    """Clips in one step."""
    learning_rate: float = Field(0.01, gt=0)
    """Of SGD with momentum 0.9; falls to zero on a cosine."""
    weight_decay: float = Field(1e-4, ge=0)
    """L2 penalty."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Before the classifier."""
    min_area: float = Field(0.3, gt=0, le=1)
    """Smallest share of the frame's area that a random crop keeps."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Share of training clips mirrored left to right; 0 where left and right have a meaning."""
    clips_per_video: int = Field(10, ge=1)
    """Clips of a test video whose predictions are averaged, spread evenly over it."""


class EvaluateSettings(PoolSettings):
    """Evaluates a pretrained encoder by the field's protocols."""

    data: str
    """Data set made by jobs/ingest.py."""
    protocols: tuple[Protocol, ...] = ()
    """What is measured; when left out, all but fine-tuning that the data set has labels for."""
    splits: tuple[Literal[1, 2, 3], ...] = ()
    """Official splits of the data set; all that it has when left out, and training against held-out without any."""
    reference: bool = False
    """Also evaluate random initialisation and torchvision's supervised Kinetics weights of the same network."""
    k: int = Field(200, ge=1)
    """Neighbours that vote in kNN."""
    temperature: float = Field(0.07, gt=0)
    """Of the votes in kNN."""
    max_probe_clips: int = Field(200_000, ge=10)
    """Training clips of the linear probe, which holds them in memory, spread evenly over all."""
    finetune: FinetuneSettings = FinetuneSettings()
    features: str | None = None
    """Folder or URI for the tables of features, reachable from all nodes. Default: $VMOCO_HOME/features."""
    record: bool = True
    """Note the scores with the registered version, where the encoder is one."""
    seed: int = 0
    """Of fine-tuning and of random initialisation."""
