"""Errors that teach: one sentence that names the argument, its value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np


class SteersmanError(Exception):
    """The base class of every error that Steersman raises on purpose."""


class InputError(SteersmanError, ValueError):
    """A value that the caller gave is not one that can be used."""


class InputTypeError(SteersmanError, TypeError):
    """An object that the caller gave is not of a kind that can be used."""


class RunError(SteersmanError, RuntimeError):
    """A run cannot go on: its folder cannot be read or written, or its simulator has failed."""


class NonFiniteError(SteersmanError, FloatingPointError):
    """Training produced NaN or infinity and was stopped."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that look most like `name`, best first."""
    known = list(known)
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)
    return [lowered[k] for k in close]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An error for a name that nothing answers to, with the nearest names that something does.

    Args:
        kind: what the name was for, for example ``"system"``.
        name: the name that was given.
        known: every name that would have been accepted.
    """
    known = sorted(known)
    close = nearest(name, known)
    if close:
        hint = "did you mean " + " or ".join(repr(c) for c in close) + "?"
    else:
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        hint = f"known are {shown}."
    return InputError(f"Unknown {kind} {name!r}: {hint}")


def require(condition: bool | np.bool_, argument: str, value: Any, allowed: str) -> None:
    """Raises :class:`InputError` naming `argument`, its `value` and what is `allowed`, unless the condition holds."""
    if not condition:
        raise InputError(f"{argument} is {value!r}, but it must be {allowed}.")


def require_count(argument: str, value: Any, minimum: int = 1) -> None:
    """Checks that `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputTypeError(f"{argument} is {value!r}, but it must be a whole number.")
    require(value >= minimum, argument, value, f"at least {minimum}")


def require_number(
    argument: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Checks that every element of `value` is finite and within the bounds that are given.

    Values that are being traced by JAX cannot be looked at and pass.
    """
    from jax.core import Tracer

    if isinstance(value, Tracer):
        return
    parts = []
    if above is not None:
        parts.append(f"above {above:g}")
    if at_least is not None:
        parts.append(f"at least {at_least:g}")
    if below is not None:
        parts.append(f"below {below:g}")
    if at_most is not None:
        parts.append(f"at most {at_most:g}")
    allowed = " and ".join(["a finite number", *parts]) if parts else "a finite number"
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputTypeError(f"{argument} is {value!r}, but it must be {allowed}.") from None
    good = bool(np.all(np.isfinite(numbers)))
    good = good and (above is None or bool(np.all(numbers > above)))
    good = good and (at_least is None or bool(np.all(numbers >= at_least)))
    good = good and (below is None or bool(np.all(numbers < below)))
    good = good and (at_most is None or bool(np.all(numbers <= at_most)))
    shown = numbers.item() if numbers.ndim == 0 else numbers.tolist()
    require(good, argument, shown, allowed)
