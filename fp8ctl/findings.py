"""The shapes between doctor's rules and doctor: what they look at, what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fp8ctl.environment import BackendName, Environment
    from fp8ctl.hardware import Hardware
    from fp8ctl.patching.status import SeriesStatus

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of doctor's answer.

    Attributes:
        id: stable name of the rule.
        check: what was looked at.
        message: what was found, and what was expected where that differs.
        fix: a command or an edit, None where there is nothing to do.
        data: facts for a program (JSON types).
    """

    id: str
    check: str
    status: Status
    message: str
    fix: str | None = None
    data: dict[str, object] | None = None

    def to_json(self) -> dict[str, object]:
        """Return the finding as JSON types."""
        return {
            "id": self.id,
            "check": self.check,
            "status": self.status,
            "message": self.message,
            "fix": self.fix,
            "data": self.data or {},
        }


@dataclass(frozen=True, slots=True)
class Layer:
    """The overlay that is looked at.

    Attributes:
        folder: where it is.
        made_of: in words.
        stale: why it is no longer that of its environment, None where it is.
    """

    folder: Path
    made_of: str
    stale: str | None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything the rules look at.

    Attributes:
        machine: GPUs and driver.
        variables: the environment variables of the caller.
        patches: per engine what is applied, or why that cannot be said.
        target: the options that name the environment, for commands in a fix.
        layer: the overlay in front of the environment, if one is looked at.
    """

    environment: Environment
    machine: Hardware
    variables: Mapping[str, str]
    patches: Mapping[BackendName, SeriesStatus | str]
    target: str = ""
    layer: Layer | None = None

    def has(self, backend: BackendName) -> bool:
        """Say whether the environment holds the engine in its supported version."""
        return any(e.backend == backend and e.supported for e in self.environment.engines)

    @property
    def pip(self) -> str:
        """The start of a command that installs into the environment."""
        return self.environment.pip
