"""The base of every group of settings: frozen, checked, and written as the same bytes wherever it is saved.

Settings live with the noun that they are about: of a pretraining run in `vmoco/config.py`, of an ingest in
`vmoco/data/ingest_settings.py`.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """A frozen group of settings that answers a bad value with one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            group = type(self).__name__.removesuffix("Settings").lower()
            prefix = "" if group in ("ingest", "pretrain") else f"{group}."
            raise ValueError("; ".join(_sentence(problem, prefix) for problem in error.errors())) from None

    def canonical_json(self) -> str:
        """The settings as JSON with sorted keys: equal settings give equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1)


def _sentence(problem: Any, prefix: str) -> str:
    field = prefix + ".".join(str(part).replace("_", "-") for part in problem["loc"])
    if problem["type"] == "value_error":  # raised by a check below: already a sentence
        return str(problem["ctx"]["error"])
    said = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{field} {problem['input']!r} is not allowed: {said}"
