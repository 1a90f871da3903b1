"""Prints, for some held-out clips, the clip that an encoder finds most similar. Needs no Ray.

    python jobs/nearest.py models:/videomoco-demo@candidate --data URI

With few videos this is an illustration and not a score, because clips of one video share their colours.
"""

from typing import Annotated

import tyro

import vmoco
from vmoco import job, storage
from vmoco.data.manifest import Manifest


def nearest(encoder: Annotated[str, tyro.conf.Positional], /, *, data: str, queries: int = 20) -> None:
    """Prints the nearest other clip of some held-out clips.

    Args:
        encoder: Encoder to use: models:/NAME@ALIAS, models:/NAME/VERSION, or a folder.
        data: Folder or URI of a data set made by jobs/ingest.py.
        queries: Number of clips for which the nearest clip is printed, for example 20.
    """
    from rich.console import Console
    from rich.table import Table

    from vmoco.evaluate.knn import nearest_clips

    manifest = Manifest.load(storage.absolute_uri(data))
    loaded = vmoco.load_encoder(encoder)
    found = nearest_clips(loaded, manifest, max_queries=queries)
    kind = "held-out clip" if found.held_out else "clip (no video is held out)"
    table = Table(title=f"{encoder}, step {loaded.card['step']}: the nearest of {found.gallery_size} clips")
    for column in (kind, "nearest other clip", "cosine", "same video"):
        table.add_column(column, overflow="fold")
    for neighbour in found.neighbours:
        same = "yes" if neighbour.same_video else "no"
        table.add_row(neighbour.query, neighbour.nearest, f"{neighbour.similarity:.3f}", same)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    print(
        f"of the same video: {found.same_video:.0%}; by mean colour alone {found.same_video_by_colour:.0%}, "
        "so on a few videos this is an illustration and not a score"
    )


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(nearest, description=__doc__))
