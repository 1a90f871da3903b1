"""Shows what pretraining has changed: an encoder beside random weights, on held-out clips. Needs no Ray.

    python jobs/compare.py models:/videomoco-demo@candidate --data URI --page before-after.html

Prints scores, and writes a page with the loss curve and nearest clips that opens in any browser.
"""

from pathlib import Path
from typing import Annotated

import tyro

import vmoco
from vmoco import job, storage
from vmoco.data.manifest import Manifest


def compare(encoder: Annotated[str, tyro.conf.Positional], /, *, data: str, page: Path) -> None:
    """Compares an encoder with random weights of the same network.

    Args:
        encoder: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/encoder, or a folder.
        data: data set made by jobs/ingest.py. Its held-out videos are used.
        page: HTML file to write, such as before-after.html. `loss.png` is written beside it.
    """
    from rich.console import Console
    from rich.table import Table

    from vmoco import tracking
    from vmoco.encoders import model_card
    from vmoco.evaluate import before_after
    from vmoco.evaluate.score import TooFewVideosError

    manifest = Manifest.load(storage.absolute_uri(data))
    loaded = vmoco.load_encoder(encoder)
    page = page.absolute()
    storage.check_writable(str(page.parent))
    drawn: list[str] = []
    if encoder.startswith(("models:/", "runs:/")) and (run_id := loaded.card.get("run_id")):
        drawn = model_card.draw(page.parent, {"loss": tracking.history(run_id, "loss")})
    loss = page.parent / "loss.png" if drawn else None
    try:
        found = before_after.compare(loaded, manifest)
    except TooFewVideosError as error:  # a small folder of the reader's: nothing is wrong with the encoder
        print(f"note: no scores and no page: {error}")
    else:
        for note in found.notes:
            print(f"note: {note}")
        if found.rows:
            table = Table(*before_after.COLUMNS, title=f"{encoder}, step {loaded.card.get('step')}")
            for row in found.rows:
                table.add_row(*row.cells())
            Console(width=None if Console().is_terminal else 130).print(table)
            print(before_after.MEANING, found.limits())
        before_after.write_page(page, loaded, manifest, found, title=encoder, loss=loss)
        print(f"scores, loss curve and nearest clips, before and after: {page.as_uri()}")
    if loss is not None:
        print(f"loss curve: {loss.as_uri()}")


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(compare, description=__doc__))
