"""Which code a server runs: what its processes say as evidence, and real workers end to end."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import process, registry, server, supervisor
from fp8ctl.check import code, levels
from fp8ctl.check.verdict import Evidence, LevelReport
from fp8ctl.errors import CheckFailedError
from fp8ctl.process import free_port
from fp8ctl.render import Reporter
from fp8ctl.supervisor import About, RunFiles, Watch, serve
from tests.starts import plan_of

if TYPE_CHECKING:
    from collections.abc import Iterator

OLD, NEW = "a" * 64, "b" * 64
FILE = "/site/engine/fp8.py"


def module(found: str = "ok", name: str = "engine.fp8", **more: object) -> dict[str, object]:
    about: dict[str, object] = {"module": name, "path": "engine/fp8.py", "wanted": OLD}
    if found != "not imported":
        about |= {"file": FILE, "sha256": OLD, "wanted_file": FILE}
    return {**about, "found": found, **more}


def worker(rank: int | None, *modules: dict[str, object], **more: object) -> dict[str, object]:
    role = "server" if rank is None else "scheduler"
    about: dict[str, object] = {"pid": 10 + (rank or 0), "rank": rank, "role": role}
    return {**about, "wrapped": [], "cost_ms": 1.0, "modules": list(modules), **more}


def answer(*processes: dict[str, object], **more: object) -> dict[str, object]:
    ranks = sum(one["rank"] is not None for one in processes)
    plain: dict[str, object] = {
        "root": "/site",
        "patches": ["refit"],
        "changed_on_disk": [],
        "silent": [],
    }
    return {"ranks": ranks, "processes": list(processes), **plain, **more}


# --- judge --------------------------------------------------------------------------------------


def test_workers_come_first_and_what_was_not_imported_is_no_part_of_what_is_ok() -> None:
    absent = module("not imported", "engine.moe")
    found = code.judge(
        answer(worker(None, absent, module()), worker(1, module(), absent), worker(0, module()))
    )
    assert found.evidence == (
        Evidence("code, rank 0", "ok", "1 file as launched"),
        Evidence("code, rank 1", "ok", "1 file as launched, 1 not imported"),
        Evidence("code, server", "ok", "1 file as launched, 1 not imported"),
    )
    assert (found.result, found.message) == ("ok", "1 file in 2 workers (patches: refit)")
    data: Any = found.to_json()
    assert data["result"] == "ok"
    second = data["processes"][1]
    assert (second["rank"], second["files"], second["not_imported"]) == (1, 1, ["engine.moe"])
    json.dumps(data)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "other file": (
        {"file": "/mine/fp8.py", "sha256": NEW},
        f"engine.fp8 is /mine/fp8.py (sha256 {NEW[:12]}), launched with {FILE} (sha256 {OLD[:12]})",
    ),
    "other text": (
        {"sha256": NEW},
        f"{FILE} was sha256 {NEW[:12]}, launched with sha256 {OLD[:12]}",
    ),
    "stale bytecode": (
        {},
        f"{FILE}: the code that runs is not a compile of it (stale bytecode)",
    ),
    "replaced": (
        {"names": ["A.apply", "f", "g", "h"]},
        f"{FILE}: replaced since it was imported: A.apply, f, g and others",
    ),
    "unseen": ({}, f"{FILE} was imported past fp8ctl's hook"),
    "a word of a later version": ({}, FILE),
}


@pytest.mark.parametrize("found", FAULTS)
def test_one_module_that_is_not_ok_fails_its_process_and_all(found: str) -> None:
    more, said = FAULTS[found]
    good = module(name="engine.other")
    seen = code.judge(answer(worker(0, good), worker(1, good, module(found, **more))))
    assert [one.result for one in seen.processes] == ["ok", "failed"]
    assert said in seen.processes[1].told
    assert seen.result == "failed"
    assert seen.message.startswith("rank 1: ")
    data: Any = seen.to_json()
    [told] = data["processes"][1]["faults"]
    assert (told["module"], told["found"]) == ("engine.fp8", found)


def test_a_file_that_should_not_be_there_is_told_without_a_hash() -> None:
    seen = code.judge(answer(worker(0, module("other text", wanted=None, sha256=NEW))))
    assert seen.processes[0].told.endswith("launched with no such file")


def test_a_fault_in_the_server_or_a_helper_counts_as_well() -> None:
    bad = worker(None, module("replaced", names=["f"]))
    assert code.judge(answer(worker(0, module()), bad)).result == "failed"


def test_a_worker_that_says_nothing_fails() -> None:
    seen = code.judge(answer(worker(0, module()), ranks=2))
    assert seen.result == "failed"
    told = "no process of this rank shows its code"
    assert seen.evidence[1] == Evidence("code, rank 1", "failed", told)
    seen = code.judge(answer(worker(0, module()), silent=[{"pid": 7, "why": "timed out"}]))
    assert seen.result == "failed"
    assert seen.evidence[1] == Evidence("code, process 7", "failed", "silent: timed out")


def test_patches_are_in_force_where_every_worker_runs_them_and_only_there() -> None:
    absent, bad = module("not imported"), module("replaced", names=["f"])
    for workers, told in (
        ([worker(0, module())], Evidence("patches", "ok", "refit; in force in 1 worker")),
        (
            [worker(0, module()), worker(1, module())],
            Evidence("patches", "ok", "refit; in force in all 2 workers"),
        ),
        (
            [worker(0, module()), worker(1, bad)],
            Evidence(
                "patches", "failed", "refit; not proven in rank 1", "in force in every worker"
            ),
        ),
        (
            [worker(0, module()), worker(1, absent)],
            Evidence("patches", "not visible", "not every worker shows its code"),
        ),
    ):
        assert code.judge(answer(*workers)).in_force == told
    assert code.judge(None).in_force.result == "not visible"


def test_a_server_that_is_made_to_tell_and_cannot_fails() -> None:
    seen = code.judge({"error": "HTTP 500: OSError"})
    assert seen.evidence == (Evidence("code, server", "failed", "HTTP 500: OSError"),)
    assert seen.result == "failed"


def test_a_process_that_imported_nothing_proves_nothing() -> None:
    absent = module("not imported")
    seen = code.judge(answer(worker(0, absent), worker(None, module())))
    assert [one.result for one in seen.processes] == ["not visible", "ok"]
    assert seen.result == "not visible"
    # A helper need not import the patched files; a worker must.
    assert code.judge(answer(worker(0, module()), worker(None, absent))).result == "ok"
    assert code.judge(answer(ranks=0)).result == "not visible"


@pytest.mark.parametrize(
    "given",
    [None, "text", [], {}, {"why": "there is no code.json"}, {"processes": [{}], "silent": []}],
)
def test_what_is_no_answer_is_not_visible_and_never_ok(given: object) -> None:
    seen = code.judge(given)
    assert seen.result == "not visible"
    [one] = seen.evidence
    assert (one.check, one.result) == ("code", "not visible")
    assert one.found


def test_files_that_changed_under_the_server_are_a_warning_that_says_what_to_do() -> None:
    seen = code.judge(answer(worker(0, module()), changed_on_disk=["a.py", "b.py", "c.py", "d.py"]))
    assert seen.result == "ok", "it runs what it was launched with"
    told = code.changed(seen.to_json())
    assert told.startswith("a.py, b.py, c.py and others changed on disk since the launch")
    assert "runs the older state; stop and launch it again to take effect" in told
    assert code.changed(code.judge(answer(worker(0, module()))).to_json()) == ""
    assert code.changed(None) == ""


def test_other_code_is_the_fault_that_is_named_whatever_else_is_wrong() -> None:
    evidence = (
        Evidence("state", "failed", "unpushed", "ready"),
        Evidence("code, rank 0", "failed", "x"),
    )
    found = LevelReport("live", "failed", "unpushed", evidence, {}, {"result": "failed"})
    assert found.fault == evidence[1]
    assert replace(found, code={"result": "ok"}).fault == evidence[0]


# --- real processes -----------------------------------------------------------------------------

ENGINE = Path(__file__).parents[1] / "code_engine.py"
ABOUT = About(engine="fake 0", source="/models/tiny", mode="block", site_packages="/nowhere")
SOURCE = "def scale():\n    return 1\n"


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(process, "GRACE_ALL", 0.3)
    monkeypatch.setattr(process.stop_tree, "__kwdefaults__", {"grace": 0.6})
    monkeypatch.setattr(supervisor, "_ASK_EVERY", 0.1)
    monkeypatch.setenv("FP8CTL_TESTER", str(os.getpid()))
    yield
    for record, _ in server.running(ask_state=False)[0]:
        server.stop(record)


class Engine:
    """A package, its hashes as `launch` takes them, and servers that import it."""

    def __init__(self, tmp_path: Path) -> None:
        self.site = tmp_path / "site"
        self.shadow = tmp_path / "shadow"
        for folder in (self.site, self.shadow):
            (folder / "engine").mkdir(parents=True)
            (folder / "engine" / "__init__.py").write_text("")
            (folder / "engine" / "fp8.py").write_text(SOURCE)
        self.file = self.site / "engine" / "fp8.py"

    def serve(
        self,
        *fake: str,
        shadow: str = "-",
        sabotage: str = "",
        check: levels.Level | None = "live",
        await_push: bool = False,
    ) -> tuple[dict[str, Any], str]:
        port = free_port("127.0.0.1")
        folder = registry.servers_dir() / f"sglang-{port}"
        path = os.pathsep.join([str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])])
        fake = ("--port", str(port), "--quantization", "fp8", *fake)
        argv = ("engine.fp8", shadow, sabotage, "--", *fake)
        plan = plan_of(folder, port, *argv, script=ENGINE, await_push=await_push, PYTHONPATH=path)
        names = ("engine/__init__.py", "engine/fp8.py")
        files = {name: sha(self.site / name) for name in names}
        expected = json.dumps({"root": str(self.site), "patches": ["refit"], "files": files})
        out = io.StringIO()
        report = Reporter(out=out, err=io.StringIO())
        watch = Watch(detach=True, timeout=60, check=check)
        return serve(report, plan, ABOUT, watch, RunFiles(code=expected)), out.getvalue()


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


def check(*argv: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "fp8ctl", "check", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    document = json.loads(done.stdout) if "--json" in argv else {}
    return done.returncode, document, done.stderr


def test_workers_that_import_what_was_launched_are_ok_also_when_it_changes_later(
    engine: Engine,
) -> None:
    data, _ = engine.serve(check=None)
    exit_code, document, _ = check(data["url"], "--json")
    found = document["data"]["code"]
    assert (exit_code, found["result"], found["changed_on_disk"]) == (0, "ok", [])
    assert found["message"] == "2 files in 2 workers (patches: refit)"
    told = {one["process"]: (one["result"], one["files"]) for one in found["processes"]}
    assert told == {"rank 0": ("ok", 2), "rank 1": ("ok", 2), "server": ("not visible", 0)}
    # Somebody patches or reverts under it.
    engine.file.write_text(SOURCE.replace("1", "2"))
    exit_code, _, err = check(data["url"])
    assert exit_code == 0
    assert re.search(r"warning: engine/fp8.py changed on disk .* the older state; stop and", err)
    # Ended, its sockets are gone with it.
    server.stop(registry.find(data["name"]))
    assert not (registry.ended_dir() / data["name"] / "code").exists()
    assert (registry.ended_dir() / data["name"] / "code.json").exists(), "the control"


def test_a_worker_that_imports_another_file_fails_the_check_which_names_it(engine: Engine) -> None:
    other = engine.shadow / "engine" / "fp8.py"
    other.write_text(SOURCE.replace("1", "2"))
    data, _ = engine.serve(shadow=str(engine.shadow), check=None)
    exit_code, document, _ = check(data["url"], "--level", "weights", "--json")
    assert (exit_code, document["error"]["id"]) == (8, "FP8-CHECK-FAILED")
    message = document["error"]["message"]
    assert message.startswith(f"{data['url']} is running other code: code, rank 1: engine is")
    for text in (str(other.parent), str(engine.file.parent)):
        assert text in message
    found = document["error"]["data"]
    assert found["weights"]["result"] == "not visible", "it was not looked at"
    [one] = [p for p in found["code"]["processes"] if p["result"] == "failed"]
    assert one["rank"] == 1
    fault = next(f for f in one["faults"] if f["module"] == "engine.fp8")
    assert (fault["found"], fault["file"]) == ("other file", str(other))
    assert (fault["sha256"], fault["wanted"]) == (sha(other), sha(engine.file))


@pytest.mark.parametrize("state", ["ready", "unpushed"])
def test_launch_ends_with_the_same_check_and_leaves_no_such_server(
    engine: Engine, state: str
) -> None:
    """Also where it waits for its weights, which is no fault of its own."""
    push = state == "unpushed"
    with pytest.raises(CheckFailedError, match="is running other code: code, rank 1") as caught:
        engine.serve("--state", state, sabotage="module.scale = lambda: 2", await_push=push)
    told = r"engine/fp8\.py: replaced since it was imported: scale$"
    assert re.search(told, caught.value.message)
    assert not server.running(ask_state=False)[0]
    # The control: without the change it is launched.
    data, out = engine.serve("--state", state, await_push=push)
    assert data["check"]["code"]["result"] == "ok"
    assert "code: ok, 2 files in 2 workers (patches: refit)" in out
