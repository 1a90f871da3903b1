"""Ray Data distributes the work: one Ray task for each plan, and the results as tasks end.

    plan  ->  row of a table  ->  Ray task: row -> plan -> results -> rows  ->  results

A plan and a result are dataclasses. A row holds one of them in a column whose Arrow type follows from the fields of the
dataclass, so Ray guesses no types and pickles no values. `to_table` and `from_table` are the only place that converts.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import TypeAdapter

from vmoco import ray_internals

Plan = TypeVar("Plan")
Result = TypeVar("Result")

_SIMPLE = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


AT_ONCE, PER_CPU = 1024, 32
"""Plans that Ray knows at a time: at least so many, and so many for each core of the cluster. Ray keeps several KB of
each in the driver, and at the end of each such round some cores wait for the last task."""


def in_groups(values: Iterable[Plan], size: int) -> Iterator[tuple[Plan, ...]]:
    """Neighbouring values in groups of a size; the last group may be smaller."""
    iterator = iter(values)
    while group := tuple(itertools.islice(iterator, size)):
        yield group


def run_tasks(
    task: Callable[[Plan], Sequence[Result]],
    plans: Iterable[Plan],
    *,
    plan_type: type[Plan],
    returns: type[Result],
    num_cpus: float,
) -> Iterator[Result]:
    """Calls a function in one Ray task per plan; Ray runs a task again if its node is lost.

    Args:
        task: The function; it returns at least one result.
        plans: Dataclasses. They are read as they are needed, so there may be any number of them.
        plan_type: Their type.
        returns: The dataclass of a result.
        num_cpus: Cores of one task, which bound how many run at a time.

    Yields:
        The results of each task when it has ended; the order of the tasks is not that of the plans.

    Raises:
        ValueError: a task raised one.
    """
    import ray.data

    def run(rows: pa.Table) -> pa.Table:
        (plan,) = from_table(rows, plan_type)
        try:
            return to_table(task(plan), returns)
        except ValueError as error:  # as a value: an exception would end the job with Ray's stack trace
            return to_table([], returns, error=str(error))

    context = ray.data.DataContext.get_current()
    log = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.WARNING)
    logging.getLogger(ray_internals.PROGRESS_LOGGER).setLevel(logging.ERROR)  # it warns that bars are off
    try:
        at_once = max(AT_ONCE, PER_CPU * int(ray.cluster_resources().get("CPU", 1)))
        for group in in_groups(plans, at_once):
            # One block per plan is one task per plan.
            blocks = ray.data.from_blocks([to_table([plan], plan_type) for plan in group])
            done = blocks.map_batches(run, batch_size=None, batch_format="pyarrow", num_cpus=num_cpus)
            for rows in done.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from from_table(rows, returns)
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)


def to_table(values: Sequence[Any], kind: type[Any], *, error: str | None = None) -> pa.Table:
    """Dataclasses as a table: one row each in the column `value`, or one row with an error message."""
    plain = [dataclasses.asdict(value) for value in values] if error is None else [None]
    errors = pa.array([error] * len(plain), pa.string())
    return pa.table({"value": pa.array(plain, arrow_type(kind)), "error": errors})


def from_table(table: pa.Table, kind: type[Result]) -> list[Result]:
    """Reads `to_table` back.

    Raises:
        ValueError: the table holds an error message, or its rows are not of that type.
    """
    for error in table["error"].drop_null().to_pylist():
        raise ValueError(error)
    adapter = TypeAdapter(list[kind])  # type: ignore[valid-type]
    result: list[Result] = adapter.validate_python(table["value"].to_pylist())
    return result


def arrow_type(hint: Any) -> pa.DataType:
    """The Arrow type of a type hint: a dataclass is a struct, a list or tuple is a list, `X | None` is X.

    `Annotated[X, a pa.DataType]` names the Arrow type itself, where the hint tells too little.

    Raises:
        TypeError: the hint has no Arrow type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return pa.struct([(field.name, arrow_type(hints[field.name])) for field in dataclasses.fields(hint)])
    if origin is typing.Annotated:
        return next(extra for extra in arguments[1:] if isinstance(extra, pa.DataType))
    if origin is typing.Literal:
        return arrow_type(type(arguments[0]))
    if origin in (typing.Union, types.UnionType):
        (some,) = {arrow_type(argument) for argument in arguments if argument is not type(None)}
        return some
    if origin in (list, tuple):
        (item,) = {arrow_type(argument) for argument in arguments if argument is not ...}
        return pa.list_(item)
    raise TypeError(f"{hint} has no Arrow type")
