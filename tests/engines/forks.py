"""Jobs on stdin, answered each in a fork of a process that has imported what takes long."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def answer(run: Callable[[dict[str, Any]], str]) -> None:
    """Read jobs, one JSON line each, and write what `run` makes of each, a JSON line too."""
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                pipe.write(run(json.loads(line)))
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        sys.stdout.write((answer or json.dumps({"traceback": "the scenario died"})) + "\n")
        sys.stdout.flush()
