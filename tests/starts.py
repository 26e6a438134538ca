"""Plans to start what stands in for an engine."""

from __future__ import annotations

import sys
from pathlib import Path

from fp8ctl.engines.base import LaunchPlan

#: A server that answers as an engine does, as far as its arguments say so.
FAKE = Path(__file__).with_name("fake_engine.py")


def plan_of(
    folder: Path, port: int, *argv: str, script: Path = FAKE, await_push: bool = False, **env: str
) -> LaunchPlan:
    """Return a plan to run a script.

    Args:
        folder: of the run.
        port: that it will listen on.
        argv: behind the script.
        script: what is run.
        await_push: it begins without weights.
        env: of its process, besides the folder.
    """
    return LaunchPlan(
        backend="sglang",
        argv=(sys.executable, str(script), *argv),
        env=(("FP8CTL_RUN_DIR", str(folder)), *env.items()),
        env_from=(),
        host="127.0.0.1",
        port=port,
        run_dir=folder,
        model="tiny",
        await_push=await_push,
    )


def fake(folder: Path, port: int, *arguments: str, await_push: bool = False) -> LaunchPlan:
    """Return a plan of the fake engine, whose log is written as it goes."""
    argv = ("--port", str(port), *arguments)
    return plan_of(folder, port, *argv, await_push=await_push, PYTHONUNBUFFERED="1")
