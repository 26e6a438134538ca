"""Runs `fp8ctl.worker` in an interpreter that has torch, which may be an engine's.

Another environment's Python gets to see this package, and nothing else of
ours, through a folder with one link in it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fp8ctl import environment, errors, models, paths
from fp8ctl.errors import Fp8ctlError, NotFoundError, NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fp8ctl.render import Reporter

# What the worker's tensor work imports. safetensors is not among them: the
# worker reads and writes that format itself, tensor by tensor.
_NEEDED = ("torch", "numpy")
_FIND = (
    "import importlib.util as u, sys;"
    "sys.exit(any(u.find_spec(name) is None for name in sys.argv[1:]))"
)
_TAIL = 20


#: Results that are kept: those of one round of all levels, and some. Of a large model one has
#: tens of megabytes, and files that change in every round make a new one each time.
_MOST = 6


@dataclass(frozen=True)
class _Kept:
    """Results of tasks that are not run twice, the one that was asked for last at the end."""

    tasks: frozenset[str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result, and forget the one that nobody has asked for longest."""
        self.results.pop(key, None)
        self.results[key] = result
        while len(self.results) > _MOST:
            del self.results[next(iter(self.results))]


_KEPT: ContextVar[_Kept | None] = ContextVar("_KEPT", default=None)


def hook_path() -> Path:
    """Return a folder whose only content is a link `fp8ctl` to this package.

    On PYTHONPATH it lets another interpreter import fp8ctl, and none of the
    packages that lie beside it. Safe with several processes: one folder per
    place of the package, and the link appears by rename.

    Raises:
        NotPermittedError: the cache folder cannot be written.
    """
    package = Path(__file__).resolve().parent
    key = hashlib.sha256(os.fsencode(package)).hexdigest()[:16]
    folder = paths.cache_dir() / "hook" / key
    link = folder / "fp8ctl"
    try:
        if os.readlink(link) == str(package):
            return folder
    except OSError:
        pass
    spare = folder.parent / f".{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        spare.symlink_to(package, target_is_directory=True)
        spare.replace(link)
    except OSError as e:
        with contextlib.suppress(OSError):
            spare.unlink()
        raise NotPermittedError(
            f"cannot write {folder}: {e.strerror}", hint="export FP8CTL_HOME=/a/folder/you/own"
        ) from e
    return folder


def torch_python(preferred: Path | None = None, *, also: tuple[str, ...] = ()) -> Path:
    """Return an interpreter with torch: fp8ctl's own, else `preferred`, else a managed engine's.

    Args:
        preferred: one to try.
        also: other packages that it must have.

    Raises:
        NotFoundError: none has it.
    """
    needed = (*_NEEDED, *also)
    if all(importlib.util.find_spec(name) is not None for name in needed):
        return Path(sys.executable)
    others = [] if preferred is None else [preferred]
    others += environment.managed_environments()
    for other in others:
        if _has(other, needed):
            return other
    tried = "".join(f", nor has {other}" for other in others)
    hint = environment.install_hint("sglang")
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():  # a clone; an installed package has none beside it
        hint = f"{shlex.quote(sys.executable)} -m pip install -e {shlex.quote(f'{root}[torch]')}, "
        hint += f"or {environment.install_hint('sglang')}"
    raise NotFoundError(f"{sys.executable} has no {' and '.join(needed)}{tried}", hint=hint)


def run_worker(
    python: Path,
    task: str,
    arguments: Mapping[str, Any],
    report: Reporter,
    title: str,
    *,
    patience: float = 5.0,
) -> dict[str, Any]:
    """Run one task of `fp8ctl.worker` in `python`, showing its progress as `title`.

    Args:
        python: an interpreter with what the task imports.
        task: a key of `fp8ctl.worker.TASKS`.
        arguments: JSON types; paths must be absolute, the worker runs elsewhere.
        report: shows the progress.
        title: what the task does, for a person.
        patience: seconds that it has to end when it is told to, before it is killed.

    Raises:
        Fp8ctlError: what the worker raised, as the same class; or that it
            ended without a word, with the end of what it printed.
        NotFoundError: `python` cannot be started.
    """
    kept = _KEPT.get()
    if kept is None or task not in kept.tasks:
        return _run_worker(python, task, arguments, report, title, patience)
    about = json.dumps([task, dict(arguments), _files(arguments)], sort_keys=True)
    key = hashlib.sha256(about.encode()).hexdigest()
    result = kept.results.get(key)
    if result is None:
        result = _run_worker(python, task, arguments, report, title, patience)
    kept.put(key, result)
    return copy.deepcopy(result)


@contextlib.contextmanager
def remembering(*tasks: str) -> Iterator[None]:
    """Run each of these tasks once in this block, for the same arguments and the same files.

    A few results are kept, those that were asked for last.

    Args:
        tasks: of which the result depends on the arguments and the files of `model` alone.
    """
    before = _KEPT.set(_Kept(frozenset(tasks)))
    try:
        yield
    finally:
        _KEPT.reset(before)


