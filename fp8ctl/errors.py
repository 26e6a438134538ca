"""The one tree of errors: id, message, hint, exit code.

A message names the file or flag, the value found and the value expected. A
hint is a command or an edit that can be typed. Exit codes are a contract
(docs/commands.md): change them only there and here together.
"""

from __future__ import annotations

from typing import ClassVar


class Fp8ctlError(Exception):
    """Root of every error that fp8ctl raises on purpose.

    Attributes:
        id: stable identifier, printed in `--json` output and in the docs.
        exit_code: what the process exits with.
        message: one sentence, no full stop, with the offending value in it.
        hint: what to type next, or None.
        data: facts for a program (JSON types only).
    """

    id: ClassVar[str] = "FP8-INTERNAL"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        data: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data = data or {}


class UsageError(Fp8ctlError):
    """An option or a combination of options that cannot be meant."""

    id = "FP8-USAGE"
    exit_code = 2


class NotFoundError(Fp8ctlError):
    """Something named by the user is not there: a model, an engine, a server."""

    id = "FP8-NOT-FOUND"
    exit_code = 3


class UnsupportedError(Fp8ctlError):
    """An engine version, a device or a method that fp8ctl does not cover."""

    id = "FP8-UNSUPPORTED"
    exit_code = 4


class DriftError(Fp8ctlError):
    """A file is not what it must be; nothing was changed."""

    id = "FP8-DRIFT"
    exit_code = 5


class ConflictError(Fp8ctlError):
    """Two things asked for, or already there, exclude each other; nothing was changed."""

    id = "FP8-CONFLICT"
    exit_code = 5


class NotPermittedError(Fp8ctlError):
    """The file system or the operating system says no."""

    id = "FP8-NOT-PERMITTED"
    exit_code = 6


class BusyError(Fp8ctlError):
    """A lock, a port or a running server is in the way."""

    id = "FP8-BUSY"
    exit_code = 7


class CheckFailedError(Fp8ctlError):
    """A live server does not serve what it should."""

    id = "FP8-CHECK-FAILED"
    exit_code = 8


class PlanDoesNotFitError(Fp8ctlError):
    """The model cannot be quantised as asked."""

    id = "FP8-PLAN"
    exit_code = 8


class EngineFailedError(Fp8ctlError):
    """The engine did not start, or died."""

    id = "FP8-ENGINE"
    exit_code = 9


class AbortedError(Fp8ctlError):
    """The user pressed Ctrl-C."""

    id = "FP8-INTERRUPTED"
    exit_code = 130


class DiffError(Fp8ctlError):
    """A patch file that fp8ctl will not use; nothing was changed."""

    id = "FP8-DIFF"
    exit_code = 5


class HunkError(DriftError):
    """A hunk whose context is not in the file, or in more places than one."""

    id = "FP8-HUNK"


class CatalogError(Fp8ctlError):
    """A series of patches that does not hold together: fp8ctl itself is damaged."""

    id = "FP8-CATALOG"


class CheckpointError(NotFoundError):
    """A folder does not hold a model that can be read: a part is missing or broken."""

    id = "FP8-CHECKPOINT"


class CarrierError(ConflictError):
    """Weights cannot reach a server by the way that was chosen; nothing was changed."""

    id = "FP8-CARRIER"
