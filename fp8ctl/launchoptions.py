"""What was typed of `fp8ctl launch`, checked for what excludes each other. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fp8ctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.check.levels import Level
    from fp8ctl.engines.base import Source
    from fp8ctl.environment import BackendName

MODES: Final = ("block", "per-tensor", "online")


@dataclass(frozen=True, slots=True)
class Asked:
    """What was typed about the weights."""

    backend: BackendName
    mode: str
    quantization: str | None
    torchao_config: str | None
    await_push: bool
    tp: int
    block_size: str | None
    keep: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()

    def label(self) -> str:
        """Return the mode, or the method asked for instead, in a word."""
        return self.quantization or self.torchao_config or self.mode


def parse(
    backend: BackendName,
    mode: str,
    quantization: str | None,
    torchao_config: str | None,
    *,
    await_push: bool,
    tp: int,
    block_size: str | None,
    keep: Sequence[str] = (),
    quantize: Sequence[str] = (),
) -> Asked:
    """Check the options about weights against each other.

    Raises:
        UsageError: a mode that is none, or two options of which one would be ignored.
    """
    if mode not in MODES:
        raise UsageError(
            f"--mode {mode!r} is not a mode; there is {', '.join(MODES)}", hint="--mode block"
        )
    if quantization is not None and torchao_config is not None:
        raise UsageError("--quantization and --torchao-config exclude each other", hint="drop one")
    method = quantization or torchao_config
    if method is not None and mode != "block":
        raise UsageError(f"--mode {mode} and {method!r} exclude each other", hint="drop --mode")
    if block_size is not None and (method is not None or mode != "block"):
        raise UsageError("--block-size is for --mode block", hint="drop --block-size")
    if (keep or quantize) and (method is not None or mode == "online"):
        option = "--keep" if keep else "--quantize"
        raise UsageError(
            f"{option} is for a plan: --mode block or per-tensor", hint=f"drop {option}"
        )
    return Asked(
        backend,
        mode,
        quantization,
        torchao_config,
        await_push,
        tp,
        block_size,
        tuple(keep),
        tuple(quantize),
    )


def parse_check(check: str | None, *, no_check: bool, await_push: bool, wait: bool) -> Level | None:
    """Return the level of the closing check, None for no check.

    Args:
        check: as typed; None where it was not.
        no_check: there is to be none.
        await_push: there are no FP8 weights when the server is ready.
        wait: somebody is there when it is.

    Raises:
        UsageError: a level that is none, or an option beside it that leaves nothing to check.
    """
    from fp8ctl.check import levels

    if check is None:
        return "live" if wait and not no_check else None
    level = levels.parse(check, "--check")
    if no_check:
        raise UsageError(f"--check {level} and --no-check exclude each other", hint="drop one")
    if not wait:
        raise UsageError(
            f"--check {level} is for a server that is ready, and --no-wait returns before",
            hint="drop --no-wait",
        )
    if await_push and level != "live":
        raise UsageError(
            f"--check {level} is about weights, and with --await-push they come later",
            hint="drop --check: a push ends with a check of what has landed",
        )
    return level


def require_provable(
    level: Level | None, source: Source, method: str | None, *, planned: bool
) -> None:
    """Refuse a closing check that would prove nothing, before a server is started for it.

    Args:
        level: of the check; None for none.
        source: where the weights come from.
        method: that was asked for instead of a mode.
        planned: whether there is a plan of them.

    Raises:
        UsageError: it is one.
    """
    # --quantization fp8 of 16-bit weights is what --mode online is.
    online = source == "online" or (source == "method" and method == "fp8")
    if planned or online or level in (None, "live"):
        return
    if level == "logprobs" and source != "checkpoint":
        return  # what the method makes may be nearest to FP8, or not: that is the question
    raise UsageError(
        f"--check {level} compares with what a plan makes of a 16-bit checkpoint, and there is"
        f" none of {method or 'a checkpoint that is in FP8 already'}",
        hint="--check live, or the 16-bit checkpoint as --model",
    )
