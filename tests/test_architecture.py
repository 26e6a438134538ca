"""The import graph and what each kind of code may touch, read from the sources alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent

Kind = Literal["run", "late", "type"]
"""When an import happens: with the module, inside a function, for a type checker only."""


@dataclass(frozen=True)
class Import:
    """One imported module."""

    module: str
    kind: Kind
    line: int


# From the top to the ground; a module-level import goes to a lower layer, or stays in its own.
# `base` of engines, `plan` of patching and so on follow their package unless they are named.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo", "launching", "launchoptions"),
    ("supervisor",),
    # The bodies of commands.
    (
        *("bench", "check", "doctor", "history", "install", "planning", "pushing", "quantizing"),
        *("pushbench", "remedy", "server", "patching.commands"),
    ),
    ("settings",),
    # What they work with.
    (
        *("diagnosis", "engines", "environment", "findings", "gate", "host_rules", "installplan"),
        *("interpreter", "push"),
        *("logtail", "packager", "patching", "process", "registry", "rules", "worker"),
    ),
    (
        *("carriers", "checkpoint", "checksum", "difference", "expectation", "fitting"),
        *("fusing", "gguf", "hfconfig", "online", "quality", "reading", "requantised"),
        *("dtypes", "layout", "manifest", "sendable"),
        *("partial", "pipeline", "selection", "sizing", "snippets", "source", "stream", "survey"),
        *("course", "forms", "gathering", "ranks", "taker"),
    ),
    ("families", "formats", "kernels", "models", "policy", "wire"),
    ("deadline", "errors", "hardware", "held", "paths", "probe", "record", "render", "signals"),
)

# What runs in an engine's interpreter, or may: its workers import nothing else of ours.
IN_ENGINE = (
    *("engines.hooks", "kernels", "worker", "checkpoint", "checksum", "gguf", "layout", "manifest"),
    *("partial", "pipeline", "policy", "families", "formats", "models", "errors", "stream"),
    *("wire", "carriers", "push", "held", "source", "course", "forms", "ranks", "taker", "paths"),
    "gathering",
    *("difference", "dtypes", "expectation", "online", "quality", "requantised", "sendable"),
    "reading",
    "signals",
)
#: What `push` has besides itself.
IN_TRAINER = ("stream", "taker", "course", "forms", "gathering", "ranks")
WITH_TORCH = (
    *("checkpoint", "checksum", "difference", "dtypes", "expectation", "online", "pipeline"),
    *("quality", "reading", "requantised", "source"),
)
# What the worker's tasks are made of.
WORKERS = (*WITH_TORCH, "gguf", "layout")
ENGINE_PACKAGES = {"torch", "triton", "numpy"}
HEAVY = {"torch", "triton", "transformers", "vllm", "sglang", "safetensors", "numpy"}
LATE = {"rich", "httpx", "psutil", "packaging", "pynvml"}

REGISTRIES = ("pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org")


def modules() -> dict[str, Path]:
    """Return every module of fp8ctl by its name without `fp8ctl.`; packages are `` or `check`."""
    found = {}
    for folder, prefix in ((ROOT / "fp8ctl", ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if folder.name == "fp8ctl" and inside.parts[0] in {"kernels", "patches"}:
                continue  # links to the folders at the top
            name = prefix + ".".join(inside.with_suffix("").parts)
            found[re.sub(r"(^|\.)__init__$", "", name)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(tree: ast.AST, known: Mapping[str, object] = MODULES) -> list[Import]:
    """Return what a module imports; ours without `fp8ctl.`, a module where one is named."""
    found: list[Import] = []

    def visit(node: ast.AST, kind: Kind) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(short(a.name), kind, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                full = short(f"{base}.{alias.name}")
                ours = base.split(".")[0] == "fp8ctl" and full in known
                found.append(Import(full if ours else short(base), kind, node.lineno))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for guarded in node.body:
                visit(guarded, "type")
            for other in node.orelse:
                visit(other, kind)
        else:
            inner: Kind = kind
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = "late" if kind == "run" else kind
            for child in ast.iter_child_nodes(node):
                visit(child, inner)

    visit(tree, "run")
    return found


def short(name: str) -> str:
    return "" if name == "fp8ctl" else name.removeprefix("fp8ctl.")


GRAPH = {name: imports(tree) for name, tree in TREES.items()}


def of(name: str, *kinds: Kind) -> Iterator[Import]:
    return (one for one in GRAPH[name] if one.kind in kinds)


def ours(name: str, *kinds: Kind) -> Iterator[Import]:
    return (one for one in of(name, *kinds) if one.module in MODULES)


def belongs(name: str, group: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in group)


def layer(name: str) -> int:
    """Return the layer of a module: of the longest of its names that is in the table."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for number, members in enumerate(LAYERS):
            if ".".join(parts[:length]) in members:
                return number
    raise AssertionError(f"{name} is in no layer: give it a place in LAYERS and in docs/design.md")


