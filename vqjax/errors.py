# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on. Command lines turn them into one line and an exit code."""

import contextlib
from collections.abc import Iterator


class VqjaxError(ValueError):
    """The user's mistake: says what was found, what was expected and what to do.

    Attributes:
      exit_code: what the command lines return for it (2: the user's to fix).
    """

    exit_code = 2


class DoesNotFitError(VqjaxError):
    """The work needs more memory, disk or bits than there are (exit code 3).

    Attributes:
      needed: bytes of memory that would do; 0 where that is not known.
    """

    exit_code = 3

    def __init__(self, message: str, *, needed: int = 0):
        super().__init__(message)
        self.needed = needed


class QualityGateError(VqjaxError):
    """The result was made but misses the quality the user asked for (exit code 4)."""

    exit_code = 4


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Puts a name, such as that of a layer, in front of what errors raised inside say."""
    try:
        yield
    except VqjaxError as error:
        raise type(error)(f"{name}: {error}") from None


def gathered(problems: list[str], heading: str, *, limit: int = 20) -> VqjaxError:
    """Returns one error that lists every problem, so that nobody fixes them one run at a time.

    Args:
      problems: one line each; at most `limit` are shown, the rest are counted.
      heading: first line, which names the file or argument and what to do.
    """
    shown = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  ... and {len(problems) - limit} more")
    return VqjaxError("\n".join([heading, *shown]))
