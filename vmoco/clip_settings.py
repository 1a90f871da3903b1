"""Settings of a run's clips: which ones it reads, and how each view of a clip is changed at random."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from vmoco.settings import OmittedIfDefault, Settings, Unhashed

Positives = Literal["same_clip", "two_clips"]


class DataSettings(Settings):
    """The data sets, and which clips training takes from them."""

    group = "data"

    uri: Annotated[tuple[str, ...], Unhashed] = ()
    """Folder or URI of a data set made by jobs/ingest.py, for example s3://bucket/data, or of several, which each batch
    mixes. Required."""
    weights: Annotated[tuple[float, ...], OmittedIfDefault] = ()
    """Weight of each of several data sets: its share of the clips. Example: 0.5 0.3 0.2. When left out, each video of
    all sets is drawn equally often."""
    num_frames: int = Field(16, ge=2)
    """T: number of frames in a training clip. The clip is a random window of a stored clip, which may be longer."""
    stride: int = Field(1, ge=1)
    """Distance between neighbouring frames of a training clip, in stored frames. 2 takes every second one."""
    draws_per_video: int = Field(1, ge=1)
    """Number of clips drawn from each video in one epoch."""
    shuffle_window: Annotated[int, OmittedIfDefault] = Field(0, ge=0)
    """Number of neighbouring videos that are shuffled together; 0 shuffles all. Example: 50000, for a remote data set
    that is larger than --data.cache-gib: one request then fetches many clips, for each node (METHOD.md)."""
    positives: Positives = "same_clip"
    """What a query must match: another view of the same clip (paper), or another clip of the same shot of its video
    (rho-MoCo with rho = 2). The second learns less from texture. A clip that crosses a cut matches only itself."""
    two_clips_from_percent: Annotated[float, OmittedIfDefault] = Field(0.0, ge=0, le=100)
    """Percentage of the training steps after which positives come from two clips, if --data.positives is two_clips;
    before it they come from the same clip. Set for example 50 if two_clips alone does not begin to learn."""
    min_motion: Annotated[float, OmittedIfDefault] = Field(0.0, ge=0, le=255)
    """Least motion of a training clip: mean change from one stored frame to the next, in grey levels of 255. Example:
    1, which leaves out stills. A camera that shakes counts as motion. The column motion has the values."""
    min_brightness: Annotated[float, OmittedIfDefault] = Field(0.0, ge=0, le=255)
    """Least mean brightness of a training clip, in grey levels of 255. Example: 10, which leaves out black clips."""
    min_contrast: Annotated[float, OmittedIfDefault] = Field(0.0, ge=0, le=255)
    """Least contrast of a training clip: standard deviation of the brightness within its frames, in grey levels of 255.
    Example: 5, which leaves out plain titles and walls."""
    max_cuts: Annotated[int | None, OmittedIfDefault] = Field(None, ge=0)
    """Largest number of cuts between shots inside a stored clip. 0 leaves out every clip that crosses one. When left
    out, any number."""
    leave_out: Annotated[str | None, Unhashed, OmittedIfDefault] = None
    """List of clips that training leaves out: a file or URI with a clip_id in each line, such as leave_out.txt of
    jobs/dedup.py. Held-out clips stay in the scores."""
    leave_out_sha256: Annotated[str | None, OmittedIfDefault] = None
    """SHA-256 of this list. When left out: that of the file at the start of the run. A run is resumed only with the
    same list."""
    batches_ahead: Annotated[int, Unhashed] = Field(3, ge=1)
    """Number of batches that the loader prepares ahead of the training step. Each takes memory on every worker."""
    loader_threads: Annotated[int, Unhashed, OmittedIfDefault] = Field(0, ge=0)
    """Number of threads of each worker that read, check and decode clips. 0 takes one for each core, 8 at most, where
    the workers of a node share its cores; 16 for remote clips, which wait for the store."""
    cache: Annotated[str | None, Unhashed] = None
    """Folder on the local disk of each node, for clips of a remote data set. When left out: $VMOCO_HOME/cache, or
    ~/.vmoco/cache."""
    cache_gib: Annotated[float, Unhashed] = Field(50.0, gt=0)
    """Size limit of this cache on one node, in GiB. When it is full, the least recently read clips are removed."""

    @field_validator("uri", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """One place may be given as text, and is written as text: so it was before there could be several."""
        return ((value,) if value else ()) if isinstance(value, str) else value

    @field_serializer("uri")
    def _written_uri(self, value: tuple[str, ...]) -> str | tuple[str, ...]:
        return value if len(value) > 1 else "".join(value)

    @property
    def places(self) -> dict[str, str]:
        """Where the data sets are, by what a message calls them."""
        one = len(self.uri) == 1
        return {"--data.uri" if one else f"--data.uri ({number})": uri for number, uri in enumerate(self.uri, start=1)}

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.weights:
            typed = "--data.weights " + " ".join(f"{weight:g}" for weight in self.weights)
            if len(self.weights) != max(len(self.uri), 2):
                raise ValueError(
                    f"{typed} does not fit --data.uri: {len(self.uri)} data sets are named there; give one weight for "
                    "each of two or more data sets, or leave the weights out"
                )
            if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
                raise ValueError(f"{typed} is not allowed: each weight must be above 0; leave out a set that has none")
        if self.leave_out_sha256 is not None and self.leave_out is None:
            raise ValueError(
                f"--data.leave-out-sha256 {self.leave_out_sha256} needs the list itself: give --data.leave-out, the "
                "file or URI"
            )
        return self


class AugmentSettings(Settings):
    """Random changes to each view of a clip; all frames of a view change in the same way. The defaults are those of
    MoCo v1, as in the paper."""

    group = "augment"

    size: int = Field(112, ge=16)
    """Height and width of a training clip, in pixels. At most the short side of the stored frames."""
    min_area: float = Field(0.2, gt=0, le=1)
    """Smallest part of the frame's area that a random crop covers, from 0 to 1. Raise it if objects get cut off."""
    grey_probability: float = Field(0.2, ge=0, le=1)
    """Probability that a view becomes grey."""
    brightness: float = Field(0.4, ge=0, le=1)
    """Largest relative change of brightness: 0.4 multiplies it by 0.6 to 1.4."""
    contrast: float = Field(0.4, ge=0, le=1)
    """Largest relative change of contrast: 0.4 multiplies it by 0.6 to 1.4."""
    saturation: float = Field(0.4, ge=0, le=1)
    """Largest relative change of saturation: 0.4 multiplies it by 0.6 to 1.4."""
    hue: float = Field(0.4, ge=0, le=0.5)
    """Largest rotation of the hue, as a part of the colour circle: 0.5 reaches every colour."""
    jitter_probability: float = Field(1.0, ge=0, le=1)
    """Probability that brightness, contrast, saturation and hue of a view change (MoCo v1: 1; MoCo v2: 0.8)."""
    blur_probability: float = Field(0.0, ge=0, le=1)
    """Probability of a Gaussian blur with a sigma of 0.1 to 2 pixels (MoCo v1: 0; MoCo v2: 0.5)."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Probability that a view is mirrored left to right. Set 0 if left and right differ in meaning."""
    standardise: bool = False
    """Normalises each clip by its own mean and deviation. Then the encoder cannot recognise a clip by its light or
    contrast, and changes of brightness and contrast leave little but pixels that become black or white."""
