"""Plans and results as rows of Ray Data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmoco.data import distribute
from vmoco.data.distribute import arrow_type, from_table, run_tasks, to_table
from vmoco.data.found import Found
from vmoco.data.ingest_plan import Probed, ProbeTask, ShardPlan, Unit
from vmoco.data.ingest_tasks import MadeShard
from vmoco.data.ledger import Loss, Rejection
from vmoco.data.parts import Part, Run
from vmoco.data.shard import ShardFile

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
int64 = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats(allow_nan=False)
maybe = st.none() | text
found = st.builds(
    Found, text, int64, text, st.none() | numbers, st.none() | numbers, maybe, st.tuples(maybe, maybe, maybe)
)
runs = st.builds(Run, int64, int64, int64)
parts = st.builds(Part, st.lists(runs, max_size=3), st.lists(st.lists(int64, max_size=3), max_size=3), numbers)
stages = st.sampled_from(["list", "read", "probe", "decode", "clip"])
rejections = st.builds(Rejection, text, stages, text, text, st.booleans(), text, text)
lost = st.lists(st.tuples(numbers, numbers), max_size=3).map(tuple)
losses = st.builds(Loss, text, lost, numbers, text, text, text)
units = st.builds(Unit, found, text, st.none() | parts, int64, int64, numbers)
PLANS: dict[type[Any], st.SearchStrategy[Any]] = {
    ProbeTask: st.builds(ProbeTask, st.lists(found, max_size=3).map(tuple)),
    Probed: st.builds(
        Probed,
        found,
        text,
        int64,
        st.lists(parts).map(tuple),
        numbers,
        st.lists(text).map(tuple),
        st.none() | rejections,
    ),
    ShardPlan: st.builds(ShardPlan, text, st.lists(units, max_size=3).map(tuple)),
    MadeShard: st.builds(
        MadeShard,
        text,
        st.builds(ShardFile, int64, text),
        st.just([]),
        st.lists(rejections, max_size=3).map(tuple),
        st.booleans(),
        st.lists(losses, max_size=3).map(tuple),
    ),
}


@pytest.mark.parametrize("kind", PLANS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_plan_and_result_survives(kind: type[Any], data: st.DataObject) -> None:
    """What is read from a table equals what was put there, in every field, and types do not depend on the values."""
    values = data.draw(st.lists(PLANS[kind], min_size=1, max_size=3))
    table = to_table(values, kind)
    assert from_table(table, kind) == values
    assert table.schema == to_table([], kind, error="x").schema


def test_an_error_is_raised_where_the_results_are_read() -> None:
    """A message that travels in a row is a ValueError on the other side."""
    with pytest.raises(ValueError, match=r"^no space$"):
        from_table(to_table([], ShardFile, error="no space"), ShardFile)


def test_types_follow_from_the_fields() -> None:
    """Nested fields have Arrow's own types; a hint that tells too little names its type, and others are refused."""

    assert arrow_type(Part).field("clips").type == pa.list_(pa.list_(pa.int64()))
    assert arrow_type(Found).field("start_seconds").type == pa.float64()
    assert arrow_type(MadeShard).field("rows").type.value_type.field("height").type == pa.int32()
    assert arrow_type(Annotated[Any, pa.int8()]) == pa.int8()
    assert arrow_type(Literal["a", "b"] | None) == pa.string()
    for hint in (Fraction, dict[str, int]):
        with pytest.raises(TypeError, match="has no Arrow type"):
            arrow_type(hint)


@dataclasses.dataclass(frozen=True)
class Number:
    value: int


@pytest.mark.cluster
def test_each_plan_is_a_task(ray_cluster: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results come from one task per plan, several of one task too; a ValueError of a task ends with its message."""

    def squares(plan: Number) -> list[Number]:
        if plan.value == 9:
            raise ValueError("nine is not allowed")
        return [Number(plan.value**2), Number(-plan.value)]

    monkeypatch.setattr(distribute, "AT_ONCE", 2)  # so that Ray gets them in several rounds
    monkeypatch.setattr(distribute, "PER_CPU", 1)
    given: list[int] = []

    def counted(count: int) -> Iterator[Number]:
        for value in range(count):
            given.append(value)
            yield Number(value)

    plans = counted(5)
    made = list(run_tasks(squares, plans, plan_type=Number, returns=Number, num_cpus=0.5))
    assert sorted(each.value for each in made) == [-4, -3, -2, -1, 0, 0, 1, 4, 9, 16]
    given.clear()
    first = next(run_tasks(squares, counted(1000), plan_type=Number, returns=Number, num_cpus=0.5))
    assert abs(first.value) <= 1000
    assert len(given) < 100, "plans are read as they are needed"
    assert list(run_tasks(squares, [], plan_type=Number, returns=Number, num_cpus=1)) == []
    with pytest.raises(ValueError, match=r"^nine is not allowed$"):
        list(run_tasks(squares, [Number(9)], plan_type=Number, returns=Number, num_cpus=1))
