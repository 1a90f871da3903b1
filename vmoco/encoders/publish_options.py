"""How an encoder is published: the flags of `jobs/register.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How an encoder is published."""

    name: str
    """Registered name."""
    alias: str = "candidate"
    """A further alias of the version; it is the candidate in any case."""
    onnx: bool = False
    """Also write encoder.onnx, checked against the encoder."""
    score: bool = True
    """Score a run's encoder on the held-out videos of its data set, without labels."""
    data_licence: str = ""
    """Note on the videos that travels with the encoder."""
