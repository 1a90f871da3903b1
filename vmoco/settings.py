"""What every group of settings is: frozen, checked, with one docstring per field, which `--help` shows.

The canonical JSON of settings is saved with what they made. Their content hash covers what decides numbers. A field
decides numbers unless it is marked `Unhashed`, so a field that nobody thought about is part of the hash.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shlex
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Unhashed:
    """Marks a field that decides no number: where things are, how often a job reports, how many workers it has."""


class HashedIfSet:
    """Marks a field that decides numbers only when it is given: hashes from before the field existed stay valid."""


class OmittedIfDefault:
    """Marks an option that came later: the hash and the JSON leave it out while it has its default value.

    So settings that do not use the option have the same hash and the same bytes as before it existed.
    """


def flag(*path: str) -> str:
    """The flag of a field as it is typed: `flag("moco", "queue_size")` is `--moco.queue-size`."""
    return "--" + ".".join(part for part in path if part).replace("_", "-")


class Settings(BaseModel):
    """A frozen group of settings; a value that is not allowed raises a ValueError that names its flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    group: ClassVar[str] = ""
    """What stands before the dot in the flags of this class; empty where the flags have no dot."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError("; ".join(map(self._message, error.errors()))) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        for field in cls.model_fields.values():
            if field.description:  # one line: the help has breaks of its own
                field.description = " ".join(field.description.split())

    @classmethod
    def _message(cls, problem: Any) -> str:
        if problem["type"] == "value_error":  # raised by a check of ours, here or in a group: complete already
            return str(problem["ctx"]["error"])
        path = [str(part) for part in problem["loc"] if isinstance(part, str)]
        name = flag(cls.group, *path)
        if problem["type"] == "missing":
            return f"{name} is missing"
        if problem["type"] == "extra_forbidden":
            (nearest,) = difflib.get_close_matches(path[-1], cls.model_fields, n=1, cutoff=0)
            return f"{name} does not exist: did you mean {flag(cls.group, nearest)}?"
        allowed = problem["msg"][0].lower() + problem["msg"][1:]
        allowed = allowed.replace("input should be", "it must be", 1)
        return f"{name} {shlex.quote(str(problem['input']))} is not allowed: {allowed}"

    def canonical_json(self) -> str:
        """The settings as JSON with sorted keys: equal settings give equal bytes."""
        return json.dumps(self._written(), sort_keys=True, indent=1)

    def _written(self) -> dict[str, Any]:
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Settings):
                values[name] = value._written()
            elif OmittedIfDefault in field.metadata and value == field.default:
                del values[name]
        return values

    def content(self) -> dict[str, Any]:
        """The fields that decide numbers, as JSON values: those that no mark leaves out."""
        values = self.model_dump(mode="json")
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if Unhashed in field.metadata or (HashedIfSet in field.metadata and not value):
                continue
            if OmittedIfDefault in field.metadata and value == field.default:
                continue
            found[name] = value.content() if isinstance(value, Settings) else values[name]
        return found

    def content_hash(self) -> str:
        """Hash of `content`, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]
