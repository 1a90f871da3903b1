"""Names that file systems and object stores allow, and that syntaxes of URIs, patterns and shells give a meaning."""

from __future__ import annotations

import unicodedata

from hypothesis import strategies

NAMES = (
    "what?.mp4",
    "100% off.mp4",
    "a%20b.mp4",
    "c#d.mp4",
    "e+f.mp4",
    "[g].mp4",
    "sp ace.mp4",
    unicodedata.normalize("NFC", "ü.mp4"),
    unicodedata.normalize("NFD", "ü.mp4"),
    "-dash.mp4",
    "?region=x.mp4",
    " q'u\"o\\te*{}|^~`;:,@$!().mp4",
    "é" * 125 + "x.mp4",  # 255 bytes
)
FOLDER = "100% [o]#+?a=b é"
"""A folder with such a name."""

_CHARACTERS = strategies.characters(codec="utf-8", exclude_characters="/\0")
_SPECIAL = strategies.sampled_from("%?#+[]{}*-. ~&=:;@\\\"'\n") | strategies.sampled_from(
    ["%2F", "%00", "://", "u\u0308"]
)


def names(*, suffix: str = "") -> strategies.SearchStrategy[str]:
    """Names of files that are not hidden, with a suffix; rich in characters that mean something elsewhere."""
    parts = strategies.lists(_SPECIAL | _CHARACTERS, min_size=1, max_size=80)
    made = parts.map(lambda found: "".join(found).replace("/", "%") + suffix)
    return made.filter(lambda name: len(name.encode()) <= 255 and name[0] != ".")
