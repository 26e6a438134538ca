"""Ranks of servers as real processes; `rank.py` is what they run."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ctl.carriers import peer

if TYPE_CHECKING:
    from fp8ctl.carriers.ends import Sender

SCRIPT = Path(__file__).with_name("rank.py")


class Process:
    """One of them."""

    def __init__(self, **environment: str) -> None:
        environment = {
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.popen = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.owes = 0

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def lives(self) -> bool:
        return self.popen.poll() is None

    def say(self, **order: object) -> None:
        """Send an order; its answer is asked for later."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(order) + "\n")
        self.popen.stdin.flush()
        self.owes += 1

    def answer(self, within: float = 60.0) -> dict[str, Any]:
        """Wait for the answer to the last order."""
        assert self.popen.stdout is not None
        ready, _, _ = select.select([self.popen.stdout], [], [], within)
        assert ready, f"process {self.pid} did not answer within {within} s"
        found: dict[str, Any] = json.loads(self.popen.stdout.readline())
        self.owes -= 1
        return found

    def ask(self, **order: object) -> dict[str, Any]:
        self.say(**order)
        return self.answer()

    def ok(self, **order: object) -> Any:
        """Return what an order gives that has to go well."""
        answer = self.ask(**order)
        assert "ok" in answer, answer
        return answer["ok"]

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """End it at once, as an out-of-memory killer does."""
        self.popen.kill()
        self.end()

    def end(self) -> None:
        if self.lives:
            self.popen.send_signal(signal.SIGCONT)
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        try:
            self.popen.wait(20)
        finally:
            self.popen.kill()
            self.popen.wait()
            self.popen.stdout.close()


class Pool:
    """Processes that tests take one after another: to start one takes seconds."""

    def __init__(self) -> None:
        self._all: list[Process] = []

    def take(self, count: int) -> list[Process]:
        """Return so many that live and wait for an order."""
        for one in [one for one in self._all if one.owes]:
            one.kill()  # a test failed over it
        self._all = [one for one in self._all if one.lives]
        while len(self._all) < count:
            # Whoever takes it next is to have what the trainer offers.
            self._all.append(Process(**{peer.NCCL_ONLY: ""}))
            self._all[-1].ok(left=True)  # it is up
        return self._all[:count]

    def end(self) -> None:
        for one in self._all:
            if one.lives:
                one.end()


def alive(sender: Sender) -> bool:
    """Return whether a carrier can be used; asked anew each time."""
    return sender.alive
