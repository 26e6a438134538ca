"""A string that does not show itself where an engine logs its arguments."""

from __future__ import annotations


class Secret(str):
    """An API key: equal to its text, and `'***'` to whoever prints what holds it.

    SGLang logs its arguments by their repr. In a module of its own, because the
    arguments are pickled for the engine's child processes.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"
