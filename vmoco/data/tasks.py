"""Ray Data as a pool: a function over texts, one task for each; a task whose node dies is tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

CPUS_OF_LONG_TASKS = 1.0
"""One task to a core: two decoders that take turns on a core push each other out of its cache, and a clip costs each a
sixth more. Ray's loop sees only ten times a second that a task has ended, which is a fiftieth of a shard's time."""
CPUS_OF_WAITING_TASKS = 0.5
"""Two tasks share a core: one works while the other waits for a store, or is short and has ended unseen."""


def run_tasks(task: Callable[[str], str], items: list[str], *, num_cpus: float) -> Iterator[str]:
    """Runs a function over texts in Ray tasks, one per text, and yields the results as they are done.

    Args:
        task: The function.
        items: What it is called with.
        num_cpus: Cores of one task, which bound how many run at a time.

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
        for row in blocks.map(run, num_cpus=num_cpus).iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield row["result"]
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)
