"""A config section is the keyword arguments of exactly one function, and is checked against its signature."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rope_lm.refusal import Refusal, unknown

T = TypeVar("T")


def bind(function: Callable, section: Mapping[str, Any], where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for `function`: a config section, and the arguments that the caller has `given`.

    Raises Refusal, naming the key as `where.key`, for a key that the function does not take, a key that is missing,
    and a value that is not of the annotated type. True is not an int, 1 is a float, NaN and infinity are not floats.
    """
    called = function.__init__ if inspect.isclass(function) else function
    parameters = {
        name: parameter.annotation
        for name, parameter in inspect.signature(called).parameters.items()
        if name not in given and name != "self"
    }
    for key, value in section.items():
        if key not in parameters:
            raise unknown(f"key in {where}", key, parameters)
        if not _fits(value, parameters[key]):
            raise Refusal(f"{where}.{key}={value!r}: must be {_words(parameters[key])}")
    missing = [key for key in parameters if key not in section]
    if missing:
        raise Refusal(f"{where} lacks {', '.join(missing)}: a config names every value, there are no hidden defaults")
    tuples = {key: tuple(value) for key, value in section.items() if isinstance(value, list)}  # JSON has lists only
    return {**section, **tuples, **given}


def named(section: Mapping[str, Any], table: Mapping[str, T], where: str) -> T:
    """Return the row of `table` that a section's `name` picks. Raises Refusal if the name is missing or unknown."""
    if "name" not in section:
        raise Refusal(f"{where} has no name: give one of {', '.join(table)}")
    if section["name"] not in table:
        raise unknown(f"{where}.name", str(section["name"]), table)
    return table[section["name"]]


def build(section: Mapping[str, Any], table: Mapping[str, Callable[..., T]], where: str, given: Mapping[str, Any]) -> T:
    """Call the row of `table` that a section names with the section's other keys and the `given` arguments (`bind`)."""
    arguments = {key: value for key, value in section.items() if key != "name"}
    function = named(section, table, where)
    return function(**bind(function, arguments, where, given))


def path(text: str | Path, given: str) -> Path:
    """Return the path with `~` resolved. Raises Refusal, naming the `given` flag, if there is no such home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise Refusal(f"{given}: there is no home folder {Path(text).parts[0]} here; give a path without it") from error


def folder(text: str | Path, given: str) -> Path:
    """Return the absolute path of a folder to write into, with `~` resolved. Raises Refusal as `path` does.

    Also raises Refusal for a path that is not UTF-8: the libraries that write checkpoints cannot open it.
    """
    found = path(text, given).absolute()
    try:
        str(found).encode()
    except UnicodeEncodeError as error:
        raise Refusal(
            f"{given}: the path {str(found)!r} is not UTF-8; give one that is, in a locale of UTF-8"
        ) from error
    return found


def tuples(value: Any) -> Any:
    """Return JSON data with tuples in place of lists, as configs have them."""
    if isinstance(value, dict):
        return {key: tuples(inner) for key, inner in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in inner)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) > 0 and all(_fits(item, inner[0]) for item in value)
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    if inspect.isclass(origin or annotation):
        return isinstance(value, origin or annotation)
    return True


def _words(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(option) for option in inner)
    if origin is tuple:
        return f"one or more values, each {_words(inner[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}
    return names.get(annotation, getattr(origin or annotation, "__name__", str(annotation)))
