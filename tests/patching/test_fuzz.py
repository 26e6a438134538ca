"""The diff engine against `git apply` and GNU `patch -F0`, on random and on mangled diffs.

What it accepts both accept, with the same bytes; what git writes of regular
files it accepts, but for a changed mode. The full counts are `long`.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8ctl.errors import DiffError, HunkError
from fp8ctl.patching import diff, parser
from fp8ctl.patching.names import parse_relpath
from tests.patching import oracles, random_trees

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.patching.random_trees import Case

Tool = Callable[[Path, bytes], bool]

BATCH = 1_000
_NO_NEWLINE = b"\n\\ No newline at end of file\n"
# `--reject` goes on behind a file that it refuses, as GNU patch does.
TOOLS: dict[str, Tool] = {"git": lambda folder, text: oracles.git_apply(folder, text, "--reject")}
if oracles.GNU_PATCH:
    TOOLS["patch"] = oracles.gnu_patch


@pytest.mark.skipif(not oracles.GNU_PATCH, reason="no GNU patch: compared with git alone")
def test_gnu_patch_is_one_of_the_judges() -> None:
    assert set(TOOLS) == {"git", "patch"}


def test_what_git_writes_is_applied_as_git_and_patch_apply_it(tmp_path: Path) -> None:
    _differential(tmp_path, 2_000)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3, 4])  # in parts, so that each ends in its time
def test_what_git_writes_is_applied_as_git_and_patch_apply_it_200_000_times(
    tmp_path: Path, seed: int
) -> None:
    found = _differential(tmp_path, 50_000, seed)
    for name in random_trees.hazards(random_trees.Case("", b"", b"")):
        assert found[name] >= 12, name


def test_a_mangled_diff_is_refused_or_means_to_git_what_it_means_here(tmp_path: Path) -> None:
    _mangled(tmp_path, 1_000)


@pytest.mark.long
def test_a_mangled_diff_is_refused_or_means_to_git_what_it_means_here_50_000_times(
    tmp_path: Path,
) -> None:
    found = _mangled(tmp_path, 50_000, seed=1)
    assert found["accepted"] > 4_000
    assert found["refused"] > 30_000


def _mangled(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    found: Counter[str] = Counter()
    rng = random.Random(seed)
    slowest = 0.0
    originals: list[tuple[Case, bytes]] = []
    for number in range(count):
        if number % 5_000 == 0:
            print(f"{number} mangled diffs: {dict(found)}, {slowest * 1000:.0f} ms", flush=True)
            cases = [random_trees.case(rng, n) for n in range(BATCH)]
            diffs = _by_git(folder / f"repository{number}", cases)
            originals = [(c, diffs[c.path]) for c in cases if c.path in diffs]
        tree: dict[str, bytes | None] = {}
        parts = []
        for path, (one, text) in zip(
            ("pkg/a.py", "pkg/b.py"), rng.choices(originals, k=2), strict=True
        ):
            parts.append(text.replace(one.path.encode(), path.encode()))
            if one.old is not None:
                tree[path] = one.old
        text = random_trees.damage(rng, b"".join(parts[: rng.choice([1, 1, 2])]))
        started = time.process_time()
        try:
            changes = parser.parse(text)
            results = {c.path: diff.apply(c, tree.get(c.path)).data for c in changes}
        except (DiffError, HunkError):
            found["refused"] += 1
            continue
        finally:
            slowest = max(slowest, time.process_time() - started)
        found["accepted"] += 1
        wanted = {path: data for path, data in (tree | results).items() if data is not None}
        for name, tool in TOOLS.items():
            copy = folder / name
            for path, data in tree.items():
                _write(copy, path, data, 0o644)
            copy.mkdir(exist_ok=True)
            assert tool(copy, text), (name, text, tree)
            after = {str(f.relative_to(copy)): f.read_bytes() for f in _files(copy)}
            assert after == wanted, (name, text, tree)
            shutil.rmtree(copy)
    print(f"{count} mangled diffs: {dict(found)}, {slowest * 1000:.0f} ms at most")
    assert slowest < 1.0
    return found


def _files(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.is_file()]


def _differential(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    found: Counter[str] = Counter()
    for number in range(count // BATCH):
        rng = random.Random(seed * 1_000_003 + number)
        cases = [random_trees.case(rng, n) for n in range(BATCH)]
        work = folder / "work"
        work.mkdir()
        found += _batch(work, cases, rng)
        shutil.rmtree(work)
        if (number + 1) % 20 == 0 or number + 1 == count // BATCH:
            print(f"{(number + 1) * BATCH} cases: {dict(found)}", flush=True)
    return found


def _batch(work: Path, cases: list[Case], rng: random.Random) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in cases:
        found.update(name for name, there in random_trees.hazards(one).items() if there)
    diffs = _by_git(work / "repository", cases)
    accepted, refused = [], []
    for one in cases:
        text = diffs.get(one.path)
        assert (text is None) == (one.old == one.new and one.old_mode == one.new_mode)
        if text is None:
            continue
        try:
            (change,) = parser.parse(text)
        except DiffError:
            refused.append(one)
            continue
        assert diff.apply(change, one.old).data == one.new
        assert diff.apply(diff.reverse(change), one.new).data == one.old
        if one.old is None or one.new is None:
            assert change.mode == (one.new_mode or one.old_mode)
        accepted.append(one)
    found["accepted"], found["refused"] = len(accepted), len(refused)
    # What is refused by design of what git writes about regular files, and nothing else.
    for one in refused:
        assert b"\nold mode " in diffs[one.path] or " " in one.path, diffs[one.path]
    text = b"".join(diffs[one.path] for one in accepted)
    # Read whole, it is what its parts are.
    parts = [parser.parse(diffs[one.path])[0] for one in accepted]
    assert list(parser.parse(text, max_bytes=len(text))) == parts
    for name, tool in TOOLS.items():
        _same_as(tool, work / name, accepted, text)
    found += _elsewhere(work, [o for o in accepted if o.old and o.new], diffs, rng)
    return found


def _by_git(repository: Path, cases: Iterable[Case]) -> dict[str, bytes]:
    old = [(c.path, c.old, c.old_mode) for c in cases if c.old is not None]
    new = [(c.path, c.new, c.new_mode) for c in cases if c.new is not None]
    return oracles.git_diff(repository, *oracles.git_import(repository, old, new))


def _same_as(tool: Tool, copy: Path, cases: list[Case], text: bytes) -> None:
    """Let a tool apply git's diff, and then take it back by what fp8ctl renders."""
    for one in cases:
        _write(copy, one.path, one.old, one.old_mode)
    assert tool(copy, text)
    back = []
    for one in cases:
        assert _read(copy, one.path) == one.new, one
        if one.new is not None:
            executable = bool((copy / one.path).stat().st_mode & 0o100)
            assert executable == (one.new_mode == 0o755), one
        mode = one.old_mode if one.new is None else one.new_mode
        back.append(diff.render(parse_relpath(one.path), one.new, one.old, mode=mode))
    assert tool(copy, b"".join(back))
    for one in cases:
        assert _read(copy, one.path) == one.old, one
    shutil.rmtree(copy)


