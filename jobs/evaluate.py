"""Evaluates a pretrained encoder: without labels, by kNN, linear probe and retrieval, or by fine-tuning.

On a cluster:

    ray job submit --working-dir . -- python jobs/evaluate.py models:/NAME@candidate --data URI --features URI

On this machine alone:

    python jobs/evaluate.py models:/NAME@candidate --data URI --reference
    python jobs/evaluate.py models:/NAME@candidate --data URI --protocols finetune --splits 1 2 3
    python jobs/evaluate.py models:/NAME@candidate --data URI --protocols motion     # does it see motion; no labels

The scores are saved with the registered version. `jobs/registry.py promote` compares them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import tyro

from vmoco import job
from vmoco.job_settings import EvaluateSettings

if TYPE_CHECKING:
    from vmoco.encoders.promotion import Score


def evaluate(
    encoder: Annotated[str, tyro.conf.Positional], /, settings: Annotated[EvaluateSettings, tyro.conf.arg(name="")]
) -> None:
    """Evaluates an encoder.

    Args:
        encoder: Encoder to use: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/encoder, or a folder.
        settings: See `EvaluateSettings`.
    """
    from vmoco import storage
    from vmoco.encoders import foreign, package, promotion
    from vmoco.evaluate import evaluate as evaluation

    output = storage.require_absolute(settings.scores, "--scores") if settings.scores else None
    planned = evaluation.plan(settings)
    for note in planned.notes:
        job.show(f"note: {note}")
    loaded = package.load_encoder(encoder)
    rows = {encoder: loaded}
    if settings.reference:
        rows["random initialisation"] = foreign.random_initialisation(loaded, seed=settings.seed)
        try:
            rows["torchvision, supervised"] = foreign.supervised(loaded.card["backbone"])
        except ValueError as error:
            job.show(f"note: no supervised reference: {error}")
    job.connect(worker_output=False)
    found: dict[str, list[Score]] = {}
    for name, each in rows.items():
        job.show(f"{name}:")
        found[name] = evaluation.evaluate(each, planned, settings, show=job.show)
    for name, scores in found.items():
        job.show(f"\n{name}")
        for score in scores:
            job.show(f"    {score}; {score.beside}")
    if output:
        rows_of = {name: [score.row() for score in scores] for name, scores in found.items()}
        storage.write_atomic(output, json.dumps(rows_of, indent=1).encode())
        job.show(f"\nscores in {output}")
    if settings.record and encoder.startswith("models:/"):
        promotion.record(encoder, found[encoder])
        job.show(f"\nrecorded with {encoder}")


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(evaluate, description=__doc__))
