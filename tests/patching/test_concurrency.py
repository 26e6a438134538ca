"""Many at once: one wins, the others are told who, and nobody ever sees half a change."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import hardware
from fp8ctl.errors import BusyError
from fp8ctl.patching import catalog, commands, status, store, transaction
from fp8ctl.patching.fsops import Root, Syscalls
from fp8ctl.patching.status import judge, take
from fp8ctl.render import Reporter
from tests.patching.conftest import REPOSITORY, Quick
from tests.patching.faulty import Faulty, killed_at, next_command

if TYPE_CHECKING:
    from pathlib import Path

A = "sglang/srt/a.py"


@pytest.fixture
def bundled(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the small series the one that fp8ctl carries; nobody waits for the disk."""
    monkeypatch.setattr(catalog, "ROOT", lab.patches)
    monkeypatch.setattr(hardware, "detect", lambda: hardware.Hardware())
    monkeypatch.setattr(Syscalls, "fsync", Quick.fsync)
    return lab


class Worker:
    """One process: does random things, and notes what should not have happened."""

    def __init__(self, lab: Any, seed: int, dead: Path) -> None:
        self.lab, self.dead, self.chance = lab, dead, random.Random(seed)
        self.holders: set[int | None] = set()
        self.counts: dict[str, int] = {}
        self.waits: list[float] = []
        self.wrong: list[str] = []

    def run(self, count: int) -> dict[str, Any]:
        for _ in range(count):
            act = self.chance.choice(
                [self.patch, self.patch, self.revert, self.revert, self.look, self.hold, self.die]
            )
            started = time.monotonic()
            try:
                act()
                name = act.__name__
            except BusyError as e:
                name = "busy"
                self.waits.append(time.monotonic() - started)
                pid = e.data["pid"]
                assert isinstance(pid, int | None)
                self.holders.add(pid)
                if pid == os.getpid():
                    self.wrong.append(f"held by itself: {e.message}")
            except Exception as e:  # noqa: BLE001 - whatever it is, it is a finding
                name = "error"
                self.wrong.append(f"{act.__name__}: {type(e).__name__}: {e}")
            self.counts[name] = self.counts.get(name, 0) + 1
        holders = sorted(self.holders, key=str)
        told = {"counts": self.counts, "waits": self.waits, "wrong": self.wrong}
        return told | {"holders": holders}

    def _command(self, body: Any, **options: Any) -> None:
        report = Reporter(out=io.StringIO(), err=io.StringIO())
        body(report, site_packages=self.lab.site, **options)

    def patch(self) -> None:
        ids = self.chance.choice([["second", "third"], ["first"], ["fourth"], None])
        self._command(commands.patch, patch_ids=ids)

    def revert(self) -> None:
        ids = self.chance.choice([None, None, ["second"], ["third"]])
        self._command(commands.revert, patch_ids=ids)

    def look(self) -> None:
        self._judge(holding=False)

    def hold(self) -> None:
        with Root(self.lab.site) as root, transaction.begin(root):
            self._judge(holding=True)

    def die(self) -> None:
        """Let a child be killed at some step, one time in four that it comes to it."""
        if self.chance.random() < 0.25:
            step = self.chance.randrange(1, 90)
            ids = self.chance.choice([("second", "third"), ("first",)])
            killed_at(step, lambda calls: self._patch_or_not(ids, calls))

    def _patch_or_not(self, ids: tuple[str, ...], calls: Syscalls) -> None:
        (self.dead / str(os.getpid())).touch()
        with contextlib.suppress(BusyError):
            self.lab.patch(*ids, calls=calls)

    def _judge(self, *, holding: bool) -> None:
        with Root(self.lab.site) as root:
            snapshot = take(root, self.lab.series)
        found = judge(self.lab.series, snapshot)
        if found.interrupted and not holding:
            return  # said to be so: somebody is at work, or was killed
        listed = set(snapshot.ledger.patches) if snapshot.ledger else set()
        if found.state not in ("pristine", "applied") or listed != found.applied:
            files = {f.path: (f.state, sorted(f.patches)) for f in found.files}
            self.wrong.append(f"{'held' if holding else 'seen'}: {files}, ledger {listed}")


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.long)])
def test_eight_processes_see_whole_changes_only(bundled: Any, tmp_path: Path, count: int) -> None:
    pristine = bundled.tree()
    dead = tmp_path / "dead"
    dead.mkdir()
    gate, open_gate = os.pipe()
    children: list[int] = []
    for seed in range(8):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(open_gate)
                os.read(gate, 1)
                result = Worker(bundled, seed, dead).run(count)
                (tmp_path / f"told-{seed}").write_text(json.dumps(result))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    started = time.monotonic()
    os.write(open_gate, bytes(len(children)))
    os.close(open_gate)
    os.close(gate)
    left = set(children)
    while left and time.monotonic() < started + 30 + 3 * count:
        pid, how = os.waitpid(-1, os.WNOHANG)
        assert how == 0, f"process {pid} ended with {how}"
        left.discard(pid)
        time.sleep(0.02)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not left, "a deadlock"
    files = [tmp_path / f"told-{seed}" for seed in range(8)]
    told: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
    wrong = [w for one in told for w in one["wrong"]]
    assert not wrong, wrong[:5]
    # Who is named is one of us, or a child that was killed.
    known = {*children, *(int(name) for name in os.listdir(dead))}
    assert {h for one in told for h in one["holders"]} <= known
    counts: dict[str, int] = {}
    for one in told:
        for name, number in one["counts"].items():
            counts[name] = counts.get(name, 0) + number
    waits = sorted(w for one in told for w in one["waits"])
    if count > 100:
        print(f"concurrency: {counts} in {time.monotonic() - started:.0f} s, busy after", end=" ")
        print(f"{statistics.median(waits):.3f} s (median), {waits[-1]:.3f} s (longest)")
        assert counts["busy"] > 20
    # The bar is a second; eight processes on two busy cores get three times that.
    assert not waits or waits[-1] < 3
    next_command(bundled.site)
    bundled.revert()
    assert bundled.tree() == pristine


