"""Runs a module as two ranks, each a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, plan: dict[str, object], *arguments: str) -> list[tuple[int, Any]]:
    """Return exit status and JSON answer of each rank; None for one that gave none.

    Args:
        module: takes rank, number of ranks and `arguments`, the first a file to meet at.
        plan: what it reads from stdin.
        arguments: of the module.
    """
    # Without the C that is built at first use: a rank that compiles keeps the other waiting.
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "FP8CTL_NATIVE": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), "2", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **settings},
        )
        for rank in range(2)
    ]
    answers = []
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(plan))
            process.stdin.close()
            process.stdin = None
        for process in processes:
            said, _ = process.communicate(timeout=240)
            answers.append((process.returncode, json.loads(said) if said else None))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return answers
