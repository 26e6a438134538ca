"""Which code this process runs for the files that fp8ctl patches.

`launch` leaves code.json in the run folder: the hash of each of those files as
it was at the start. Every process of the engine, workers and helpers alike,
remembers how it imported them: from which file, from which text, and the code
object that was executed. Asked through a socket in the run folder, it says of
each module whether all that is what `launch` saw, whether the executed code is
a compile of that text (bytecode can be stale), and whether a function or class
in the module has been replaced since.

Not seen: objects that are changed without a change of their class or module
(an instance's own method), constants, and code that was compiled from these
functions by torch or Triton.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks import imports, ranklog

if TYPE_CHECKING:
    import importlib.abc
    from collections.abc import Iterator
    from types import ModuleType

EXPECTED = "code.json"
FOLDER = "code"
#: Seconds for one process to answer: it may hold the interpreter's lock for a while.
ANSWER_WITHIN = 30.0

#: Name in a module, `function` or `Class.method`, to the objects that are compared by identity.
Bindings = dict[str, tuple[object, ...]]


@dataclass
class _Import:
    """How one module was imported.

    Attributes:
        module: the module.
        file: as its loader names it.
        source: content of that file when the module was executed, None where it cannot be read.
        code: what was executed, None where the loader has no such thing.
        bindings: functions and classes after that; None where they could not be listed.
        running: it is being executed.
        wrapped: names that hooks of fp8ctl have wrapped.
        genuine: whether `code` is a compile of `source`; None until somebody asks.
    """

    module: ModuleType
    file: str
    source: bytes | None = None
    code: CodeType | None = None
    bindings: Bindings | None = None
    running: bool = True
    wrapped: set[str] = field(default_factory=set)
    genuine: bool | None = None


class Witness:
    """Remembers how the modules of some files are imported, and compares on request.

    Args:
        expected: of code.json: `root`, and `files`: path below it to SHA-256, None for a
            file that is not there.
    """

    def __init__(self, expected: dict[str, Any]) -> None:
        self.expected = expected
        self.root = Path(expected["root"])
        self.files: dict[str, str | None] = expected["files"]
        self.paths = {_module(path): path for path in self.files if path.endswith(".py")}
        self.seconds = 0.0  # of this thread's time that the looking on has cost
        self._imports: dict[str, _Import] = {}

    @contextlib.contextmanager
    def executing(self, module: ModuleType, loader: importlib.abc.Loader) -> Iterator[None]:
        """Remember what `loader` executes as `module`."""
        one = _Import(module, getattr(module, "__file__", None) or "")
        self._imports[module.__name__] = one
        get_code: Any = getattr(loader, "get_code", None)

        def recorded(name: str) -> CodeType | None:
            with self._timed(), contextlib.suppress(Exception):  # it has no source to show
                one.file = loader.get_filename(name)  # type: ignore[attr-defined]
                one.source = loader.get_data(one.file)  # type: ignore[attr-defined]
            one.code = get_code(name)
            return one.code

        # On the one instance, and for as long as it executes: the loader stays what it is.
        mine: Any = loader
        with contextlib.suppress(AttributeError):
            mine.get_code = recorded
        try:
            yield
        except BaseException:
            self._imports.pop(module.__name__, None)
            raise
        finally:
            with contextlib.suppress(AttributeError):
                del mine.get_code
        with self._timed(), contextlib.suppress(Exception):
            one.bindings = bindings(module)
        one.running = False

    @contextlib.contextmanager
    def wrapping(self, module: ModuleType) -> Iterator[None]:
        """Take what happens inside for fp8ctl's own work, and remember the names."""
        one = self._imports.get(module.__name__)
        before: Bindings = {}
        with self._timed(), contextlib.suppress(Exception):
            before = bindings(module)
        yield
        if one is None or one.bindings is None:
            return
        with self._timed(), contextlib.suppress(Exception):
            after = bindings(module)
            for name in differences(before, after):
                one.wrapped.add(name)
                one.bindings.pop(name, None)
                one.bindings.update({name: after[name]} if name in after else {})

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.thread_time()
        yield
        self.seconds += time.thread_time() - started

    def report(self) -> dict[str, object]:
        """Say what this process runs; modules in the order of their files."""
        return {
            "pid": os.getpid(),
            "rank": ranklog.rank,
            "role": _role(),
            "cost_ms": round(1000 * self.seconds, 3),
            "wrapped": sorted(
                f"{name}:{function}"
                for name, one in list(self._imports.items())
                for function in one.wrapped
            ),
            "modules": [self._describe(name, path) for name, path in self.paths.items()],
        }

    def changed_on_disk(self) -> list[str]:
        """Return the files that are not what they were when the server was started."""
        return [path for path, sha in self.files.items() if _sha_of(self.root / path) != sha]

    def _describe(self, name: str, path: str) -> dict[str, object]:
        module = sys.modules.get(name)
        about: dict[str, object] = {"module": name, "path": path, "wanted": self.files[path]}
        if module is None:
            return {**about, "found": "not imported"}
        one = self._imports.get(name)
        if one is not None and one.module is not module:
            one = None  # somebody put another one in its place
        file = os.path.realpath(one.file if one else getattr(module, "__file__", None) or "?")
        source = one.source if one else None
        sha = _sha_of(Path(file)) if source is None else hashlib.sha256(source).hexdigest()
        about |= {"file": file, "sha256": sha, "wanted_file": str(self.root / path)}
        if file != os.path.realpath(self.root / path):
            return {**about, "found": "other file"}
        if one is not None and one.running:
            return {**about, "found": "not imported"}  # not yet
        if one is None or one.source is None or one.code is None or one.bindings is None:
            return {**about, "found": "unseen"}
        if sha != self.files[path]:
            return {**about, "found": "other text"}
        if not _genuine(one):
            return {**about, "found": "stale bytecode"}
        after = bindings(module)
        names = differences(one.bindings, after)
        theirs = [name for name in names if self._is_engines(after.get(name, ()), path)]
        if len(names) > len(theirs):
            names = [name for name in names if name not in theirs]
            return {**about, "found": "replaced", "names": names}
        return {**about, "found": "ok", "by_engine": theirs}

    def _is_engines(self, parts: tuple[object, ...], path: str) -> bool:
        """Say whether what is there now is a function of the engine's own package.

        SGLang, where vLLM is installed too, replaces methods of its own quantisation.
        """
        package = os.path.realpath(self.root / path.split("/")[0]) + os.sep
        codes = [part for part in parts if isinstance(part, CodeType)]
        files = [os.path.realpath(code.co_filename) for code in codes]
        return bool(files) and all(file.startswith(package) for file in files)


