"""What an option may be, checked where it is made, in one sentence that names it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LARGEST = 3.4028234663852886e38  # of float32


@dataclass(frozen=True)
class Range:
    text: str  # follows "must be"
    holds: Callable[[Any], bool]


def whole(low: int, high: int = 2**31 - 1) -> Range:
    """Integers from low to high, both included."""
    above = f"at least {low}" if high == 2**31 - 1 else f"from {low} to {high}"
    return Range(f"a whole number {above}", lambda x: type(x) is int and low <= x <= high)


def real(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Range:
    """Finite numbers from low to high, in float32 too; `above` and `below` leave the ends themselves out."""
    lower = "" if low == -math.inf else f" above {low:g}" if above else f" of at least {low:g}"
    upper = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"

    def holds(x: Any) -> bool:
        if type(x) not in (int, float) or not abs(x) <= LARGEST:
            return False
        return (x > low if above else x >= low) and (x < high if below else x <= high)

    return Range(f"a finite number{lower}{upper}", holds)


def one_of(values: Sequence[Any]) -> Range:
    listing = ", ".join(map(str, values))
    return Range(f"one of {listing}", lambda x: any(type(x) is type(v) and x == v for v in values))


def switch() -> Range:
    return Range("true or false", lambda x: type(x) is bool)


def optional(rule: Range) -> Range:
    return Range(f"{rule.text}, or nothing", lambda x: x is None or rule.holds(x))


def either(*rules: Range) -> Range:
    return Range(" or ".join(r.text for r in rules), lambda x: any(r.holds(x) for r in rules))


def several(rule: Range, count: int | None = None, least: int = 1) -> Range:
    """Tuples of so many values of one rule, or of at least so many."""
    number = f"{least} or more" if count is None else f"{count}"

    def holds(x: Any) -> bool:
        fits = isinstance(x, tuple) and (len(x) >= least if count is None else len(x) == count)
        return fits and all(rule.holds(item) for item in x)

    return Range(f"{number} values, each {rule.text}", holds)


def check(name: str, value: Any, rule: Range) -> None:
    """Raises a ValueError in one sentence where the value is outside the range."""
    if not rule.holds(value):
        raise ValueError(f"{name} must be {rule.text}, got {value!r}")


def option(field: str) -> str:
    """The option of the command line that sets a dataclass's field."""
    return "--" + field.replace("_", "-")


def check_fields(config: Any, rules: Mapping[str, Range]) -> None:
    """Checks every field of a dataclass; one without a rule is a fault of the class."""
    for field in dataclasses.fields(config):
        check(field.name, getattr(config, field.name), rules[field.name])


def check_names(config: type, values: Any) -> None:
    """Makes sure that the values are a dictionary and its keys fields of the dataclass."""
    if not isinstance(values, dict):
        raise ValueError(f"{config.__name__} must be a dictionary, got {type(values).__name__}")
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(config)}, key=str)
    if unknown:
        raise ValueError(f"{config.__name__} has no {', '.join(map(str, unknown))}")
