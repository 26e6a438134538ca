"""The end of building a launch plan, the same for both engines. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8ctl.engines import base, refusals
from fp8ctl.engines.base import LaunchPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.engines.base import LaunchRequest, Option


def assemble(
    request: LaunchRequest,
    backend: str,
    entry: str,
    options: Sequence[Option],
    env: Mapping[str, str],
    notes: Sequence[str],
    env_from: tuple[tuple[str, str], ...] = (),
) -> LaunchPlan:
    """Return the plan of a server from what its engine's builder made.

    The user's words win over `options`; what listens where is read off the result.

    Raises:
        ConflictError: others would reach it without a key.
        UsageError: the port is none.
    """
    if request.await_push:
        notes = (
            *notes,
            "starts closed: generation answers 503 `unpushed` until FP8 weights landed",
        )
    words = base.merge(options, request.extra)
    host = base.option_value(words, "--host") or request.host
    refusals.refuse_open_door(host, request.environ, request.extra)
    return LaunchPlan(
        backend=backend,
        argv=(str(request.python), "-m", entry, *words),
        env=tuple(sorted(env.items())),
        env_from=env_from,
        host=host,
        port=base.parse_port(base.option_value(words, "--port"), request.port),
        run_dir=request.run_dir,
        model=base.option_value(words, "--served-model-name") or request.model.name,
        await_push=request.await_push,
        notes=tuple(notes),
    )
