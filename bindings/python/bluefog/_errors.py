"""The exceptions that bluefog raises, and one check that many calls make."""

from __future__ import annotations

import operator
from typing import Any


def as_int(value: Any, what: str) -> int:
    """The value as an int; TypeError, with ``what``, if it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an int, not {value!r}") from None


class BluefogError(RuntimeError):
    """An operation failed.

    Attributes
    ----------
    code : str
        What kind of failure: ``"UNAVAILABLE"`` (a rank died or left; the communicator is unusable
        from then on), ``"DEADLINE_EXCEEDED"`` (a partner never submitted its side), ``"ABORTED"``
        (another rank failed the same operation), ``"FAILED_PRECONDITION"`` (use before init, after
        shutdown, in a forked child; a gradient changed), ``"INVALID_ARGUMENT"``, ``"NOT_FOUND"``
        (a plugin that does not exist), ``"RESOURCE_EXHAUSTED"``.
    """

    def __init__(self, message: str, code: str = "FAILED_PRECONDITION") -> None:
        super().__init__(message)
        self.code = code


class BluefogValueError(BluefogError, ValueError):
    """The arguments of a call are wrong, or do not fit those of another rank."""

    def __init__(self, message: str, code: str = "INVALID_ARGUMENT") -> None:
        super().__init__(message, code)


class BluefogSizeError(BluefogValueError, TypeError):
    """A graph has another number of nodes than there are ranks.

    Also a ``TypeError``, because scripts written for BlueFog catch that.
    """


for _class in (BluefogError, BluefogValueError, BluefogSizeError):
    _class.__module__ = "bluefog"  # Where users find them; tracebacks say so.