def bindings(module: ModuleType) -> Bindings:
    """Return the functions and classes of a module, and what its own classes define."""
    found: Bindings = {}
    for name, value in list(vars(module).items()):
        if callable(value):
            found[name] = _parts(value)
            if issubclass(type(value), type) and value.__module__ == module.__name__:
                _members(name, value, module.__name__, found, {value})
    return found


def differences(before: Bindings, after: Bindings) -> list[str]:
    """Return the names that are bound to something else, or to nothing, or new in a class."""

    def same(name: str) -> bool:
        a, b = before.get(name), after.get(name)
        if a is None:  # a module may define a function late; a class that gains one is changed
            return "." not in name
        return b is not None and len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))

    names = {name for name in {**before, **after} if not same(name)}
    # Of a class that is another one, the class says it all.
    return sorted(name for name in names if not any(name.startswith(f"{n}.") for n in names))


def _members(prefix: str, cls: type, module: str, found: Bindings, seen: set[type]) -> None:
    for name, value in list(vars(cls).items()):
        if not callable(value) and not hasattr(type(value), "__get__"):
            continue
        found[f"{prefix}.{name}"] = _parts(value)
        inner = issubclass(type(value), type) and value.__module__ == module
        if inner and value not in seen:
            _members(f"{prefix}.{name}", value, module, found, {*seen, value})


def _parts(value: Any) -> tuple[object, ...]:
    """Return a function and its code, or whatever else stands for one and theirs.

    Looks at known types only: an attribute of an unknown one may do anything, and even
    `isinstance` asks a lazy one for its class.
    """
    kind = type(value)
    if issubclass(kind, (staticmethod, classmethod)):
        return (value, *_parts(value.__func__))
    if issubclass(kind, property):
        inner = (f for f in (value.fget, value.fset, value.fdel) if f is not None)
        return (value, *(part for function in inner for part in _parts(function)))
    if issubclass(kind, functools.cached_property):
        return (value, *_parts(value.func))
    if kind is FunctionType:
        return (value, value.__code__)
    return (value,)


def _genuine(one: _Import) -> bool:
    """Say whether the executed code is a compile of the text; code compares by content."""
    if one.genuine is None and one.source is not None and one.code is not None:
        try:
            again = compile(one.source, one.code.co_filename, "exec", dont_inherit=True)
            one.genuine = again == one.code
        except (SyntaxError, ValueError):
            one.genuine = False
    return bool(one.genuine)