def wrong_arrows(graph: Mapping[str, list[Import]]) -> list[str]:
    """Return every module-level import that goes up; the package itself has no place."""
    return [
        f"{name}:{one.line} imports {one.module}"
        for name, found in graph.items()
        if name
        for one in found
        if one.kind == "run" and one.module in graph and one.module
        if layer(one.module) < layer(name)
    ]


# --- arrows ---------------------------------------------------------------------------------------


def test_imports_point_down() -> None:
    assert not wrong_arrows(GRAPH)


def test_an_arrow_up_is_seen() -> None:
    up = {**GRAPH, "formats": imports(ast.parse("from fp8ctl import launching"))}
    assert wrong_arrows(up) == ["formats:1 imports launching"]


def test_every_name_in_the_table_of_layers_is_a_module() -> None:
    known = {name for name in MODULES if name} | {"kernels"}
    assert {name for members in LAYERS for name in members} <= known


def test_module_level_imports_form_no_cycle() -> None:
    graph = {name: {one.module for one in ours(name, "run")} - {""} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_a_late_import_goes_up_only_where_it_is_known() -> None:
    # Behind the function, the demo model is launch's default, and a patched environment's
    # live servers are the registry's to know.
    allowed = {("launching", "demo"), ("engines.base", "engines.sglang")}
    allowed |= {("engines.base", "engines.vllm"), ("patching.commands", "registry")}
    up = {
        (name, one.module)
        for name in MODULES
        if name
        for one in ours(name, "late")
        if one.module and layer(one.module) < layer(name)
    }
    assert up <= allowed


def test_the_package_itself_imports_nothing() -> None:
    for name in ("", "engines", "engines.hooks", "check", "patching", "carriers"):
        assert not GRAPH[name], name


def test_only_type_checkers_see_errors_and_paths_import_upwards() -> None:
    assert not list(ours("errors", "run", "late"))
    assert {one.module for one in ours("paths", "run", "late")} == {"errors"}
    assert not list(ours("render", "run", "late"))


# --- what a module may touch ----------------------------------------------------------------------


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_only_render_imports_rich() -> None:
    users = {
        name
        for name in MODULES
        for one in of(name, "run", "late", "type")
        if "rich" in one.module.split(".")[0:1]
    }
    assert users == {"render"}


def test_only_render_prints() -> None:
    # cli prints the version through typer; the worker's stdout is a protocol; hooks and the
    # entry of a script speak from inside another process. kernels.bench runs without us, too.
    streams = re.compile(r"print|sys\.(stdout|stderr)\.write|typer\.echo")
    found = {
        (name, call)
        for name, tree in TREES.items()
        for call, _ in calls(tree)
        if streams.fullmatch(call) and not belongs(name, ("engines.hooks", "worker"))
    }
    scripts = {("probe", "print"), ("probe", "sys.stdout.write")}
    scripts |= {("kernels.bench", "sys.stdout.write"), ("kernels.bench", "sys.stderr.write")}
    assert found <= {("cli", "typer.echo")} | scripts


MUTATING = re.compile(
    r"os\.(open|write|pwrite|unlink|remove|removedirs|rename|renames|replace|rmdir|mkdir|makedirs|"
    r"link|symlink|mkfifo|mknod|chmod|chown|lchown|fchmod|fchown|utime|truncate|ftruncate|fsync)"
    r"|shutil\.\w+|tempfile\.\w+|open|io\.open"
)
PATH_METHODS = {
    *("write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "chmod", "lchmod"),
    "rmdir",
}


def changes(tree: ast.AST) -> list[str]:
    """Return calls that change files: of os, shutil and tempfile, and pathlib's own methods."""
    return [
        f"{call} in line {line}"
        for call, line in calls(tree)
        if MUTATING.fullmatch(call) or call.rpartition(".")[2] in PATH_METHODS
    ]


def test_inside_patching_only_fsops_changes_files() -> None:
    for name, tree in TREES.items():
        if belongs(name, ("patching",)) and name != "patching.fsops":
            assert not changes(tree), name


def test_the_search_for_changes_finds_those_of_fsops() -> None:
    found = {one.split()[0] for one in changes(TREES["patching.fsops"])}
    assert {"os.open", "os.write", "os.rename", "os.unlink", "os.mkdir", "os.fsync"} <= found
    assert changes(ast.parse("Path(x).write_text('')"))


def test_pathlib_writes_nothing_inside_patching() -> None:
    # `Path.open` and friends; a Root opens its files by descriptor.
    for name, tree in TREES.items():
        if belongs(name, ("patching",)):
            opened = [
                c
                for c, _ in calls(tree)
                if c.endswith(".open") and c not in {"os.open", "self.calls.open"}
            ]
            assert not opened, name


def test_only_process_signals() -> None:
    signalling = re.compile(r"os\.(kill|killpg)|signal\.pidfd_send_signal")
    users = {
        name for name, tree in TREES.items() for c, _ in calls(tree) if signalling.fullmatch(c)
    }
    assert users <= {"process"}


def test_no_module_runs_a_shell() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"os.system", "os.popen"}, name
                shell = [k for k in node.keywords if k.arg == "shell"]
                assert not shell, f"{name}:{node.lineno}"


# --- the command process --------------------------------------------------------------------------


def command_modules() -> list[str]:
    elsewhere = ("engines.hooks", "kernels", "carriers")
    return [name for name in MODULES if not belongs(name, elsewhere)]


def in_trainer(name: str) -> bool:
    return name.startswith("push.") or name in IN_TRAINER


def test_no_command_module_imports_an_engine_or_torch() -> None:
    workers = {"worker", *WORKERS}
    for name in command_modules():
        kinds: tuple[Kind, ...] = ("run",) if name in workers else ("run", "late")
        heavy = {one.module.split(".")[0] for one in of(name, *kinds)} & HEAVY
        # `push` itself imports its modules when a trainer asks for one: tests/push.
        early = {"torch"} if name in WITH_TORCH or in_trainer(name) else set()
        assert heavy <= early, name


def test_the_workers_modules_are_imported_by_the_worker_alone() -> None:
    theirs = (*IN_TRAINER, "worker", "kernels", *WORKERS)
    for name in MODULES:
        if belongs(name, (*theirs, "engines.hooks")) or in_trainer(name):
            continue
        used = {one.module for one in ours(name, "run", "late")}
        assert not [m for m in used if belongs(m, theirs)], name


def test_what_only_some_commands_need_is_imported_in_functions() -> None:
    for name in MODULES:
        early = {one.module.split(".")[0] for one in of(name, "run")} & LATE
        assert not early, name


def test_cli_imports_at_its_top_nothing_but_typer() -> None:
    theirs = {one.module.split(".")[0] for one in of("cli", "run")} - sys.stdlib_module_names
    assert theirs == {"typer", ""}


def test_probe_is_a_script_of_the_standard_library_in_old_syntax() -> None:
    for one in of("probe", "run", "late", "type"):
        assert one.module.split(".")[0] in sys.stdlib_module_names, one
    ast.parse(MODULES["probe"].read_text(encoding="utf-8"), feature_version=(3, 8))


# --- inside an engine -----------------------------------------------------------------------------


def in_engine() -> list[str]:
    return [name for name in MODULES if belongs(name, IN_ENGINE)]


def test_there_is_code_that_runs_inside_engines() -> None:
    assert {"engines.hooks.gate", "kernels.reference", "worker"} <= set(in_engine())


@pytest.mark.parametrize("name", in_engine())
def test_what_runs_inside_an_engine_imports_only_what_is_there(name: str) -> None:
    for one in of(name, "run"):
        if one.module in MODULES:
            assert one.module == "" or belongs(one.module, IN_ENGINE), one
        else:
            top = one.module.split(".")[0]
            assert top in sys.stdlib_module_names or top in ENGINE_PACKAGES, one


@pytest.mark.parametrize("name", in_engine())
def test_a_late_import_inside_an_engine_is_the_engines_or_ours_of_the_same_kind(name: str) -> None:
    # huggingface_hub goes through importlib; all others are named.
    theirs = ENGINE_PACKAGES | {"vllm", "sglang", "safetensors", "transformers", "uvloop"}
    for one in of(name, "late"):
        if one.module in MODULES:
            assert belongs(one.module, IN_ENGINE), one
        else:
            top = one.module.split(".")[0]
            assert top in sys.stdlib_module_names or top in theirs, one


def test_what_runs_inside_an_engine_is_python_3_10() -> None:
    """By ruff: `ast.parse` takes some of what is newer, such as a star in an index."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "E9"]
    files = [str(MODULES[name]) for name in in_engine()]

    def refused(*argv: str, text: str = "") -> str:
        argv = (*ruff, "--target-version", "py310", *argv)
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr if done.returncode else ""

    assert len(files) > 20
    assert not refused(*files)
    assert "3.10" in refused("-", text="x[1, *y] = 2\n"), "it would be seen"


@pytest.mark.parametrize("name", in_engine())
def test_what_runs_inside_an_engine_takes_nothing_newer_from_the_standard_library(
    name: str,
) -> None:
    newer = {
        "tomllib": "3.11",
        "datetime.UTC": "3.11",
        "enum.StrEnum": "3.11",
        "typing.Self": "3.11",
        "typing.assert_never": "3.11",
        "typing.Never": "3.11",
        "typing.NotRequired": "3.11",
        "typing.override": "3.12",
        "contextlib.chdir": "3.11",
        "itertools.batched": "3.12",
        "hashlib.file_digest": "3.11",
        "asyncio.timeout": "3.11",
        "asyncio.TaskGroup": "3.11",
        "asyncio.Runner": "3.11",
    }
    source = MODULES[name].read_text(encoding="utf-8")
    used = {one.module for one in of(name, "run", "late")}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            used.add(ast.unparse(node))
        assert not isinstance(node, ast.TryStar), name
    assert not used & set(newer), name
    assert "ExceptionGroup" not in source


def test_the_engines_interpreter_can_import_what_runs_in_it_without_our_dependencies() -> None:
    """With typer, rich and the others blocked, as in an engine's environment."""
    blocked = sorted({"typer", "rich", "httpx", "psutil", "pynvml", "packaging"})
    names = [f"fp8ctl.{name}" for name in in_engine()]
    script = (
        "import sys, importlib\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


# --- the whole repository -------------------------------------------------------------------------


def texts() -> Iterator[tuple[Path, str]]:
    """Yield every text file of the project, once; none that git ignores."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for top in sorted(ROOT.iterdir()):
        hidden = top.name.startswith(".") and top.name != ".ci"
        if hidden or any(top.match(pattern.rstrip("/")) for pattern in ignored):
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".pyc":
                yield path, path.read_text(encoding="utf-8", errors="replace")


def test_no_file_names_a_registry() -> None:
    """Which index serves packages is the user's to say, in the settings of pip and uv."""
    seen = 0
    for path, text in texts():
        seen += 1
        for host in REGISTRIES:
            assert host not in text, f"{path.relative_to(ROOT)} names {host}"
    assert seen > 100


def test_no_source_has_a_todo() -> None:
    for path, text in texts():
        if path.suffix in {".py", ".md", ".toml"} and path != Path(__file__).resolve():
            assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path.relative_to(ROOT)


def test_every_module_says_what_it_is_for() -> None:
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), name or "fp8ctl"
