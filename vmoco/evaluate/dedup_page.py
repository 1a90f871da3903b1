"""duplicates.html: pairs of clips that were found to be copies, side by side as moving pictures. One file, no network.

The weakest pairs come first: a person who looks at them sees whether the threshold fits the data set.
"""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vmoco import storage
from vmoco.data.manifest import Manifest
from vmoco.evaluate.dedup import Duplicates
from vmoco.evaluate.gallery import STYLE, Clip, stored_thumbnails
from vmoco.job_settings import DedupSettings

PAGE = "duplicates.html"


def write_page(manifest: Manifest, found: Duplicates, settings: DedupSettings) -> str:
    """Writes the page beside the table; returns its URI.

    Raises:
        ValueError: a clip is damaged, or the place cannot be written.
    """
    copies = found.table.filter(pc.is_valid(found.table["duplicate_of"])).sort_by([("agreement", "ascending")])
    shown = np.unique(np.linspace(0, copies.num_rows - 1, min(settings.pairs, copies.num_rows)).round().astype(int))
    pairs = copies.take(pa.array(shown, pa.int64())).to_pylist()
    clips = _clips(manifest, [name for row in pairs for name in (row["clip_id"], row["duplicate_of"])])
    pictures = dict(stored_thumbnails(manifest, list(clips.values())))
    rows = "".join(_row(pair, clips, pictures) for pair in pairs)
    counts = (
        f"{copies.num_rows} of {manifest.num_clips} clips are copies of another clip, in "
        f"{len(found.table['group'].unique())} groups; training can leave out {found.left_out.num_rows} of them."
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Copies in {html.escape(manifest.uri)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>Copies in {html.escape(manifest.uri)}</h1>
<p>{counts}</p>
<p>Each row is a pair: the clip that stays (blue) and its copy. The number in bold is how well their moving parts
agree: 1 for equal clips, about 0 for clips that have nothing in common; {settings.min_agreement:g} is the least for
a copy. The second number is the cosine of the embeddings. {len(pairs)} of {copies.num_rows} pairs are shown, the
weakest first. If the first rows are no copies, raise --min-agreement.</p>
{rows}
</body></html>
"""
    uri = storage.join(storage.absolute_uri(settings.output), PAGE)
    storage.write_atomic(uri, page.encode("utf-8", "replace"))
    return uri


def _clips(manifest: Manifest, names: list[str]) -> dict[str, Clip]:
    """Clips by their ids; `row` is any number of their own."""
    wanted = pa.array(names, pa.string())
    columns = ("video_id", "start_seconds", "shard", "row", "label")
    rows = manifest.rows(lambda piece: pc.is_in(piece["clip_id"], wanted)).to_pylist()
    return {row["clip_id"]: Clip(at, row["clip_id"], *map(row.get, columns)) for at, row in enumerate(rows)}


def _row(pair: dict[str, Any], clips: dict[str, Clip], pictures: dict[int, str]) -> str:
    def figure(clip_id: str, kind: str, said: str) -> str:
        clip = clips[clip_id]
        name = html.escape(f"{clip.video_id} @ {clip.start_seconds:.1f} s")
        return (
            f'<figure class="{kind}"><img src="{pictures[clip.row]}" alt="{name}">'
            f"<figcaption>{said}{name}</figcaption></figure>"
        )

    kept = figure(pair["duplicate_of"], "query", "")
    held_out = " (held out)" if pair["held_out"] else ""
    said = f"<b>{pair['agreement']:.2f}</b> {pair['similarity']:.2f}{held_out} "
    return f'<div class="row">{kept}{figure(pair["clip_id"], "other", said)}</div>\n'