def _elsewhere(
    work: Path, cases: list[Case], diffs: dict[str, bytes], rng: random.Random
) -> Counter[str]:
    """Apply diffs to files that they were not made for: accepted only if the others accept."""
    found: Counter[str] = Counter()
    bases = {one.path: _base(rng, one.old or b"") for one in cases}
    accepted: dict[str, tuple[bool, bytes | None]] = {}
    for one in cases:
        (change,) = parser.parse(diffs[one.path])
        search = rng.random() < 0.5
        word = "searched" if search else "exact"
        try:
            applied = diff.apply(change, bases[one.path], search=search)
        except HunkError:
            found[f"another file refused, {word}"] += 1
            continue
        found[f"another file accepted, {word}"] += 1
        accepted[one.path] = search, applied.data
    text = b"".join(diffs[path] for path in accepted)
    for name, tool in TOOLS.items():
        copy = work / f"{name}-elsewhere"
        for one in cases:
            _write(copy, one.path, bases[one.path], one.old_mode)
        tool(copy, text)
        for path, (search, data) in accepted.items():
            if (copy / f"{path}.rej").exists():
                # A search is fp8ctl's own: it moves a hunk of an end of the file, too.
                assert search, (name, path, diffs[path], bases[path])
                found[f"moved where {name} would not"] += 1
                continue
            if search and name == "git" and _NO_NEWLINE in diffs[path]:
                # git 2.39 takes `x` at the end of a file for the beginning of a line `x\r\n`.
                found["moved, and git is no judge"] += 1
                continue
            found[f"moved where {name} moves it"] += search
            assert _read(copy, path) == data, (name, path, search, diffs[path], bases[path])
        shutil.rmtree(copy, ignore_errors=True)
    return found


def _base(rng: random.Random, data: bytes) -> bytes:
    """Return a neighbour of a file: edited elsewhere, or moved down."""
    if rng.random() < 0.4:
        return b"".join(random_trees.line(rng) + b"\n" for _ in range(rng.randrange(3))) + data
    return random_trees.edit(rng, data)


def _write(folder: Path, path: str, data: bytes | None, mode: int) -> None:
    if data is None:
        return
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)
    (folder / path).chmod(mode)


def _read(folder: Path, path: str) -> bytes | None:
    return (folder / path).read_bytes() if (folder / path).exists() else None
