"""Options made from the fields of dataclasses: the types say how they are read, comments and ranges are their help.

A number is a word, a tuple several; a tuple of tuples has one word for each, with commas: `--anchor-sizes 16,20 32,40`.
`none` is None. A word that means nothing for the type stays text, so that the range of the field refuses it in its own
sentence.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import sys
import tokenize
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..ranges import Range, check, option


def add_fields(
    parser: argparse._ActionsContainer,
    config: type,
    ranges: Mapping[str, Range],
    names: Collection[str],
) -> None:
    """An option for each of these fields; one that is not given leaves no trace in the options."""
    hints, said = get_type_hints(config), comments(config)
    for name in names:
        hint, texts = hints[name], [said.get(name)]
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS}
        if hint is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["metavar"] = metavar(hint)
            if any(get_origin(one) is tuple for one in alternatives(hint)):
                arguments["nargs"] = "*"
            if get_origin(hint) is not Literal:  # which the metavar tells
                texts.append(ranges[name].text)
        text = "; ".join(filter(None, texts)).replace("%", "%%")
        parser.add_argument(option(name), help=text, **arguments)


def given_fields(options: argparse.Namespace, *configs: type) -> dict[str, Any]:
    """The fields of the dataclasses that were given as options; the first with a field says how it is read."""
    given: dict[str, Any] = {}
    for config in configs:
        hints = get_type_hints(config)
        names = {field.name for field in dataclasses.fields(config)} & vars(options).keys()
        for name in names - given.keys():
            given[name] = read(getattr(options, name), hints[name])
    return given


def check_given(given: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raises a ValueError that names the option of a value outside its range."""
    for name, value in given.items():
        check(option(name), value, ranges[name])


# ---- Words ---------------------------------------------------------------------------------------


def alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    first, *_ = get_args(hint) or (None,)
    if get_origin(hint) is tuple and get_origin(first) is tuple:
        return metavar(first) + ",..."
    return metavar(first) if first else {int: "NUMBER", float: "NUMBER"}.get(hint, "NAME")


def read(given: Any, hint: Any) -> Any:
    """What an option's word or words mean for a field of that type."""
    if isinstance(given, bool):
        return given
    words = given if isinstance(given, list) else [given]
    hints = alternatives(hint)
    if NoneType in hints and [word.lower() for word in words] == ["none"]:
        return None
    several = [one for one in hints if get_origin(one) is tuple]
    single = [one for one in hints if one not in (*several, NoneType)]
    if several and not (single and len(words) == 1):
        return tuple(read_item(word, get_args(several[0])[0]) for word in words)
    return read_item(words[0], single[0])


def read_item(word: str, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(read_item(part, get_args(hint)[0]) for part in word.split(","))
    for number in {int: (int, float), float: (float,)}.get(hint, ()):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


# ---- Comments ------------------------------------------------------------------------------------


def comments(config: type) -> dict[str, str]:
    """Of each field the comment on its lines; the last word has the class that comes first."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        found |= comments_of(cls.__module__).get(cls.__qualname__, {})
    return found


@functools.cache
def comments_of(module: str) -> dict[str, dict[str, str]]:
    """Of each class of a module its fields' comments; of one without source none."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return {}
    at_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        node.name: {
            field.target.id: at_line[line]
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            for line in range(field.lineno, (field.end_lineno or field.lineno) + 1)
            if line in at_line
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
