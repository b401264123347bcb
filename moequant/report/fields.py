"""Checked access to the JSON files a report is made from.

Owns: reading such a file, and one error per thing that is wrong with it, naming file and field.
Leaves out: which fields there are (`evaluation`, `routing`).
"""

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from moequant.errors import UsageError

SHOWN_VALUE = 60  # characters of a wrong value that an error repeats


@dataclass(frozen=True)
class Fields:
    """One JSON object, with the way to it: `path` is like `models[0].kld`, "" at the top.

    Every reader of a field raises UsageError where it is missing or not what it should be; fields
    that no one reads may be anything.
    """

    file: Path
    path: str
    values: dict[str, Any]

    def fail(self, name: str, wanted: str) -> UsageError:
        """The error that says what `name` is and what it should be."""
        where = f"{self.path}.{name}".lstrip(".")
        if name not in self.values:
            return UsageError(f"{self.file}: {where} is missing; it should be {wanted}.")
        shown = f"{self.values[name]!r:.{SHOWN_VALUE}}"
        return UsageError(f"{self.file}: {where} is {shown}, not {wanted}.")

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if not _is_number(value):
            raise self.fail(name, "a finite number")
        return float(value)  # type: ignore[arg-type]  # checked above

    def measured(self, name: str) -> float | None:
        """A number; None for null, which stands for what was not finite."""
        if name in self.values and self.values[name] is None:
            return None
        return self.number(name)

    def optional(self, name: str) -> float | None:
        """A number; None where there is none."""
        return None if self.values.get(name) is None else self.number(name)

    def count(self, name: str) -> int:
        value = self.values.get(name)
        if type(value) is not int or value < 0:
            raise self.fail(name, "a whole number from 0")
        return value

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.fail(name, "text")
        return value

    def numbers(self, name: str) -> list[float]:
        values = self.values.get(name)
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            raise self.fail(name, "a list of finite numbers")
        return [float(value) for value in values]

    def counts(self, name: str) -> list[int]:
        values = self.values.get(name)
        if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
            raise self.fail(name, "a list of whole numbers from 0")
        return values

    def texts(self, name: str) -> list[str]:
        values = self.values.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.fail(name, "a list of texts")
        return values

    def object(self, name: str) -> "Fields":
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return Fields(self.file, f"{self.path}.{name}".lstrip("."), value)

    def objects(self, name: str) -> list["Fields"]:
        values = self.values.get(name)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.fail(name, "a list of objects")
        path = f"{self.path}.{name}".lstrip(".")
        return [Fields(self.file, f"{path}[{i}]", value) for i, value in enumerate(values)]


def read_fields(path: Path, maker: str) -> Fields:
    """The JSON object in `path`, which `maker` (a command) is said to have printed.

    Raises:
        UsageError: no such file, or it holds no JSON object.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} is no JSON ({reason}); `{maker}` prints it.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no JSON object; `{maker}` prints one.")
    return Fields(path, "", values)


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and isfinite(value)
    except OverflowError:  # an int beyond float64
        return False
