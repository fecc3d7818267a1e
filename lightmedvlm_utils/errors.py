"""The one error that is written for people, and the one sentence about a name that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: one sentence that says what is wrong with which file or value, and
    what to do. The command line prints it and exits with 2; notebooks show it as the last line.
    """


def no_such(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that is none of `known`: the nearest one where there is one, else all of them."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(names) or 'none'}."
    return UserError(f"There is no {kind} {name!r}; {advice}")
