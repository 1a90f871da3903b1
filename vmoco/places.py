"""Settings that decide no number of a run: where it computes, how its checkpoints are scored, what MLflow records."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vmoco.settings import OmittedIfDefault, Settings

Device = Literal["auto", "cpu", "gpu"]
ScoringDevice = Literal["auto", "cpu", "gpu", "shared-gpu"]

GPU_SHARE = 0.02
"""Part of a GPU that Ray counts for the evaluation on a GPU that a worker uses too. It limits neither memory nor time.
So small that the rests of a node's GPUs never look like one GPU more, up to 48 GPUs."""


def _device_for_use_gpu(values: Any) -> Any:
    if isinstance(values, dict) and isinstance(values.get("use_gpu"), bool):
        rest = {name: value for name, value in values.items() if name != "use_gpu"}
        return {"device": "gpu" if values["use_gpu"] else "cpu", **rest}
    return values


class ScalingSettings(Settings):
    """Where the run computes. A change has no effect on the batches, their order, their augmentation or the queue."""

    group = "scaling"

    num_workers: int = Field(0, ge=0)
    """Number of Ray Train workers: one per GPU, or processes on CPUs. At most --train.global-batch divided by
    --train.micro-batch. 0 takes as many as the cluster has GPUs or cores for."""
    min_workers: int | None = Field(None, ge=1)
    """Smallest number of workers to go on with while nodes are missing, for example 4 of 8. When left out, the run
    waits until all workers are back."""
    resize_seconds: float = Field(60.0, ge=1)
    """Seconds between two checks for new nodes, if --scaling.min-workers is given. To grow, the run restarts from its
    last checkpoint."""
    device: Device = "auto"
    """Where workers compute: each on one GPU, with NCCL between them, or on CPUs, with gloo between them. auto is gpu
    if the cluster has a GPU."""
    cpus_per_worker: int = Field(1, ge=1)
    """Number of CPU cores, and of threads, of each worker."""
    max_failures: int = Field(3, ge=0)
    """How often the run restarts from one checkpoint after losing workers. A new checkpoint resets the count."""
    wait_for_nodes: bool = False
    """Waits until an autoscaler has added the nodes that the cluster lacks. Otherwise the job fails at once."""

    @property
    def use_gpu(self) -> bool:
        """Whether workers compute on GPUs; not before `reservation.fit_to_cluster`, if it depends on the cluster."""
        return self.device == "gpu"

    @model_validator(mode="before")
    @classmethod
    def _read_earlier(cls, values: Any) -> Any:
        """Runs and encoders from before `device` have `use_gpu`."""
        return _device_for_use_gpu(values)


class EvaluationSettings(Settings):
    """Scores each new checkpoint in a separate Ray task during training. The score chooses the best checkpoint."""

    group = "evaluation"

    enabled: bool = True
    """Whether checkpoints are scored."""
    num_cpus: int = Field(1, ge=0)
    """Number of CPU cores reserved for scoring. 0 shares the cores of the workers, for a small machine."""
    device: ScoringDevice = "auto"
    """Where checkpoints are scored: on CPUs (hours for a large network), a GPU of its own, or a worker's GPU, which
    slows the workers meanwhile. auto, if workers use GPUs, takes a free GPU, else a worker's."""
    max_videos: int = Field(500, ge=2)
    """Largest number of held-out videos used for a score, with up to 8 clips each, and 4 of them also played
    backwards. Lower it to score faster."""
    motion: Annotated[bool, OmittedIfDefault] = False
    """Also measures what linear probes read of motion: score/speed and score/order (vmoco/METHOD.md). Needs 20 videos,
    and takes as long as the other scores together."""

    @property
    def use_gpu(self) -> bool:
        """Whether checkpoints are scored on a GPU; not before `reservation.fit_to_cluster`, if it depends on it."""
        return self.device in ("gpu", "shared-gpu")

    @model_validator(mode="before")
    @classmethod
    def _read_earlier(cls, values: Any) -> Any:
        """Runs and encoders from before `device` have `use_gpu`."""
        return _device_for_use_gpu(values)


class TrackingSettings(Settings):
    """What MLflow records. Its address is MLFLOW_TRACKING_URI; when that is not set, a database in $VMOCO_HOME."""

    group = "tracking"

    experiment: str = "vmoco"
    """MLflow experiment of the run. It is created if it does not exist."""
    register_as: str | None = None
    """Name under which the trained encoder is registered, for example videomoco-kinetics. When left out, it is not
    registered."""
    alias: str = "candidate"
    """Alias of the registered version: models:/NAME@ALIAS loads the encoder."""
    data_licence: str = ""
    """Note on the owner and the licence of the videos, which is saved with the encoder. Example: 'CC BY 4.0, by us'."""
