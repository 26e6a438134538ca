"""A power cut at any instant leaves all-old or all-new; what a cut may do is in `power`."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import Fp8ctlError
from fp8ctl.patching import store
from fp8ctl.patching.names import sha256_of
from tests.patching.conftest import Quick
from tests.patching.faulty import next_command
from tests.patching.power import Died, Event, Recorder, State, states_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8ctl.patching.fsops import Syscalls

Tree = dict[str, tuple[bytes | None, int]]

# Name, what is applied before, and the command under the knife.
SCENARIOS: dict[str, tuple[tuple[str, ...], Callable[[Any, Syscalls], object]]] = {
    "patch": ((), lambda lab, calls: lab.patch("second", "third", calls=calls)),
    "revert": (("second", "third"), lambda lab, calls: lab.revert(calls=calls)),
    "rebuild": (("second", "third"), lambda lab, calls: lab.patch("first", calls=calls)),
    "take one off": (
        ("first", "third"),
        lambda lab, calls: lab.revert("third", calls=calls),
    ),
}


def read(site: Path) -> Tree:
    """Return everything below a folder."""
    found: Tree = {}
    for folder, names, files in os.walk(site):
        prefix = os.path.relpath(folder, site) + "/" if folder != str(site) else ""
        for name in (*names, *files):
            path = os.path.join(folder, name)
            data = None
            if name in files:
                with open(path, "rb") as stream:
                    data = stream.read()
            found[prefix + name] = (data, os.stat(path).st_mode & 0o7777)
    return found


def lay(site: Path, state: State) -> None:
    """Make a folder hold a state and nothing else."""
    now = read(site) if site.exists() else {}
    site.mkdir(exist_ok=True)
    wanted = {path: (data, mode) for path, data, mode in state}
    for path in sorted(now, reverse=True):
        data, _ = now[path]
        if data is None and wanted.get(path, (b"", 0))[0] is not None:
            (site / path).rmdir()
        elif data is not None and now[path] != wanted.get(path):
            (site / path).unlink()
    for path, (data, mode) in sorted(wanted.items()):
        if now.get(path) == (data, mode):
            continue
        if data is None:
            (site / path).mkdir(exist_ok=True)
        else:
            (site / path).write_bytes(data)
        (site / path).chmod(mode)


def essential(tree: Tree) -> Tree:
    """Leave out bytecode, which may go at any time, and the lock, which comes back."""
    return {
        path: entry
        for path, entry in tree.items()
        if "__pycache__" not in path and path != store.LOCK
    }


def stale_bytecode(tree: Tree) -> list[str]:
    """Return .pyc files that are not of the source beside them; ours hold its hash."""
    found = []
    for path, (data, _) in tree.items():
        if path.endswith(".pyc"):
            folder, _, name = path.partition("__pycache__/")
            source = tree.get(f"{folder}{name.split('.')[0]}.py", (None, 0))[0]
            if data != sha256_of(source or b"").encode():
                found.append(path)
    return found


def compile_all(site: Path) -> None:
    """Put a .pyc beside every module: of a kind that is never compared with its source."""
    for source in site.rglob("*.py"):
        cache = source.parent / "__pycache__"
        cache.mkdir(exist_ok=True)
        compiled = cache / f"{source.stem}.cpython-311.pyc"
        compiled.write_bytes(sha256_of(source.read_bytes()).encode())


class Judge:
    """Lays states into a folder, runs the next command, and remembers what was judged."""

    def __init__(self, site: Path, old: Tree, new: Tree) -> None:
        self.site, self.old, self.new = site, essential(old), essential(new)
        self.seen: dict[State, str] = {}

    def ends(self, state: State) -> str:
        """Return `old`, `new`, or what is wrong."""
        if state not in self.seen:
            lay(self.site, state)
            self.seen[state] = self._end()
        return self.seen[state]

    def _end(self) -> str:
        try:
            next_command(self.site)
        except Fp8ctlError as e:
            return f"{type(e).__name__}: {e.message}"
        tree = read(self.site)
        stale = stale_bytecode(tree)
        if stale:
            return f"stale bytecode: {stale}"
        now = essential(tree)
        if now == self.old:
            return "old"
        if now == self.new:
            return "new"
        return "neither: " + str(
            [p for p in sorted({*now, *self.old}) if now.get(p) != self.old.get(p)]
            + ["|"]
            + [p for p in sorted({*now, *self.new}) if now.get(p) != self.new.get(p)]
        )


class Bench:
    """One scenario: its trees before and after, and a judge."""

    def __init__(self, lab: Any, scratch: Path, name: str) -> None:
        before, self.command = SCENARIOS[name]
        self.lab = lab
        if before:
            lab.patch(*before)
        compile_all(lab.site)
        self.old = read(lab.site)
        self.run()
        self.new = read(lab.site)
        self.judge = Judge(scratch, self.old, self.new)
        self.chance = random.Random(name)

    def restore(self) -> None:
        lay(self.lab.site, frozenset((p, d, m) for p, (d, m) in self.old.items()))

    def run(self, calls: Syscalls | None = None) -> None:
        self.command(self.lab, calls or Quick())

    def log(self, **options: Any) -> Recorder:
        """Record the command from the start, with a death or an error in it."""
        self.restore()
        calls = Recorder(self.lab.site, **options)
        with contextlib.suppress(Died, Fp8ctlError):
            self.run(calls)
        return calls

    def check(self, log: Sequence[Event], *, first: int = 0, limit: int, tree: Any = None) -> None:
        """Require a good end of every state that a cut from event `first` on may leave."""
        for cut, end, _ in self.ends(log, first=first, limit=limit, tree=tree):
            assert end in ("old", "new"), f"cut after {log[:cut][-3:]}: {end}"

    def ends(
        self, log: Sequence[Event], *, first: int = 0, limit: int, tree: Any = None
    ) -> Iterator[tuple[int, str, State]]:
        for cut, state in states_after(
            tree or self.old, log, first=first, limit=limit, chance=self.chance
        ):
            yield cut, self.judge.ends(state), state


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Give a folder in memory where there is one: thousands of states are laid there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder) / "disk"


# States per cut, and every how manieth call an error or a kill hits.
COUNTS = [
    pytest.param(3, 19, id="few"),
    pytest.param(4096, 1, id="all", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("limit", "stride"), COUNTS)
@pytest.mark.parametrize("name", SCENARIOS)
class TestCut:
    def test_of_a_command(
        self, lab: Any, scratch: Path, name: str, limit: int, stride: int
    ) -> None:
        bench = Bench(lab, scratch, name)
        log = bench.log().log
        bench.check(log, limit=limit)
        kinds = set(bench.judge.seen.values())
        print(f"power, command, {name}: {len(log)} cuts, {len(bench.judge.seen)} states")
        assert kinds == {"old", "new"}

    def test_while_an_error_is_undone(
        self, lab: Any, scratch: Path, name: str, limit: int, stride: int
    ) -> None:
        bench = Bench(lab, scratch, name)
        for step in range(1, bench.log().count + 1, stride):
            calls = bench.log(fails_at=step)
            bench.check(calls.log, first=calls.failed_after, limit=min(limit, 32))
        print(f"power, undoing, {name}: {len(bench.judge.seen)} states")

    def test_while_the_next_command_mends_what_a_kill_left(
        self, lab: Any, scratch: Path, name: str, limit: int, stride: int
    ) -> None:
        bench = Bench(lab, scratch, name)
        for step in range(1, bench.log().count + 1, stride):
            calls = bench.log(dies_at=step)
            calls.revive()
            killed = len(calls.log)
            next_command(lab.site, calls)
            bench.check(calls.log, first=killed, limit=min(limit, 32))
        print(f"power, after a kill, {name}: {len(bench.judge.seen)} states")

    def test_while_the_next_command_mends_what_a_cut_left(
        self, lab: Any, scratch: Path, name: str, limit: int, stride: int
    ) -> None:
        bench = Bench(lab, scratch, name)
        log = bench.log().log
        states = list({s for _, _, s in bench.ends(log, limit=min(limit, 32))})
        states.sort(key=lambda s: sorted(map(repr, s)))
        bench.chance.shuffle(states)
        for state in states[: 400 // stride]:
            lay(lab.site, state)
            calls = Recorder(lab.site)
            next_command(lab.site, calls)
            tree = {path: (data, mode) for path, data, mode in state}
            bench.check(calls.log, limit=min(limit, 32), tree=tree)
        print(f"power, twice, {name}: {len(bench.judge.seen)} states")


@pytest.mark.parametrize("forgets", ["files", "folders"])
def test_without_a_flush_of_either_kind_the_model_finds_bad_ends(
    lab: Any, scratch: Path, forgets: str
) -> None:
    bench = Bench(lab, scratch, "patch")
    log = bench.log(forgets=forgets).log
    # The last cut: all is done, and nothing is certain.
    ends = {end for _, end, _ in bench.ends(log, first=len(log) - 20, limit=8)}
    assert ends - {"old", "new"}
