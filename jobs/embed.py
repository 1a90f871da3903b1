"""Embeds videos, or a data set, with a pretrained encoder. Writes a Parquet table and a gallery page.

On a cluster (every node must reach the paths):

    ray job submit --working-dir . -- python jobs/embed.py models:/NAME@champion --videos URI --output URI

On this machine alone:

    python jobs/embed.py models:/NAME@champion --videos ~/videos --output ~/embeddings

To find out what happens where in long videos, embed a clip every half second (--dense: every half clip):

    python jobs/embed.py models:/NAME@champion --videos ~/videos --output ~/embeddings --every-seconds 0.5

The table is the folder parts/, one row for each clip; Parquet readers such as DuckDB and pandas open it:

    video_id, start_seconds, clip_seconds   the video, when the clip begins, and its length
    feature                                 the feature, a list of float32 of unit length
    clip_id, row, source, sha256            id of the clip, its number in the video, and the file with its hash
    label, split_1 to split_3, held_out     of a data set; colour: mean red, green and blue, 0 to 255

Run the same command again to continue after an interruption or to add new videos. Open gallery.html in a browser.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from vmoco import job
from vmoco.job_settings import EmbedSettings


def embed(
    encoder: Annotated[str, tyro.conf.Positional], /, settings: Annotated[EmbedSettings, tyro.conf.arg(name="")]
) -> None:
    """Embeds videos.

    Args:
        encoder: Encoder to use: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/encoder, or a folder.
        settings: See `EmbedSettings`.
    """
    from vmoco.encoders import package
    from vmoco.evaluate import embed as embedding
    from vmoco.evaluate.gallery import write_gallery

    loaded = package.load_encoder(encoder)
    job.connect(worker_output=False)
    made = embedding.embed(loaded, settings, show=job.show)
    job.show(
        f"{len(made.table)} clips in {settings.output}/parts, {loaded.feature_dim} numbers each; "
        f"{made.num_rejected} videos rejected, {made.num_reused} parts were made by an earlier run"
    )
    if settings.gallery:
        job.show(f"gallery: {write_gallery(made.table, loaded, settings, title=encoder)}")


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(embed, description=__doc__))