def _module(path: str) -> str:
    parts = path[: -len(".py")].split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sha_of(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _role() -> str:
    """Return what this process does, in a word: `server`, or after what it was started with."""
    current = multiprocessing.current_process()
    if multiprocessing.parent_process() is None:
        return "server"
    target = getattr(current, "_target", None)
    name: str = getattr(target, "__name__", "")
    name = name[len("run_") :] if name.startswith("run_") else name
    return name.replace("_process", "") or current.name


# --- in every process ----------------------------------------------------------------------------


_witness: Witness | None = None
_listening: socket.socket | None = None


def install() -> None:
    """Watch the imports of this process and answer for them; nothing without code.json.

    Called when our entry module is imported: in the server, and again in every
    spawned child. What is wrong here is told on stderr and by `check`: it must
    never end a server.
    """
    global _witness
    folder = ranklog.run_dir()
    if _witness is not None or folder is None or not (folder / EXPECTED).exists():
        return
    started = time.thread_time()
    try:
        _witness = Witness(json.loads((folder / EXPECTED).read_text()))
        imports.watch(_witness.paths, _witness)
        _listen(folder / FOLDER)
        os.register_at_fork(after_in_child=functools.partial(_listen, folder / FOLDER))
        _witness.seconds = time.thread_time() - started
    except Exception as e:  # noqa: BLE001 - see above
        sys.stderr.write(f"fp8ctl: this process cannot show its code: {type(e).__name__}: {e}\n")


def _listen(folder: Path) -> None:
    """Answer whoever connects to `PID.sock` in the run folder, in a thread."""
    global _listening
    if _listening is not None:
        _listening.close()  # the parent's, after a fork
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{os.getpid()}.sock"
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    with _short(path) as address:
        listening.bind(address)
    listening.listen()
    _listening = listening
    threading.Thread(target=_answer, args=(listening,), name="fp8ctl-code", daemon=True).start()


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Give a socket's path as one that fits into the 107 characters of an address."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _answer(listening: socket.socket) -> None:
    while True:
        try:
            asking, _ = listening.accept()
        except OSError:
            return
        with asking, contextlib.suppress(OSError):
            try:
                answer = _witness.report() if _witness else {}
            except Exception as e:  # noqa: BLE001 - the answer says it
                answer = {"pid": os.getpid(), "error": f"{type(e).__name__}: {e}"}
            asking.sendall(json.dumps(answer).encode())


# --- in the server -------------------------------------------------------------------------------


def everyone(ranks: int | None) -> dict[str, object]:
    """Return what every process of this server says of its code.

    Args:
        ranks: how many workers there are.

    Returns:
        ranks, root, patches, changed_on_disk, processes (see `Witness.report`) and silent:
        those that do not answer, each with pid and why. Without code.json: why. Where it is
        there and the hook is not in force: error.
    """
    folder = ranklog.run_dir()
    if _witness is None or folder is None:
        if folder is not None and (folder / EXPECTED).exists():
            return {"error": f"its hook could not read {EXPECTED}: see the log"}
        return {"why": f"there is no {EXPECTED} in its run folder"}
    sockets = sorted((folder / FOLDER).glob("*.sock"))
    with ThreadPoolExecutor(max_workers=max(1, len(sockets))) as pool:
        answers = [one for one in pool.map(_ask, sockets) if one is not None]
    if os.getpid() not in {one["pid"] for one in answers}:
        answers.append({"pid": os.getpid(), "why": "the server does not listen for questions"})
    return {
        "ranks": ranks,
        "root": str(_witness.root),
        "patches": _witness.expected.get("patches", []),
        "changed_on_disk": _witness.changed_on_disk(),
        "processes": [one for one in answers if "why" not in one],
        "silent": [one for one in answers if "why" in one],
    }


def _ask(path: Path) -> dict[str, Any] | None:
    """Return one process's answer; None where it has ended."""
    pid = int(path.stem)
    text = b""
    try:
        with socket.socket(socket.AF_UNIX) as asking, _short(path) as address:
            asking.settimeout(ANSWER_WITHIN)
            asking.connect(address)
            while part := asking.recv(1 << 16):
                text += part
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            return {"pid": pid, "why": answer["error"]}
    except (ConnectionRefusedError, FileNotFoundError):
        path.unlink(missing_ok=True)
        return None
    except (OSError, ValueError) as e:
        return {"pid": pid, "why": f"{type(e).__name__}: {e}"}
    return answer
