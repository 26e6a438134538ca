"""One leg of a run on a GPU: steps with a name, a result and a time, written down as they end.

What fails ends its job and no other: GPU time is short, and what can still be seen is.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent.parent


class FailedError(Exception):
    """What was seen is not what must be seen."""


class SkippedError(Exception):
    """It cannot be looked at here, and the reason."""


class _EndedError(Exception):
    """A step did not end well; what follows it in its job has no ground."""


@dataclass
class Leg:
    """Where the steps of a leg go.

    Attributes:
        name: of the leg.
        folder: for its files.
        seconds: that it may take in all.
        together: how many jobs run at a time.
        only: patterns of the jobs to do; empty: all.
    """

    name: str
    folder: Path
    seconds: float
    together: int
    only: tuple[str, ...] = ()
    failed: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        self.given_up = False
        self._lock = threading.Lock()
        self._job = threading.local()
        self._children: list[subprocess.Popen[bytes]] = []
        self._lines = (self.folder / "steps.jsonl").open("a", encoding="utf-8")

    @property
    def job_name(self) -> str:
        """The job that this thread works on."""
        return getattr(self._job, "name", "main")

    def left(self, limit: float) -> float:
        """Return the seconds that a step may still take.

        Raises:
            SkippedError: the leg's time is up.
        """
        rest = self.seconds - (time.monotonic() - self._began)
        if rest < 2:
            raise SkippedError(f"the {self.seconds:.0f} s of this leg are over")
        return min(limit, rest)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Json]:
        """Do one thing, and say how it went; what it puts into the yielded dict is evidence."""
        seen: Json = {}
        began = time.monotonic()
        try:
            yield seen
        except Exception as e:
            skipped = isinstance(e, SkippedError)
            seen["reason"] = str(e) if skipped else f"{type(e).__name__}: {e}"
            if not isinstance(e, FailedError | SkippedError | OSError):
                seen["traceback"] = traceback.format_exc()
            self._tell(what, "skip" if skipped else "fail", time.monotonic() - began, seen)
            raise _EndedError from e
        self._tell(what, "ok", time.monotonic() - began, seen)

    def _tell(self, what: str, result: str, seconds: float, seen: Json) -> None:
        at = time.monotonic() - self._began
        line: Json = {"leg": self.name, "job": self.job_name, "step": what, "result": result}
        line |= {"at": round(at, 2), "seconds": round(seconds, 2)}
        words = seen.get("reason") or seen.get("seen") or ""
        with self._lock:
            self.counts[result] = self.counts.get(result, 0) + 1
            if result == "fail":
                self.failed.append(f"{self.job_name}: {what}")
            self._lines.write(json.dumps(line | seen, default=str) + "\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())
            print(
                f"[{at:6.1f}] {result:4} {seconds:6.1f} s  {self.name}/{self.job_name}: {what}"
                + (f"  ({' '.join(str(words).split())[:230]})" if words else ""),
                flush=True,
            )

    def enter(self, name: str) -> None:
        """Go on under a job's name, after a job within it."""
        self._job.name = name

    def job(self, name: str, work: Callable[[], None]) -> bool:
        """Do steps until one does not end well; return whether all did."""
        self._job.name = name
        try:
            work()
        except _EndedError:
            return False
        except Exception as e:  # noqa: BLE001 - a fault of these scripts ends its job alone
            seen = {"reason": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
            self._tell("the job itself", "fail", 0.0, seen)
            return False
        finally:
            self._job.name = "main"
        return True

    def jobs(self, work: Mapping[str, Callable[[], None]], *, rounds: bool = False) -> None:
        """Do jobs, some at a time.

        Args:
            work: name to job.
            rounds: begin the next ones when all of some have ended. vLLM wants that: memory
                that another server gives back while it measures the GPU's ends it.
        """
        wanted = [name for name in work if self.wants(name)]
        size = self.together if rounds else max(1, len(wanted))
        for at in range(0, len(wanted), size):
            with ThreadPoolExecutor(self.together) as pool:
                some = [pool.submit(self.job, name, work[name]) for name in wanted[at : at + size]]
                for done in some:
                    done.result()

    def wants(self, name: str) -> bool:
        """Whether a job is one of those asked for."""
        return not self.only or any(fnmatch.fnmatch(name, pattern) for pattern in self.only)

    def transcript(self, text: str) -> None:
        """Add to what this job typed and read."""
        with (self.folder / f"{self.job_name}.txt").open("a", encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")

    def run(
        self, argv: Sequence[str | Path], env: Mapping[str, str], limit: float, shown: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a program within a time; its output goes into the transcript.

        Raises:
            FailedError: it did not end in time, and was killed with its whole session.
        """
        limit = self.left(limit)
        words = [str(word) for word in argv]
        child = subprocess.Popen(
            words,
            env=dict(env),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        with self._lock:
            self._children.append(child)
        late = False
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            late = True
            _end(child)
            out, err = child.communicate()
        texts = out.decode(errors="replace"), err.decode(errors="replace")
        self.transcript(f"$ {shown or ' '.join(words)}\n{texts[1]}{texts[0]}")
        self.transcript(f"[exit {child.returncode}{', out of time' if late else ''}]\n")
        if late:
            raise FailedError(f"not done after {limit:.0f} s: {_last(texts[1] or texts[0])}")
        return subprocess.CompletedProcess(words, child.returncode, *texts)

    def start(
        self, argv: Sequence[str | Path], env: Mapping[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a program that `stop` or `close` ends."""
        words = [str(word) for word in argv]
        self.transcript(f"$ {' '.join(words)} &")
        child = subprocess.Popen(
            words,
            env=dict(env),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        with self._lock:
            self._children.append(child)
        return child

    def stop(self, child: subprocess.Popen[bytes]) -> None:
        """End a program of `start` and all of its session."""
        _end(child)

    def overtime(self, seconds: float = 90) -> None:
        """Allow for what puts the machine in order, also when the leg's time is over."""
        self.seconds = max(self.seconds, time.monotonic() - self._began + seconds)

    def give_up(self) -> None:
        """End what runs; the steps that would follow are skipped."""
        self.given_up = True
        self.seconds = 0.0
        for child in self._children:
            _end(child, (signal.SIGTERM,), 0.0)

    def close(self) -> None:
        """End what still runs."""
        for child in self._children:
            _end(child)
        self._lines.close()


def _end(
    child: subprocess.Popen[bytes],
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGKILL),
    patience: float = 8.0,
) -> None:
    """End a session that we made, gently at first."""
    for number in signals:
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        except PermissionError:
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=patience)
            # Children of a server may outlive it for a moment: the second round is for them.
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=1)


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
