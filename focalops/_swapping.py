"""Methods of a peer's object replaced in place, such that copies, pickles and types stay what they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from focalops._ops import say_no_script


@dataclass
class Accelerated:
    """What :func:`accelerate` did; ``print`` it."""

    replaced: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [f"replaced: {line}" for line in self.replaced]
            + [f"kept: {line}" for line in self.kept]
        )


def overridden(where: str, part: Any, origin: type, method: str) -> list[str]:
    """Why this is not the peer's own method, or nothing."""
    if not isinstance(part, origin):
        return [f"{where} is no {origin.__name__} but {type(part).__qualname__}"]
    if method in vars(part):
        return [f"{where}.{method} is the instance's own"]
    if method in dict(_swapped(type(part))):
        return [f"{where}.{method} is focalops' already"]
    if getattr(type(part), method) is not getattr(origin, method):
        return [f"{where}.{method} is overridden by {type(part).__qualname__}"]
    return []


def swap(
    part: Any, method: str, function: Any, what: str, reasons: list[str], report: Accelerated
) -> bool:
    if reasons:
        report.kept.append(f"{what}, because {' and '.join(reasons)}")
        return False
    kind = type(part)
    methods = (*_swapped(kind), (method, function))
    origin: Any = getattr(kind, "accelerated_from", kind)
    part.__class__ = _class_with(origin, methods)
    report.replaced.append(what)
    return True


Methods = tuple[tuple[str, Callable[..., Any]], ...]


def _swapped(kind: type) -> Methods:
    return getattr(kind, "swapped_methods", ())


@functools.cache
def _class_with(origin: type, methods: Methods) -> type:
    """A subclass in which the methods are these. The instance's class is changed, not its attributes, because these go on to
    copies of the module, such as those of ``nn.DataParallel``, and would stay bound to the first."""
    members = {
        "__module__": origin.__module__,
        "__qualname__": origin.__qualname__,
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": partial(say_no_script, f"accelerate({origin.__name__})"),
        "accelerated_from": origin,
        "swapped_methods": methods,
    }
    return type(origin.__name__, (origin,), members | dict(methods))


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """The class has no name by which pickle would find it."""
    state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)
    return _blank, (type(module).accelerated_from, type(module).swapped_methods), state


def _blank(origin: type, methods: Methods) -> Any:
    kind: Any = _class_with(origin, methods)
    return kind.__new__(kind)
