"""This machine in a leg: fp8ctl as a user types it, stock engines, models, a trainer.

All that fp8ctl writes goes into a home of the run's own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.gpu import ask
from tests.gpu.leg import ROOT, FailedError, Leg

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.gpu.ask import Backend

Json = dict[str, Any]
STATE = "/fp8ctl/state"
Device = Literal["cuda", "cpu"]

# Both engines' own arguments. Several servers share the GPU: each says how much it needs.
_SGLANG = shlex.split(
    "--attention-backend triton --sampling-backend pytorch"
    " --mem-fraction-static 0.45 --cuda-graph-max-bs 8"
)
_SGLANG_SMALL = [*_SGLANG, "--max-total-tokens", "32768"]
_VLLM = shlex.split("--gpu-memory-utilization 0.45 --max-model-len 2048")
_VLLM_SMALL = shlex.split(
    "--gpu-memory-utilization 0.2 --max-model-len 2048"
    " --num-gpu-blocks-override 4096 --max-num-seqs 64"
)
# As fp8ctl starts a stock SGLang on a CPU.
_SGLANG_CPU = shlex.split(
    "--device cpu --attention-backend torch_native --sampling-backend pytorch"
    " --disable-cuda-graph --disable-overlap-schedule --disable-custom-all-reduce"
    " --sleep-on-idle --max-total-tokens 8192 --max-running-requests 16"
    " --mem-fraction-static 0.8"
)


@dataclass
class Server:
    """A server that runs.

    Attributes:
        url: its address.
        backend: whose.
        model: the name that it goes by.
        name: fp8ctl's name for it; "" where fp8ctl did not start it.
        seconds: until it was ready.
        log: its log.
    """

    url: str
    backend: Backend
    model: str
    name: str = ""
    seconds: float = 0.0
    log: Path | None = None
    child: subprocess.Popen[bytes] | None = None

    def said(self, seed: int = 7, count: int = 6) -> ask.Said:
        return ask.said(self.url, self.backend, self.model, ask.prompts(count, 24, seed))


@dataclass
class Host:
    """Where a leg runs.

    Attributes:
        leg: its steps.
        python: the engines' interpreter.
        work: models, fp8ctl's home, overlays.
        device: "cpu" for a rehearsal with SGLang's CPU engine.
        more_env: for every program, at the moment.
    """

    leg: Leg
    python: Path
    work: Path
    device: Device = "cuda"
    more_env: dict[str, str] = field(default_factory=dict)
    # SGLang takes a second one, up to 1000 higher; from 32768 on any connection may have them.
    _ports: Iterator[int] = field(default_factory=lambda: iter(range(10000, 32000, 1100)))

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self._port_lock = threading.Lock()
        self._free: list[int] = []
        # A rehearsal shares two cores with others.
        self._slow = 1 if self.device == "cuda" else 3

    @property
    def env(self) -> dict[str, str]:
        """The environment of every program here."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FP8CTL_")}
        # Commands run in this folder; engines must not find it on their path.
        others = [part for part in clean.pop("PYTHONPATH", "").split(":") if part != str(ROOT)]
        if any(others):
            clean["PYTHONPATH"] = ":".join(others)
        clean |= {"FP8CTL_HOME": str(self.work / "home"), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        # NVLink multicast can put GPUs that others share out of service.
        clean.setdefault("NCCL_NVLS_ENABLE", "0")
        clean.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        return clean | self.more_env

    @property
    def engine_env(self) -> dict[str, str]:
        """The environment of engines that fp8ctl does not start."""
        env = {k: v for k, v in self.env.items() if k not in ("PYTHONPATH", "FP8CTL_HOME")}
        if self.device == "cpu":
            env |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        return env

    @functools.cached_property
    def torch_python(self) -> Path:
        """An interpreter with torch that sees this device: fp8ctl's own, else the engines'."""
        code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if self.device == "cpu":
            code = "import torch"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=False, timeout=60
        )
        return Path(sys.executable) if done.returncode == 0 else self.python

    def extra(self, backend: Backend, alone: bool = False) -> list[str]:
        """Return what stands behind `--` of a launch."""
        if self.device == "cpu":
            return []
        if backend == "sglang":
            return _SGLANG if alone else _SGLANG_SMALL
        return _VLLM if alone else _VLLM_SMALL

    def backend(self, wanted: Backend) -> Backend:
        """Return the engine to use: in a rehearsal it is always SGLang's for CPUs."""
        return "sglang" if self.device == "cpu" else wanted

    # fp8ctl

    def fp8ctl(self, *argv: str | Path, limit: float, expect: Sequence[int] = (0,)) -> str:
        """Run a command as a person does; return what it printed.

        Raises:
            FailedError: another exit code than expected.
        """
        done = self._fp8ctl([str(word) for word in argv], limit)
        if done.returncode not in expect:
            raise FailedError(f"fp8ctl {argv[0]}: exit {done.returncode}: {_reason(done)}")
        return done.stdout + done.stderr

    def answer(self, *argv: str | Path, limit: float) -> Json:
        """Run a command with --json; return the document, kept as evidence, and `code`."""
        words = [str(word) for word in argv]
        at = words.index("--") if "--" in words else len(words)
        done = self._fp8ctl([*words[:at], "--json", *words[at:]], limit)
        try:
            document: Json = json.loads(done.stdout)
        except ValueError as e:
            raise FailedError(f"fp8ctl {argv[0]}: no JSON: {_reason(done)}") from e
        with (self.leg.folder / f"{self.leg.job_name}.json.txt").open("a") as file:
            file.write(json.dumps({"typed": shlex.join(words), "answer": document}) + "\n")
        return document | {"code": done.returncode}

    def data(self, *argv: str | Path, limit: float) -> Json:
        """Return the data of an answer.

        Raises:
            FailedError: it is an error.
        """
        document = self.answer(*argv, limit=limit)
        if not document["ok"]:
            error = document["error"]
            raise FailedError(f"fp8ctl {argv[0]}: {error['id']}: {error['message']}")
        data: Json = document["data"]
        return data

    def _fp8ctl(self, words: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        shown = shlex.join(["fp8ctl", *words])
        return self.leg.run([sys.executable, "-m", "fp8ctl", *words], self.env, limit, shown)

    def give_up(self) -> None:
        """End the leg: nobody waits for an answer of a server that is stopped."""
        self.leg.give_up()
        argv = [sys.executable, "-m", "fp8ctl", "stop", "--all"]
        subprocess.Popen(argv, env=self.env, cwd=ROOT, stdout=subprocess.DEVNULL)

    @property
    def target(self) -> tuple[str, str]:
        return ("--python", str(self.python))

    # Servers

    def port(self) -> int:
        """Return a port whose neighbours nobody of this run takes, either."""
        with self._port_lock:
            free = (port for port in itertools.chain(self._free, self._ports) if _is_free(port))
            port = next(free)
            self._free = [one for one in self._free if one != port]
            return port

    @contextlib.contextmanager
    def launched(
        self,
        backend: Backend,
        model: Path,
        *options: str,
        limit: float,
        extra: Sequence[str] | None = None,
        again: int = 0,
    ) -> Iterator[Server]:
        """Start a server by `fp8ctl launch`, and stop it at the end.

        Args:
            backend: whose.
            model: folder.
            options: of fp8ctl.
            limit: seconds until it is ready.
            extra: of the engine, instead of the usual ones.
            again: how often to try again when the engine dies; once in any case for a port.
        """
        behind = self.extra(backend) if extra is None else [*extra]
        port = self.port()
        server = Server(f"http://127.0.0.1:{port}", backend, model.name)
        server.name = f"{backend}-{port}"
        words = ["launch", "--backend", backend, "--model", str(model)]
        if "--overlay" not in options:
            words += self.target
        words += [*options, "--port", str(port), "--detach"]
        for turn in range(again + 2):
            began = time.monotonic()
            ready = int(self.leg.left(limit * self._slow))
            try:
                told = self.fp8ctl(*words, "--timeout", str(ready), "--", *behind, limit=ready + 20)
            except FailedError as e:
                self.fp8ctl("stop", server.name, limit=30, expect=(0, 3))
                self.keep_log(server.name)
                if turn >= again and not (turn == 0 and "took the port" in str(e)):
                    raise
                self.leg.transcript(f"once more: {e}")
            else:
                break
        server.seconds = time.monotonic() - began
        if found := re.search(r"is ready after ([\d.]+) s", told):
            server.seconds = float(found[1])  # without what was quantised before
        try:
            yield server
        finally:
            self.keep_log(server.name)
            with contextlib.suppress(Exception):
                self.fp8ctl("stop", server.name, limit=40, expect=(0, 3))
            with self._port_lock:
                self._free.append(port)

    def keep_log(self, name: str) -> None:
        """Keep the end of a server's log."""
        state = self.work / "home" / "state"
        for folder in (state / "servers" / name, *sorted((state / "ended").glob(f"{name}*"))):
            log = folder / "server.log"
            if log.exists():
                lines = log.read_text(errors="replace").splitlines()[-80:]
                at = self.leg.folder / f"{self.leg.job_name}-{name}.log"
                at.write_text("\n".join(lines) + "\n")
                return

    @contextlib.contextmanager
    def stock(
        self,
        backend: Backend,
        model: Path,
        *more: str,
        limit: float,
        tree: Path | None = None,
        alone: bool = False,
        hooks: bool = False,
    ) -> Iterator[Server]:
        """Start an engine without `launch`.

        Args:
            backend: whose.
            model: folder.
            more: of the engine.
            limit: seconds until it is ready.
            tree: imported in front of the environment.
            alone: it has the GPU for itself.
            hooks: with fp8ctl's entry module, so that it takes pushes.

        Raises:
            FailedError: it died; the message has the error of its log.
        """
        port = self.port()
        module = {
            "sglang": "sglang.launch_server",
            "vllm": "vllm.entrypoints.openai.api_server",
        }[backend]
        env = self.engine_env | {"PYTHONUNBUFFERED": "1"}
        if tree is not None:
            env["PYTHONPATH"] = str(tree)
        if hooks:
            module = f"fp8ctl.engines.hooks.{backend}_server"
            run_folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.work))
            (run_folder / "reports").mkdir(mode=0o700)
            link = self.work / "hook" / "fp8ctl"
            link.parent.mkdir(exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(ROOT / "fp8ctl", target_is_directory=True)
            env |= {"FP8CTL_RUN_DIR": str(run_folder), "PYTHONPATH": str(link.parent)}
            if backend == "sglang":
                loader = "fp8ctl.engines.hooks.sglang_worker.load"
                more = (*more, "--custom-weight-loader", loader)
        if backend == "vllm":
            env["VLLM_CACHE_ROOT"] = str(self.work / f"vllm-cache-{'hooks' if hooks else 'stock'}")
        named = {"sglang": "--model-path", "vllm": "--model"}[backend]
        argv: list[str | Path] = [self.python, "-m", module, named, model, "--port", str(port)]
        argv += ["--host", "127.0.0.1", "--served-model-name", model.name]
        argv += _SGLANG_CPU if self.device == "cpu" else self.extra(backend, alone)
        log = self.leg.folder / f"{self.leg.job_name}-stock-{port}.log"
        server = Server(f"http://127.0.0.1:{port}", backend, model.name, log=log)
        with log.open("wb") as out:
            server.child = self.leg.start([*argv, *more], env, out)
            try:
                began = time.monotonic()
                self._wait(server, self.leg.left(limit * self._slow), hooks)
                server.seconds = time.monotonic() - began
                yield server
            finally:
                self.leg.stop(server.child)
                with self._port_lock:
                    self._free.append(port)

    def _wait(self, server: Server, limit: float, hooks: bool) -> None:
        assert server.child is not None
        assert server.log is not None
        end = time.monotonic() + limit
        while time.monotonic() < end:
            code = server.child.poll()
            text = server.log.read_text(errors="replace")
            if code is not None or "Received sigquit from a child process" in text:
                raise FailedError(f"the engine died: {error_of(text)}")
            with contextlib.suppress(FailedError):
                ask.request(server.url, "/v1/models", None, 5)
                ask.said(server.url, server.backend, server.model, [[1, 2, 3, 4]], 2)
                if not hooks or ask.request(server.url, STATE, None, 5)["state"] == "ready":
                    return
            time.sleep(0.5)
        raise FailedError(f"not ready after {limit:.0f} s: {error_of(text)}")

    # What a leg needs before its jobs

    def models(self, *names: str, limit: float = 120) -> None:
        """Write the models that are not there yet."""
        env = self.env | {"PYTHONPATH": str(ROOT)}
        argv: list[str | Path] = ["-m", "tests.gpu.models", self.work / "models", *names]
        done = self.leg.run([self.torch_python, *argv], env, limit)
        if done.returncode:
            raise FailedError(f"models: {done.stderr.strip().splitlines()[-1:]}")

    def model(self, name: str) -> Path:
        return self.work / "models" / name

    def released(self, *backends: str) -> None:
        """Begin with engines as they were released."""
        self.fp8ctl("stop", "--all", limit=60)
        for backend in backends:
            self.fp8ctl("revert", *self.target, "--backend", backend, limit=60, expect=(0, 3))

    def require_released(self, backend: str) -> Json:
        """Return the states of an engine's files, which must be the release's."""
        data = self.data("patch", *self.target, "--backend", backend, "--list", limit=60)
        states = {engine["backend"]: engine["state"] for engine in data["engines"]}
        if set(states.values()) != {"pristine"}:
            raise FailedError(f"after the revert: {states}")
        return {"states": states, "seen": "every byte is the release's"}


class Trainer:
    """A process with torch that holds models and pushes them: trainer.py."""

    def __init__(self, host: Host) -> None:
        self._leg = host.leg
        log = (host.leg.folder / f"{host.leg.job_name}-trainer.log").open("ab")
        self._child = subprocess.Popen(
            [str(host.torch_python), "-m", "tests.gpu.trainer"],
            env=host.env | {"PYTHONPATH": str(ROOT), "TRAINER_DEVICE": host.device},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=15)
        self._leg.stop(self._child)

    def push(self, server: Server, model: Path, limit: float, **more: object) -> Json:
        """Push a model; return what the update told.

        Raises:
            FailedError: it did not end well or in time.
        """
        return self.do({"url": server.url, "model": str(model), **more}, limit)

    def do(self, wanted: Json, limit: float) -> Json:
        """Have the trainer do something.

        Raises:
            FailedError: it did not end well or in time.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        late = threading.Timer(self._leg.left(limit), self._child.kill)
        late.start()
        try:
            self._child.stdin.write(json.dumps(wanted).encode() + b"\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except OSError as e:
            raise FailedError(f"the trainer is gone: {e}") from e
        finally:
            late.cancel()
        if not line:
            raise FailedError(f"the trainer gave no answer in {limit:.0f} s; see its log")
        found: Json = json.loads(line)
        self._leg.transcript(f"trainer: {json.dumps(wanted)}\n{line.decode()}")
        if "error" in found:
            raise FailedError(f"push: {found['error']}")
        return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def error_of(text: str) -> str:
    """Return the line of a log that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for words in ("stream is capturing", "CUDA error", "Error: ", "Error:", "error:"):
        for line in reversed(lines):
            if words in line and "Traceback" not in line:
                return line[:400]
    return lines[-1][:400] if lines else "its log is empty"


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    return (told or lines or ["no output"])[-1][:400]
