"""The stand-in for an engine, with real workers that import a package through fp8ctl's hooks.

    python code_engine.py MODULE SHADOW SABOTAGE -- arguments of fake_engine.py

Two workers, spawned, import MODULE: the second with SHADOW in front of its path (`-` for
none), and SABOTAGE, a line of Python, is executed in there afterwards. The server answers
when both are that far, as real ones do.
"""

from __future__ import annotations

import importlib
import multiprocessing
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from fp8ctl.engines.hooks import loaded, ranklog

loaded.install()


def run_worker_process(rank: int, shadow: str, sabotage: str, module: str, ready: Any) -> None:
    """Be a worker."""
    ranklog.redirect(rank)
    if shadow != "-":
        sys.path.insert(0, shadow)
    there = importlib.import_module(module)
    exec(sabotage, {"module": there})
    ready.set()
    time.sleep(300)


if __name__ == "__main__":
    module, shadow, sabotage, _, *rest = sys.argv[1:]
    spawn = multiprocessing.get_context("spawn")
    events = [spawn.Event(), spawn.Event()]
    for rank, ready in enumerate(events):
        own = (shadow, sabotage) if rank else ("-", "")
        arguments = (rank, *own, module, ready)
        spawn.Process(target=run_worker_process, args=arguments, daemon=True).start()
    if not all(event.wait(60) for event in events):
        sys.exit("the workers do not come")
    sys.argv = ["fake_engine.py", "--workers", "2", *rest]
    runpy.run_path(str(Path(__file__).with_name("fake_engine.py")), run_name="__main__")