def test_the_command_line_exits_7_and_names_the_holder(bundled: Any, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fp8ctl.patching import catalog; "
    code += "catalog.ROOT = Path(sys.argv.pop(1)); from fp8ctl.cli import main; main()"
    argv = [sys.executable, "-c", code, str(bundled.patches)]
    environment = {"PYTHONPATH": str(REPOSITORY), "FP8CTL_HOME": str(tmp_path / "home")}

    def run(verb: str) -> tuple[subprocess.CompletedProcess[str], float]:
        started = time.monotonic()
        options = ["--json", "--site-packages", str(bundled.site)]
        done = subprocess.run(
            [*argv, verb, *options], env=environment, capture_output=True, text=True, check=False
        )
        return done, time.monotonic() - started

    for verb in ("patch", "revert"):
        before = bundled.tree()
        with Root(bundled.site) as root, transaction.begin(root):
            held, waited = run(verb)
        assert held.returncode == 7, held.stderr
        error = json.loads(held.stdout)["error"]
        assert error["data"] == {"pid": os.getpid()}
        assert f"process {os.getpid()}" in error["message"]
        assert bundled.tree() == before
        done, alone = run(verb)
        assert done.returncode == 0, done.stderr
        # Start-up is most of it, and no two are alike on a busy machine.
        assert waited < 2 * alone + 3


class TestPid:
    def test_a_holder_that_has_not_written_its_pid_is_waited_for(self, lab: Any) -> None:
        with Root(lab.site) as root, transaction.begin(root):
            lock = lab.site / store.LOCK
            lock.write_bytes(b"")

            class Late(Faulty):
                def lock(self, fd: int) -> None:
                    try:
                        super().lock(fd)
                    finally:
                        if self.names.count("lock") == 3:
                            lock.write_bytes(b"4711\n")

            with pytest.raises(BusyError, match="process 4711"):
                lab.patch("first", calls=Late())

    def test_one_that_ends_before_is_followed_by_the_next(self, lab: Any) -> None:
        class Twice(Faulty):
            def lock(self, fd: int) -> None:
                if len(self.names) < 5:
                    raise BlockingIOError(errno.EAGAIN, "held")
                super().lock(fd)

        assert lab.patch("first", calls=Twice()).ops
        assert lab.status().applied == {"first"}

    def test_the_lock_names_nobody_once_it_is_free(self, lab: Any) -> None:
        lab.patch("first")
        assert (lab.site / store.LOCK).read_bytes() == b""


class TestReaders:
    """`take` holds no lock; what it returns is of one moment, or is marked."""

    def test_a_change_between_two_reads_is_read_again(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads = 0
        read = Root.read

        def slow(root: Root, path: str, **options: Any) -> Any:
            nonlocal reads
            found = read(root, path, **options)
            if path == A:
                reads += 1
                if reads == 1:
                    monkeypatch.setattr(Root, "read", read)
                    lab.patch("second")  # changes A, which was read, and B, which was not
                    monkeypatch.setattr(Root, "read", slow)
            return found

        monkeypatch.setattr(Root, "read", slow)
        found = lab.status()
        assert reads == 2
        assert (found.state, found.applied) == ("applied", {"second"})
        assert not found.interrupted

    def test_one_that_never_rests_is_marked(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        numbers = iter(range(1000))
        monkeypatch.setattr(store, "stamp", lambda _: next(numbers))
        assert lab.status().interrupted
        assert next(numbers) == 2 * status._TRIES

    def test_a_plan_made_of_half_a_change_is_made_again_or_busy(self, bundled: Any) -> None:
        calls = 0

        def make(root: Root) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise BusyError("torn")
            return []

        report = Reporter(out=io.StringIO(), err=io.StringIO())
        with Root(bundled.site) as root:
            with pytest.raises(BusyError, match="torn"):
                commands._plans(report, root, make, dry_run=False)
            (bundled.site / ".fp8ctl").mkdir()
            calls = 0
            with pytest.raises(BusyError, match="torn"):
                commands._plans(report, root, make, dry_run=True)
            calls = 0
            assert commands._plans(report, root, make, dry_run=False) == []
            assert not (bundled.site / ".fp8ctl").exists()
            with Root(bundled.site) as other, transaction.begin(other):
                calls = 0
                with pytest.raises(BusyError, match=f"process {os.getpid()}"):
                    commands._plans(report, root, make, dry_run=False)
