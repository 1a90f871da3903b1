"""Finds clips of a data set that are copies of each other: encoded anew, made smaller, with a logo.

On a cluster (every node must reach the paths):

    ray job submit --working-dir . -- python jobs/dedup.py models:/NAME@champion --data URI --output URI

On this machine alone:

    python jobs/dedup.py models:/NAME@champion --data ~/.vmoco/data/mine --output ~/duplicates

Then look at duplicates.html, and pretrain without the copies:

    python jobs/pretrain.py demo --data.uri ~/.vmoco/data/mine --data.leave-out ~/duplicates/leave_out.txt

The encoder proposes pairs; what moves in the pictures decides. So the encoder of a short run is good enough. In
duplicates.parquet each clip that has a copy is a row:

    clip_id, video_id, start_seconds   the clip
    group                              the same number for clips that are copies of each other
    duplicate_of                       id of the clip of the group that stays; null for that clip itself
    agreement, similarity              how well what moves agrees, and the cosine of the embeddings

Of the clips of a group one stays: a held-out one; else that with the larger picture; else that of the larger file; else
the first by name. Not found: copies that have another frame rate (ingest with --fps), are mirrored or cropped, or in
which nothing moves. Many clips are missed of a copy of another length, also where only its end is missing: clips are
spread over a video, so those of the copy begin at other frames, and may share few or none with those of the original.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from vmoco import job
from vmoco.job_settings import DedupSettings


def dedup(
    encoder: Annotated[str, tyro.conf.Positional], /, settings: Annotated[DedupSettings, tyro.conf.arg(name="")]
) -> None:
    """Finds copies.

    Args:
        encoder: Encoder to use: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/encoder, or a folder.
        settings: See `DedupSettings`.
    """
    from vmoco.encoders import package
    from vmoco.evaluate.dedup import LIST, TABLE, find_duplicates
    from vmoco.evaluate.dedup_page import write_page

    loaded = package.load_encoder(encoder)
    job.connect(worker_output=False)
    manifest, found = find_duplicates(loaded, settings, show=job.show)
    copies = found.table.num_rows - len(found.table["group"].unique())
    job.show(
        f"{copies} of {manifest.num_clips} clips are copies of another clip; {found.num_compared} pairs were "
        f"compared; see {settings.output}/{TABLE}"
    )
    job.show("copies of another length, such as without their end, are found in part: see --help")
    job.show(f"page: {write_page(manifest, found, settings)}")
    job.show(f"to train without {found.left_out.num_rows} of them: --data.leave-out {settings.output}/{LIST}")


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(dedup, description=__doc__))
