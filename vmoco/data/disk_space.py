"""How much ingest will write and whether that fits, before the first shard is cut.

The probe pass knows the number of clips, and raw clips have one size. The size of JPEG clips depends on the footage, so
only what is far too large is refused there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from vmoco import storage
from vmoco.data.ingest_plan import JPEG_SHARE, Probed, plan_shards
from vmoco.data.manifest import SHARDS
from vmoco.job_settings import IngestSettings

_ROW_BYTES = 1400
"""Of a clip in a shard, besides its pixels."""
_LEAST_JPEG = 1 / 3
"""Size of JPEG clips at low quality and of plain pictures, over what is estimated."""


def check_space(probed: Iterable[Probed], *, output: str, settings: IngestSettings, continues: bool) -> str:
    """Compares what will be written with what is free.

    Args:
        probed: The videos to cut.
        output: URI of the data set.
        settings: Of the ingest.
        continues: The data set exists, so its encoding cannot change.

    Returns:
        A line that says both.

    Raises:
        ValueError: it cannot fit.
    """
    num_clips = num_clips_to_write(probed, output=output, settings=settings)
    need, free = bytes_of(num_clips, settings, settings.encoding), storage.free_bytes(output)
    about = "about " if settings.encoding == "jpeg" else ""
    writes = f"{num_clips} clips in {settings.encoding} encoding, {about}{storage.gigabytes(need)}"
    if free is None:
        return f"writes {writes}, to {output}"
    least = need * (_LEAST_JPEG if settings.encoding == "jpeg" else 1.0)
    if least <= free:
        line = f"writes {writes}, to {output}, which has {storage.gigabytes(free)} free"
        return line if need <= free else f"{line}: it may not fit"
    smaller = f"lower --max-clips-per-video {settings.max_clips_per_video}"
    if settings.encoding == "raw":
        where = " and a new --output" if continues else ""
        jpeg = storage.gigabytes(bytes_of(num_clips, settings, "jpeg"))
        smaller = f"give --encoding jpeg{where}, which needs about {jpeg}"
    raise ValueError(
        f"--output {output} has {storage.gigabytes(free)} free, and ingest would write {writes}: free space, give "
        f"another --output, or {smaller}"
    )


def num_clips_to_write(probed: Iterable[Probed], *, output: str, settings: IngestSettings) -> int:
    """Number of clips in the shards that an earlier run has not written yet."""
    folder = storage.join(output, SHARDS)
    there = set(storage.list_files(folder, recursive=False)) if storage.exists(folder) else set()
    return sum(
        unit.num_clips
        for plan in plan_shards(probed, settings)
        if f"{plan.name}.arrow" not in there
        for unit in plan.units
    )


def bytes_of(num_clips: int, settings: IngestSettings, encoding: str) -> float:
    """Size of clips in shards; an estimate for JPEG."""
    return num_clips * (math.prod(settings.frame_shape) * (1.0 if encoding == "raw" else JPEG_SHARE) + _ROW_BYTES)
