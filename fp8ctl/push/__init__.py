"""Weights of a trainer into running servers: `from fp8ctl.push import Rollout`.

Nothing is imported before it is asked for: the command has no torch in its process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8ctl.push.result import Progress, Update
    from fp8ctl.push.rollout import Rollout

__all__ = ["Progress", "Rollout", "Update"]


def __getattr__(name: str) -> Any:
    if name == "Rollout":
        from fp8ctl.push import rollout

        return rollout.Rollout
    if name in __all__:
        from fp8ctl.push import result

        return getattr(result, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
