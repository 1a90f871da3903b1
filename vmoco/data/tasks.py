"""Ray Data as a pool: a function over texts, one task for each; a task whose node dies is tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

CPUS_PER_TASK = 0.5
"""Two tasks share a core: one decodes while the other waits for a store, or has ended and Ray's loop, which looks ten
times a second, has not seen it yet. With one task to a core a tenth of the time was such waiting."""


def run_tasks(task: Callable[[str], str], items: list[str]) -> Iterator[str]:
    """Runs a function over texts in Ray tasks, one per text, and yields the results as they are done.

    Raises:
        ValueError: what a task raised as one.
    """
    import ray.data

    # Texts, because Ray would turn anything else into its own column types. An error travels as a value, because an
    # exception in a task would end the job with Ray's stack trace around it.
    def run(row: dict[str, str]) -> dict[str, str]:
        try:
            return {"result": task(row["item"]), "error": ""}
        except ValueError as error:
            return {"result": "", "error": str(error)}

    if not items:
        return
    context = ray.data.DataContext.get_current()
    log = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that bars are off
    try:
        # One block per text is one task per text.
        blocks = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
        for row in blocks.map(run, num_cpus=CPUS_PER_TASK).iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield row["result"]
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)
