"""What counts as a report of damage."""

from __future__ import annotations

import av
import pytest

from vmoco.data.reports import report_in


@pytest.mark.parametrize("line", ["concealing 9 DC, 9 AC errors in P frame", "Packet corrupt (stream = 0, dts = 7)"])
def test_what_the_log_reports_counts(line: str) -> None:
    """Errors count, and lower lines that speak of damage; not other lower lines, other streams or metadata."""
    error, info = av.logging.ERROR, av.logging.INFO
    assert report_in([(info, "h264", line)]) == f"h264: {line}"
    assert report_in([(error, "h264", "no frame!\n")]) == "h264: no frame!"
    assert report_in([(error, "aac", "no frame!")], ignored=frozenset({"aac"})) is None
    assert report_in([(error, "h264", "SEI type 5 size 9 truncated at 8"), (info, "h264", "Reinit")]) is None
    log = [(error, "h264", "no frame!")]
    report_in(log)
    assert not log


def test_incomplete_packets_of_other_streams_do_not_count() -> None:
    """A lost piece of sound in MPEG-TS is no damage of the pictures."""
    line = (av.logging.WARNING, "mpegts", "Packet corrupt (stream = 1, dts = 7)")
    assert report_in([line], stream=0) is None
    assert report_in([line], stream=1) == "mpegts: Packet corrupt (stream = 1, dts = 7)"


def test_incomplete_packets_at_a_seam_do_not_count() -> None:
    """The counter of MPEG-TS jumps there. Anything else that is logged there is damage."""
    incomplete = (av.logging.WARNING, "mpegts", "Packet corrupt (stream = 0, dts = 7)")
    broken = (av.logging.ERROR, "matroska,webm", "Element at 0x1 ending at 0x9 exceeds containing master element")
    assert report_in([incomplete], stream=0, near_seam=True) is None
    assert report_in([incomplete, broken], stream=0, near_seam=True) == f"matroska,webm: {broken[2]}"
