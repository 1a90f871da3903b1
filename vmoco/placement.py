"""Settings of where a run runs and reports: they decide no number of it, so a resumed run may change them."""

from __future__ import annotations

from pydantic import Field

from vmoco.settings import Settings


class ScalingSettings(Settings):
    """Where it runs. Changing it does not change the order of the batches, their augmentation or the queue."""

    num_workers: int = Field(1, ge=1)
    """Ray Train workers: one per GPU, or processes on CPUs."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers that it goes on with while nodes are missing. Default: num-workers, so it waits for nodes."""
    resize_seconds: float = Field(60.0, ge=1)
    """With min-workers: how often it looks for nodes to grow again; growing restarts from the last checkpoint."""
    use_gpu: bool = False
    """One GPU per worker, nccl between them; otherwise CPUs and gloo."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and threads, of each worker."""
    max_failures: int = Field(3, ge=0)
    """Times a run restarts from its last checkpoint after a worker or node was lost."""
    wait_for_nodes: bool = False
    """Wait for an autoscaler to bring what the cluster lacks, instead of refusing to start."""


class EvaluationSettings(Settings):
    """The look at each new checkpoint, in a Ray task of its own beside training; it chooses the best checkpoint."""

    enabled: bool = True
    """Whether checkpoints are scored."""
    num_cpus: int = Field(1, ge=0)
    """CPU cores kept free for it; 0 shares those of the workers, for small machines."""
    use_gpu: bool = False
    """A GPU kept free for it; otherwise it computes on CPUs."""
    max_videos: int = Field(500, ge=2)
    """Held-out videos that take part, up to 8 clips of each."""


class TrackingSettings(Settings):
    """Where it reports. The tracker's address is MLFLOW_TRACKING_URI, or a database in $VMOCO_HOME."""

    experiment: str = "vmoco"
    """MLflow experiment of the run."""
    register_as: str | None = None
    """Name under which the finished encoder is registered."""
    alias: str = "candidate"
    """Alias given to the registered version."""
    data_licence: str = ""
    """What the videos may be used for, and whose they are: a note that travels with the encoder."""
