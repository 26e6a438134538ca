"""What a process says of the code that it runs: in interpreters of their own, on small files.

Each test states one way in which other code can come to run, and that it is told as that.
"""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

CORE = '''\
"""A module of an engine."""

import functools
import os.path
from os.path import join

LIMIT = 10


def answer():
    return 41


class Method:
    scale = 1.0

    def apply(self, x):
        return x * 2

    @staticmethod
    def name():
        return "block"

    @classmethod
    def make(cls):
        return cls()

    @property
    def width(self):
        return 8

    @functools.cached_property
    def height(self):
        return 4

    class Config:
        def read(self):
            return 1


class Base:
    def process(self):
        return "base"


class Derived(Base):
    pass
'''
FILES = ("fp8_pkg/__init__.py", "fp8_pkg/core.py", "fp8_pkg/sub/layer.py", "fp8_pkg/table.json")
_BEGIN = """\
import json, os, sys
from fp8ctl.engines.hooks import imports, loaded, ranklog

loaded.install()
"""
_END = """
sys.stdout.write(json.dumps(loaded._witness.report()))
"""


class Run:
    """A run folder and an engine's package, as `launch` leaves and finds them."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "run"
        self.folder.mkdir()
        self.root = tmp_path / "site"
        (self.root / "fp8_pkg" / "sub").mkdir(parents=True)
        for path in FILES:
            (self.root / path).write_text("")
        self.core = self.root / "fp8_pkg" / "core.py"
        self.core.write_text(CORE)
        self.launch()

    def launch(self, *absent: str) -> None:
        """Note the files as they are now."""
        files = {path: sha(self.root / path) for path in FILES} | dict.fromkeys(absent)
        expected = {"root": str(self.root), "patches": ["one"], "files": files}
        (self.folder / "code.json").write_text(json.dumps(expected))

    def python(
        self, script: str, *options: str, first: Path | None = None, environment: Any = None
    ) -> str:
        inherited = filter(None, [os.environ.get("PYTHONPATH")])
        places = [*([str(first)] if first else []), str(self.root), *inherited]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        own = {"PYTHONPATH": os.pathsep.join(places), "FP8CTL_RUN_DIR": str(self.folder)}
        done = subprocess.run(
            [sys.executable, *options, "-c", script],
            env={**clean, **own, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        return done.stdout

    def report(self, body: str, *options: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.python(_BEGIN + body + _END, *options, **more))
        found["by"] = {one["module"]: one for one in found["modules"]}
        return found

    def of_core(self, body: str, *options: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.report(body, *options, **more)["by"]["fp8_pkg.core"]
        return found


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_each_module_is_told_with_its_file_and_those_that_were_not_imported_as_that(
    run: Run,
) -> None:
    found = run.report("import fp8_pkg.core\n")
    assert {name: one["found"] for name, one in found["by"].items()} == {
        "fp8_pkg": "ok",
        "fp8_pkg.core": "ok",
        "fp8_pkg.sub.layer": "not imported",
    }
    core = found["by"]["fp8_pkg.core"]
    assert (core["file"], core["sha256"], core["wanted"]) == (
        str(run.core),
        sha(run.core),
        sha(run.core),
    )
    assert (found["rank"], found["role"]) == (None, "server")
    assert found["wrapped"] == []


@pytest.mark.parametrize("options", [(), ("-O",), ("-OO",)])
def test_code_from_good_bytecode_that_has_run_for_a_while_is_still_the_code_of_its_source(
    run: Run, options: tuple[str, ...]
) -> None:
    """The interpreter rewrites hot bytecode in place; the second process finds a .pyc."""
    body = "import fp8_pkg.core as c\nfor _ in range(5000): c.answer(), c.Method().apply(3)\n"
    for _ in range(2):
        assert run.of_core(body, *options)["found"] == "ok"
    assert list((run.core.parent / "__pycache__").glob("core.*.pyc")), "the control"


def stale(run: Run, mode: py_compile.PycInvalidationMode) -> None:
    """Leave the bytecode of another text of the same size and time beside the source."""
    times = (run.core.stat().st_atime_ns, run.core.stat().st_mtime_ns)
    run.core.write_text(CORE.replace("41", "42"))
    os.utime(run.core, ns=times)
    py_compile.compile(str(run.core), invalidation_mode=mode, doraise=True)
    run.core.write_text(CORE)
    os.utime(run.core, ns=times)


@pytest.mark.parametrize(
    ("mode", "runs", "found"),
    [
        (py_compile.PycInvalidationMode.UNCHECKED_HASH, "42", "stale bytecode"),
        (py_compile.PycInvalidationMode.TIMESTAMP, "42", "stale bytecode"),
        (py_compile.PycInvalidationMode.CHECKED_HASH, "41", "ok"),
    ],
)
def test_stale_bytecode_is_no_compile_of_a_source_that_is_as_it_should_be(
    run: Run, mode: py_compile.PycInvalidationMode, runs: str, found: str
) -> None:
    stale(run, mode)
    assert run.python("import fp8_pkg.core as c; print(c.answer())").strip() == runs, "the control"
    one = run.of_core("import fp8_pkg.core\n")
    assert (one["found"], one["sha256"]) == (found, one["wanted"])


def test_a_second_copy_in_front_of_the_path_is_told_by_its_file(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "fp8_pkg").mkdir(parents=True)
    (other / "fp8_pkg" / "__init__.py").write_text("")
    (other / "fp8_pkg" / "core.py").write_text(CORE + "\n")
    one = run.of_core("import fp8_pkg.core\n", first=other)
    assert one["found"] == "other file"
    assert one["file"] == str(other / "fp8_pkg" / "core.py")
    assert one["sha256"] == sha(other / "fp8_pkg" / "core.py")
    assert (one["wanted_file"], one["wanted"]) == (str(run.core), sha(run.core))


def test_a_copy_of_the_same_bytes_is_another_file_all_the_same(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "fp8_pkg").mkdir(parents=True)
    for name in ("__init__.py", "core.py"):
        (other / "fp8_pkg" / name).write_bytes((run.root / "fp8_pkg" / name).read_bytes())
    assert run.of_core("import fp8_pkg.core\n", first=other)["found"] == "other file"


def test_a_site_packages_that_is_reached_through_a_link_is_the_same_file(
    run: Run, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(run.root)
    assert run.of_core("import fp8_pkg.core\n", first=link)["found"] == "ok"


def test_bytecode_without_a_source_is_another_file(run: Run) -> None:
    py_compile.compile(str(run.core), cfile=str(run.core.with_suffix(".pyc")), doraise=True)
    run.core.unlink()
    one = run.of_core("import fp8_pkg.core\n")
    assert (one["found"], one["file"]) == ("other file", str(run.core.with_suffix(".pyc")))


def test_a_file_that_was_edited_before_the_import_is_told_with_both_hashes(run: Run) -> None:
    wanted = sha(run.core)
    run.core.write_text(CORE.replace("41", "99"))
    one = run.of_core("import fp8_pkg.core\n")
    assert (one["found"], one["wanted"], one["sha256"]) == ("other text", wanted, sha(run.core))


def test_a_file_that_was_edited_after_the_import_runs_as_it_was_and_is_told_as_changed(
    run: Run,
) -> None:
    body = (
        f"import fp8_pkg.core\nopen({str(run.core)!r}, 'a').write('LIMIT = 11')\n"
        "sys.stderr.write(json.dumps(loaded._witness.changed_on_disk()))\n"
    )
    assert run.of_core(body)["found"] == "ok"
    assert json.loads(run.stderr) == ["fp8_pkg/core.py"]
    assert run.of_core("import fp8_pkg.core\n")["found"] == "other text", "the control"


def test_a_file_that_the_launch_did_not_see_must_not_be_there(run: Run) -> None:
    run.launch("fp8_pkg/core.py")
    one = run.of_core("import fp8_pkg.core\n")
    assert (one["found"], one["wanted"]) == ("other text", None)


REPLACED = {
    "a function": ("c.answer = lambda: 0", "answer"),
    "a method": ("c.Method.apply = lambda self, x: x", "Method.apply"),
    "a static method": ("c.Method.name = staticmethod(lambda: 'x')", "Method.name"),
    "a property": ("c.Method.width = property(lambda self: 9)", "Method.width"),
    "a method of a nested class": ("c.Method.Config.read = lambda self: 2", "Method.Config.read"),
    "what a class would inherit": ("c.Derived.process = lambda self: 'x'", "Derived.process"),
    "a class": ("c.Base = type('Base', (), {})", "Base"),
    "a function of elsewhere": ("c.join = lambda *a: ''", "join"),
    "a method that is gone": ("del c.Method.apply", "Method.apply"),
    "the code of a function": ("c.answer.__code__ = (lambda: 0).__code__", "answer"),
    "the code of a method": (
        "c.Method.apply.__code__ = (lambda self, x: x).__code__",
        "Method.apply",
    ),
    "the code of a class method": (
        "c.Method.__dict__['make'].__func__.__code__ = (lambda cls: 0).__code__",
        "Method.make",
    ),
    "the code of a property": (
        "c.Method.width.fget.__code__ = (lambda self: 9).__code__",
        "Method.width",
    ),
    "the code of a cached property": (
        "c.Method.__dict__['height'].func.__code__ = (lambda self: 9).__code__",
        "Method.height",
    ),
    "a wrapper that calls the original": (
        "import functools; f = c.answer; c.answer = functools.wraps(f)(lambda: f())",
        "answer",
    ),
}


NO_CODE = ("c.LIMIT = 11", "c.Method.scale = 2.0", "c.Method().apply = None", "c.late = print")
_EACH = """
import fp8_pkg.core as c
for change in {changes!r}:
    child = os.fork()
    if not child:
        exec(change)
        [one] = [m for m in loaded._witness.report()["modules"] if m["module"] == "fp8_pkg.core"]
        os.write(1, json.dumps([change, one]).encode() + b"\\n")
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What is told after each change, made in a child of one process."""
    changes = [*(change for change, _ in REPLACED.values()), *NO_CODE]
    run = Run(tmp_path_factory.mktemp("changes"))
    lines = run.python(_BEGIN + _EACH.format(changes=changes)).splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("what", REPLACED)
def test_what_is_replaced_after_the_import_is_told_by_name(
    after: dict[str, dict[str, Any]], what: str
) -> None:
    change, name = REPLACED[what]
    assert (after[change]["found"], after[change].get("names")) == ("replaced", [name])


@pytest.mark.parametrize("change", NO_CODE)
def test_values_and_instances_are_not_code(after: dict[str, dict[str, Any]], change: str) -> None:
    assert after[change]["found"] == "ok"


_HOOK = """
def wrap(module):
    inner = module.Method.apply
    module.Method.apply = lambda self, x: inner(self, x)
