"""The ledger of rejected videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmoco.data import ledger
from vmoco.data.ledger import Damage, Loss, Rejection, ScratchError, VideoError, attributed

ROWS = [
    Rejection('b\nquote" 🎞.mp4', "decode", "decode-error", "Invalid data", entry="07", shard="00"),
    Rejection("a.mp4", "probe", "truncated", "it ends", entry="05", shard="01"),
    Rejection("c.mp4", "read", "missing", "gone", transient=True),
    Rejection("d.mp4", "probe", "truncated", "it ends"),
]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Every field survives, one line per video, sorted by name, whatever characters a name has."""
    ledger.write(str(tmp_path), ROWS)
    assert ledger.read(str(tmp_path)) == sorted(ROWS, key=lambda row: row.video_id)
    assert len((tmp_path / ledger.NAME).read_bytes().splitlines()) == len(ROWS)


def test_losses_stand_beside_rejections(tmp_path: Path) -> None:
    """Both kinds of rows are read back, each by its own function; old rows have no field that came later."""
    losses = [Loss("e.mp4", ((1.5, 2.0), (3.0, 3.25)), 12.5, "h264: concealing", entry="08", shard="02")]
    new = [Rejection("f.mp4", "decode", "decode-error", "x", damaged="drop-clips")]
    ledger.write(str(tmp_path), [*ROWS, *new], losses)
    assert ledger.read(str(tmp_path)) == sorted([*ROWS, *new], key=lambda row: row.video_id)
    assert ledger.read_losses(str(tmp_path)) == losses
    lines = (tmp_path / ledger.NAME).read_text().splitlines()
    assert [line for line in lines if "damaged" in line] == [lines[-1]]


def test_damage_is_named_in_a_sentence() -> None:
    """The share, the first seconds and the first report; many stretches are counted."""
    assert str(Damage(((1.0, 2.5),), 7.5, "x")) == "7.5 % is lost (seconds 1.00-2.50): x"
    many = tuple((float(at), at + 0.5) for at in range(8))
    assert "4.00-4.50 and 3 more stretches): x" in str(Damage(many, 50.0, "x"))


def test_no_ledger_is_an_empty_one(tmp_path: Path) -> None:
    """A new data set has no ledger, and that is no error."""
    assert ledger.read(str(tmp_path)) == []


def test_a_damaged_ledger_says_which_line(tmp_path: Path) -> None:
    """A line that is no ledger row is named, with what to do."""
    ledger.write(str(tmp_path), ROWS[:1])
    with open(tmp_path / ledger.NAME, "a") as file:
        file.write('{"video_id": "x"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*ledger.jsonl is not a ledger row .*: remove the file"):
        ledger.read(str(tmp_path))


class PanicException(BaseException):
    pass


class Wordless(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no message either")


STRANGE = [PanicException("Rust"), Wordless(), ExceptionGroup("two", [ValueError("a"), KeyError("b")]), StopIteration()]


@pytest.mark.parametrize("error", STRANGE, ids=lambda error: type(error).__name__)
def test_every_type_of_error_is_attributed(error: BaseException) -> None:
    """What is no Exception, or gives no message, becomes a VideoError as well."""
    with pytest.raises(VideoError) as caught, attributed("decode"):
        raise error
    assert caught.value.reason == "unexpected-error"
    assert caught.value.message.startswith(f"{type(error).__name__}: ")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ScratchError("full")], ids=repr)
def test_what_ends_the_job_is_not_attributed(error: BaseException) -> None:
    """Ctrl-C, an exit and a full disk are no fault of the video."""
    with pytest.raises(type(error)), attributed("decode"):
        raise error


def test_totals() -> None:
    """Every reason with its count: the most frequent first, of equals the first in the alphabet."""
    assert ledger.totals(row.reason for row in ROWS) == "truncated 2, decode-error 1, missing 1"
    assert ledger.totals({"empty": 1, "missing": 3}) == "missing 3, empty 1"
    assert ledger.totals([]) == ""
