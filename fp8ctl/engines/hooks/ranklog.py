"""One log file per worker: `rank-N.log` in the run folder.

Everything that a worker prints goes to its own file and still to the server's
log: the file is where `fp8ctl logs --rank` reads, the server's log is where an
engine's own messages are expected. A process of its own copies, so that the
last words of a worker that is killed or aborts are kept too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN_DIR = "FP8CTL_RUN_DIR"

#: Of this process, once it is known to be a worker.
rank: int | None = None


def run_dir() -> Path | None:
    """Return the folder of this server's run, or None when not started by fp8ctl."""
    value = os.environ.get(RUN_DIR)
    return Path(value) if value else None


#: Runs `tee` as nobody's child: SGLang kills a failing server's descendants at once. A
#: shell gives what it leaves in the background no stdin of its own, hence descriptor 3.
#: What stood behind the server's log may go away; the rank's own log must go on.
_COPY = """trap '' PIPE; exec 3<&0; tee -i -a -- "$1" <&3 3<&- &"""


def redirect(number: int) -> None:
    """Send stdout and stderr of this process, a worker, to `rank-N.log` and on to where they went.

    Works on file descriptors, so that what C++ and grandchildren print is kept
    as well. Does nothing without a run folder.
    """
    global rank
    folder = run_dir()
    if folder is None:
        return
    rank = number
    path = folder / f"rank-{number}.log"
    path.touch(mode=0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    passed_on = os.dup(2)
    copying = subprocess.run(
        ["/bin/sh", "-c", _COPY, "fp8ctl", str(path)],
        stdin=read,
        stdout=passed_on,
        stderr=passed_on,
        start_new_session=True,
        check=False,
    )
    os.close(read)
    os.close(passed_on)
    if copying.returncode == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
    os.close(write)