imports.after_import("fp8_pkg.core", wrap)
"""


@pytest.mark.parametrize("late", [False, True])
def test_what_fp8ctl_wraps_itself_is_known_by_name_and_may_not_be_replaced_either(
    run: Run, *, late: bool
) -> None:
    load = "import fp8_pkg.core as c\n"
    body = load + _HOOK if late else _HOOK + load
    found = run.report(body)
    assert found["by"]["fp8_pkg.core"]["found"] == "ok"
    assert found["wrapped"] == ["fp8_pkg.core:Method.apply"]
    one = run.of_core(body + "c.Method.apply = lambda self, x: x\n")
    assert (one["found"], one["names"]) == ("replaced", ["Method.apply"])
    one = run.of_core(body + "c.answer = lambda: 0\n")
    assert (one["found"], one["names"]) == ("replaced", ["answer"])


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_takes_no_change_of_somebody_else_for_its_own(run: Run, *, late: bool) -> None:
    theirs = "c.answer = lambda: 0\n"
    body = f"import fp8_pkg.core as c\n{theirs if late else ''}{_HOOK}{'' if late else theirs}"
    assert run.of_core(body).get("names") == ["answer"]


def test_what_the_engine_replaces_by_its_own_is_told_and_no_fault(run: Run) -> None:
    """SGLang gives a method of compressed-tensors another body where vLLM is there."""
    (run.root / "fp8_pkg" / "late.py").write_text(
        "from fp8_pkg import core\n"
        "def patch():\n"
        "    core.Method.apply = lambda self, x: x\n"
        "    core.Derived.process = lambda self: 'x'\n"
    )
    one = run.of_core("import fp8_pkg.late as l\nl.patch()\n")
    assert (one["found"], one["by_engine"]) == ("ok", ["Derived.process", "Method.apply"])
    one = run.of_core("import fp8_pkg.late as l\nl.patch()\nl.core.answer = lambda: 0\n")
    assert (one["found"], one["names"]) == ("replaced", ["answer"])


def test_an_import_that_is_still_on_its_way_is_not_imported_yet(run: Run) -> None:
    run.core.write_text("import sys; seen = sys.modules['__main__'].now()\n" + CORE)
    run.launch()
    body = (
        "PATH = 'fp8_pkg/core.py'\ndef now():\n"
        "    [one] = [m for m in loaded._witness.report()['modules'] if m['path'] == PATH]\n"
        "    sys.stderr.write(one['found'])\n"
        "import fp8_pkg.core\n"
    )
    assert run.of_core(body)["found"] == "ok"
    assert run.stderr == "not imported"


@pytest.mark.parametrize(
    "body",
    [
        "import types; sys.modules['fp8_pkg.core'] = c = types.ModuleType('c')\n"
        "c.__file__ = sys.argv[0]\n",
        "import fp8_pkg.core, types\n"
        "sys.modules['fp8_pkg.core'] = types.ModuleType('fp8_pkg.core')\n"
        "sys.modules['fp8_pkg.core'].__file__ = fp8_pkg.core.__file__\n",
    ],
)
def test_a_module_that_somebody_put_there_is_never_ok(run: Run, body: str) -> None:
    assert run.of_core(body)["found"] in {"other file", "unseen"}


def test_a_module_that_was_there_before_the_hook_is_not_taken_for_proven(run: Run) -> None:
    script = "import fp8_pkg.core\n" + _BEGIN + _END
    [one] = [m for m in json.loads(run.python(script))["modules"] if m["path"] == FILES[1]]
    assert (one["found"], one["file"]) == ("unseen", str(run.core))


def test_a_module_that_was_imported_past_the_hook_is_not_taken_for_proven(run: Run) -> None:
    body = (
        "import importlib.machinery as m\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path, target=None):\n"
        "        return m.PathFinder.find_spec(name, path)\n"
        "sys.meta_path.insert(0, Finder)\nimport fp8_pkg.core\n"
    )
    assert run.of_core(body)["found"] == "unseen"


def test_a_loader_that_changes_the_code_on_its_way_is_found_out(run: Run) -> None:
    """As tools do that instrument what is imported."""
    body = (
        "import importlib.machinery as m\n"
        "class Loader(m.SourceFileLoader):\n"
        "    def source_to_code(self, data, path):\n"
        "        return compile(bytes(data).replace(b'41', b'43'), path, 'exec')\n"
        "sys.dont_write_bytecode = True\n"
        "sys.path_hooks.insert(0, m.FileFinder.path_hook((Loader, ['.py'])))\n"
        "sys.path_importer_cache.clear()\n"
        "import fp8_pkg.core\nassert fp8_pkg.core.answer() == 43\n"
    )
    assert run.of_core(body)["found"] == "stale bytecode"


def test_a_module_that_is_reloaded_is_the_text_that_ran_last(run: Run) -> None:
    body = (
        "import fp8_pkg.core as c, importlib\n"
        f"open({str(run.core)!r}, 'a').write('LIMIT = 11')\n"
        "importlib.reload(c)\n"
    )
    assert run.of_core(body)["found"] == "other text"


def test_a_module_that_fails_is_not_imported_and_fails_as_ever(run: Run) -> None:
    run.core.write_text("raise ImportError('no such kernel')\n")
    run.launch()
    body = "try:\n    import fp8_pkg.core\nexcept ImportError as e:\n    assert e.msg[:2] == 'no'\n"
    assert run.of_core(body)["found"] == "not imported"


def test_a_module_whose_reload_broke_off_is_not_taken_for_proven(run: Run) -> None:
    """It is there, half of one text and half of another."""
    body = (
        "import fp8_pkg.core as c, importlib\n"
        f"open({str(run.core)!r}, 'a').write('raise OSError')\n"
        "try:\n    importlib.reload(c)\nexcept OSError:\n    pass\n"
    )
    assert run.of_core(body)["found"] == "unseen"


def test_who_asks_a_loader_for_code_does_not_change_what_was_seen(run: Run) -> None:
    """As `python -m`, pkgutil and profilers do."""
    body = (
        "import fp8_pkg.core as c\n"
        f"open({str(run.core)!r}, 'a').write('LIMIT = 11')\n"
        "c.__loader__.get_code('fp8_pkg.core')\n"
    )
    assert run.of_core(body)["found"] == "ok"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"root": 3}', '{"root": "/", "files": 3}'])
def test_a_run_folder_that_cannot_be_read_ends_no_server(run: Run, text: str) -> None:
    (run.folder / "code.json").write_text(text)
    script = "import fp8_pkg.core\nprint(fp8_pkg.core.answer(), list(loaded.everyone(1)))"
    assert run.python(_BEGIN + script) == "41 ['error']\n"
    assert "this process cannot show its code: " in run.stderr


def test_a_server_that_could_not_open_its_socket_says_so(run: Run) -> None:
    (run.folder / "code").write_text("in the way")
    script = "print(json.dumps(loaded.everyone(1)))"
    answer = json.loads(run.python(_BEGIN + script))
    assert (answer["processes"], len(answer["silent"])) == ([], 1)
    assert "does not listen" in answer["silent"][0]["why"]


def test_without_a_run_folder_nothing_is_watched_and_nothing_claimed(run: Run) -> None:
    (run.folder / "code.json").unlink()
    script = "import fp8_pkg.core\nprint(json.dumps([loaded.everyone(1), len(imports._watchers)]))"
    answer, watched = json.loads(run.python(_BEGIN + script))
    assert (set(answer), watched) == ({"why"}, 0)
    assert not (run.folder / "code").exists()


# --- the processes of a server ------------------------------------------------------------------

_SERVER = """\
import json, multiprocessing, os, signal, sys, time
from pathlib import Path