def _files(arguments: Mapping[str, Any]) -> list[object]:
    """Return names, sizes and times of the files of the models that a task reads."""
    plan = arguments.get("plan")
    named = [arguments.get("model"), plan.get("model") if isinstance(plan, dict) else None]
    folders = [Path(one) for one in named if isinstance(one, str) and Path(one).is_dir()]
    return [
        [str(path), path.stat().st_size, path.stat().st_mtime_ns]
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]


def _run_worker(
    python: Path,
    task: str,
    arguments: Mapping[str, Any],
    report: Reporter,
    title: str,
    patience: float,
) -> dict[str, Any]:
    with tempfile.TemporaryFile() as talk:
        try:
            process = subprocess.Popen(
                [str(python), "-m", "fp8ctl.worker", task],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=talk,
                env=worker_environment(),
                # `-m` puts the working folder in front of the module path, and
                # a user's may hold a torch.py.
                cwd=hook_path(),
            )
        except OSError as e:
            raise NotFoundError(
                f"cannot start {python}: {e.strerror}", hint="--python /path/to/bin/python"
            ) from e
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # A worker that dies at once has closed its end; its exit tells more.
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps(dict(arguments)).encode())
            final = _follow(process.stdout, report, title)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=patience)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            process.stdout.close()
        if "result" in final and code == 0:
            result = final["result"]
            assert isinstance(result, dict)
            return result
        if "error" in final:
            raise _error(final["error"])
        raise Fp8ctlError(
            f"the worker for {task} {_ending(code)} without a result",
            hint="see the last lines of its output above" if _tell(talk, report) else None,
            data={"python": str(python), "returncode": code},
        )


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: the caller's, with the hook folder in front."""
    env = dict(os.environ)
    others = env.get("PYTHONPATH")
    hook = str(hook_path())
    env["PYTHONPATH"] = f"{hook}{os.pathsep}{others}" if others else hook
    # Threads that spin while they wait for each other take 20 times as long
    # beside a busy server as threads that sleep.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


def resolve_model(
    report: Reporter, text: str, python: Path | None = None, *, fetch: bool = True
) -> Path:
    """Return the folder of a model; a Hub id that is not cached is fetched.

    Args:
        report: shows the download.
        text: a folder or a Hub id.
        python: an interpreter with huggingface_hub, where fp8ctl's own has none.
        fetch: False takes the model from the cache or not at all.

    Raises:
        NotFoundError: no such folder or model, no way to fetch it, or offline.
    """

    def download(repository: str, revision: str | None) -> Path:
        if not fetch:
            raise NotFoundError(
                f"{text} is not in the local cache ({models.hub_cache()}), "
                "and a dry run fetches nothing",
                hint=f"huggingface-cli download {repository}"
                + (f" --revision {revision}" if revision else ""),
            )
        chosen = Path(sys.executable)
        if importlib.util.find_spec("huggingface_hub") is None and python is not None:
            chosen = python
        report.say(f"{repository} is not in {models.hub_cache()}: fetching it")
        arguments = {"repository": repository, "revision": revision}
        return Path(run_worker(chosen, "fetch", arguments, report, f"fetch {repository}")["path"])

    return models.resolve(text, download)


def _has(python: Path, needed: tuple[str, ...]) -> bool:
    try:
        found = subprocess.run(
            [str(python), "-I", "-c", _FIND, *needed], capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0


def _follow(stream: IO[bytes], report: Reporter, title: str) -> dict[str, Any]:
    """Read the worker's lines until they end; return the last that is no progress."""
    final: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        tell: Callable[[int], None] | None = None
        for message in _messages(stream):
            if "progress" in message:
                done, total = message["progress"]
                if tell is None:
                    tell = stack.enter_context(report.progress(title, total, "B"))
                tell(done)
            else:
                final = message
    return final


def _messages(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in stream:
        try:
            message = json.loads(line)
        except ValueError:
            # Cut off by a kill, the last line may be half a line.
            continue
        if isinstance(message, dict):
            yield message


def _error(body: Mapping[str, Any]) -> Fp8ctlError:
    """Return the error that a worker reported, as the class of its id."""
    kinds = {kind.id: kind for kind in _kinds()}
    kind = kinds.get(str(body.get("id")), Fp8ctlError)
    return kind(str(body.get("message")), hint=body.get("hint"), data=body.get("data") or {})


def _kinds() -> Iterator[type[Fp8ctlError]]:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, Fp8ctlError):
            yield value


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"


def _tell(talk: IO[bytes], report: Reporter) -> bool:
    talk.seek(0)
    lines = talk.read().decode(errors="replace").splitlines()[-_TAIL:]
    for line in lines:
        report.say(f"  {line}")
    return bool(lines)
