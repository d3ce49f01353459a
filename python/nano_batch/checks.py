"""Checks of single values: what is wrong is named with its limit and its value."""

import math
from numbers import Integral, Real
from typing import Any

from nano_batch.exceptions import InvalidRequestError


def check_integer(name: str, value: Any, least: int, most: int, code: str) -> int:
    """Return a whole number in [least, most], NumPy's included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if not least <= number <= most:
        raise InvalidRequestError(f"{name} must be in [{least}, {most}], got {number}", code)
    return number


def check_number(name: str, value: Any) -> float:
    """Return a number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_flag(name: str, value: Any) -> None:
    """Take True or False alone."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...], code: str) -> None:
    """Take one of some words alone."""
    if value not in choices:
        message = f"{name} must be one of {', '.join(choices)}, got {value!r}"
        raise InvalidRequestError(message, code)