from fp8ctl.engines.hooks import loaded, ranklog

loaded.install()


def run_worker_process(rank, ready):
    if rank is not None:
        ranklog.rank = rank
    import fp8_pkg.core
    ready.set()
    time.sleep(60)


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    children, events = [], []
    for rank in (0, 1, None):
        events.append(context.Event())
        child = context.Process(target=run_worker_process, args=(rank, events[-1]), daemon=True)
        child.start()
        children.append(child)
    assert all(event.wait(30) for event in events)
    first = loaded.everyone(2)
    children[0].kill()
    children[0].join()
    os.kill(children[1].pid, signal.SIGSTOP)
    loaded.ANSWER_WITHIN = 3.0
    second = loaded.everyone(2)
    children[1].kill()
    print(json.dumps([first, second, [child.pid for child in children]]))
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_every_process_of_a_server_answers_and_those_that_cannot_are_told(
    run: Run, tmp_path: Path, method: str
) -> None:
    """With a run folder whose path is longer than the address of a socket may be."""
    longer = tmp_path / ("x" * 120)
    run.folder.rename(longer)
    run.folder = longer
    entry = run.root / "fp8_entry.py"
    entry.write_text(_SERVER)
    script = f"import runpy, sys; sys.argv[1:] = [{method!r}]; runpy.run_module('fp8_entry', "
    script += "run_name='__main__', alter_sys=True)"
    first, second, pids = json.loads(run.python(script))
    told = {one["pid"]: one for one in first["processes"]}
    assert [(told[pid]["rank"], told[pid]["role"]) for pid in pids[:2]] == [
        (0, "worker"),
        (1, "worker"),
    ]
    assert {one["rank"] for one in first["processes"]} == {0, 1, None}
    assert len(told) == 4, "the server, two workers and a process without a rank"
    for pid in pids:
        found = {one["module"]: one["found"] for one in told[pid]["modules"]}
        assert found["fp8_pkg.core"] == "ok"
    assert (first["ranks"], first["patches"], first["silent"]) == (2, ["one"], [])
    # One was killed, one does not answer.
    assert {one["pid"] for one in second["processes"]} == set(told) - set(pids[:2])
    [silent] = second["silent"]
    assert silent["pid"] == pids[1]
    assert "timed out" in silent["why"]
