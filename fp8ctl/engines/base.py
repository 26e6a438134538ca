"""What it takes to start an engine, as data: a request in, a command line out.

Pure: nothing here reads a file, asks the machine or starts anything. Called by
`launching`, which gathers the facts; `sglang` and `vllm` hold what each engine
needs, `refusals` what is turned down before anything starts.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NewType

from fp8ctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from fp8ctl.fitting import Module

Source = Literal["checkpoint", "override", "online", "method", "torchao"]
"""Where the quantised weights come from.

checkpoint: the folder is FP8 and says so in its config.json. override: the
folder is 16-bit and the FP8 configuration is put over it (`--await-push`).
online: the engine quantises at load. method: `--quantization`. torchao:
`--torchao-config`.
"""

TracePoint = NewType("TracePoint", str)
"""`module.path:function`, checked by `parse_trace`."""

STATE_PATH: Final = "/fp8ctl/state"
HEALTH_PATH: Final = "/health"
_TORCHRUN: Final = "TORCHELASTIC_USE_AGENT_STORE"
API_KEY_VARIABLE: Final = "FP8CTL_API_KEY"
RUN_DIR_VARIABLE: Final = "FP8CTL_RUN_DIR"
FP8_CAPABILITY: Final = (8, 9)
_TRACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
SECRET_FLAGS: Final = frozenset({"--api-key", "--hf-token"})
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")


@dataclass(frozen=True, slots=True)
class Device:
    """What the engine will compute on.

    Attributes:
        kind: cuda where the driver shows a GPU, else cpu.
        capability: the lowest compute capability among the GPUs, None on a CPU.
        count: number of GPUs; 0 on a CPU.
        name: as the driver calls the first one.
    """

    kind: Literal["cpu", "cuda"]
    capability: tuple[int, int] | None = None
    count: int = 0
    name: str = "CPU"

    def describe(self) -> str:
        """Return the device in words, with its compute capability."""
        if self.capability is None:
            return self.name
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


CPU: Final = Device("cpu")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the builders must know of the folder that is served.

    Attributes:
        path: the folder.
        name: what the server calls the model.
        quant_method: `quantization_config.quant_method` of its config.json, None for 16 bits.
        weight_block_size: of the FP8 configuration, (N, K).
        sidecars: names of the other JSON files that engines read a method from
            (quantize_config.json, quant_config.json, hf_quant_config.json).
        modules: the quantised Linears as the engine has them on one GPU; empty where unknown.
    """

    path: Path
    name: str
    quant_method: str | None = None
    weight_block_size: tuple[int, int] | None = None
    sidecars: frozenset[str] = frozenset()
    modules: tuple[Module, ...] = ()


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """Everything a builder may look at.

    Attributes:
        python: interpreter of the engine's environment.
        applied: ids of the patches that are in force there.
        present: those, and the ones that are there in a part of their files.
        installed: which of the optional packages that methods ask for are there.
        override: quantization_config to put over a 16-bit checkpoint (source override).
        quantization, torchao_config: as typed (sources method and torchao).
        run_dir: private folder of this server; logs and reports go there.
        hook_path: folder from which the engine's interpreter imports fp8ctl.
        overlay: folder from which it imports the engine, in front of its environment.
        cache_root: folder for what the engine compiles, apart per patch state (vLLM).
        extra: the user's own engine arguments.
        environ: the environment that the server inherits.
    """

    python: Path
    model: ModelFacts
    source: Source
    device: Device
    host: str
    port: int
    run_dir: Path
    hook_path: Path
    applied: frozenset[str] = frozenset()
    present: frozenset[str] = frozenset()
    installed: frozenset[str] = frozenset()
    tp: int = 1
    override: Mapping[str, object] | None = None
    quantization: str | None = None
    torchao_config: str | None = None
    await_push: bool = False
    trace: TracePoint | None = None
    cache_root: Path | None = None
    overlay: Path | None = None
    extra: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A server that can be started, by `process.spawn` or by hand.

    Attributes:
        backend: vllm or sglang.
        argv: interpreter, entry module and arguments; no secret unless the user typed one.
        env: variables to set, over the inherited environment.
        env_from: (variable, variable it is copied from) at start, so that no
            value of a secret is ever part of a plan.
        notes: what was added and why, for the user.
    """

    backend: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    env_from: tuple[tuple[str, str], ...]
    host: str
    port: int
    run_dir: Path
    model: str
    await_push: bool = False
    notes: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Address at which a client of this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def command_line(self) -> str:
        """Return the line for a POSIX shell that starts the same server by hand.

        Values of secrets that the user typed are left out.
        """
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.env]
        assignments += [f'{name}="${source}"' for name, source in self.env_from]
        words = [shlex.quote(word) for word in masked(self.argv)]
        lines = ["env", *assignments, " ".join(words[:3])]
        for word in words[3:]:
            if word.startswith("-") or not lines[-1].startswith("-"):
                lines.append(word)
            else:
                lines[-1] += f" {word}"
        return " \\\n  ".join(lines)

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON types, secrets masked."""
        return {
            "backend": self.backend,
            "argv": list(masked(self.argv)),
            "env": dict(self.env),
            "env_from": dict(self.env_from),
            "url": self.url,
            "health_path": HEALTH_PATH,
            "state_path": STATE_PATH,
            "run_dir": str(self.run_dir),
            "model": self.model,
            "await_push": self.await_push,
            "notes": list(self.notes),
            "command_line": self.command_line(),
        }


def builder(backend: str) -> Callable[[LaunchRequest], LaunchPlan]:
    """Return the builder of an engine's command line."""
    if backend == "sglang":
        from fp8ctl.engines import sglang

        return sglang.build
    from fp8ctl.engines import vllm

    return vllm.build


def parse_trace(text: str) -> TracePoint:
    """Check `MODULE:FUNCTION`.

    Raises:
        UsageError: it is not two dotted Python names with a colon between them.
    """
    if not _TRACE.fullmatch(text):
        raise UsageError(
            f"--trace {text!r} is not MODULE:FUNCTION",
            hint="--trace sglang.srt.layers.linear:LinearBase.forward",
        )
    return TracePoint(text)


def parse_port(text: str | None, default: int) -> int:
    """Return the port that the engine will listen on.

    Raises:
        UsageError: the user's own --port behind `--` is not a port.
    """
    if text is None:
        return default
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise UsageError(f"--port {text!r} is not a port (1 to 65535)", hint="--port 30001")
    return int(text)


def is_loopback(host: str) -> bool:
    """Say whether an address is reachable from this machine only."""
    return _LOOPBACK.fullmatch(host.strip("[]")) is not None


def option_name(word: str) -> str | None:
    """Return `--some-flag` of a word of a command line, None where it is a value.

    Both engines' parsers take `--flag=value`; vLLM's also takes underscores.
    """
    if not word.startswith("--") or word == "--":
        return None
    return word.split("=", 1)[0].replace("_", "-")


def option_value(arguments: Sequence[str], *names: str) -> str | None:
    """Return the last value given to any of the flags, None where none was given."""
    value = None
    for index, word in enumerate(arguments):
        if option_name(word) in names:
            if "=" in word:
                value = word.split("=", 1)[1]
            elif index + 1 < len(arguments):
                value = arguments[index + 1]
    return value


def masked(arguments: Iterable[str]) -> tuple[str, ...]:
    """Return a command line in which the values of keys and tokens are `***`."""
    shown: list[str] = []
    hide = False
    for word in arguments:
        name = option_name(word)
        if hide:
            shown.append("***")
            hide = False
        elif name in SECRET_FLAGS:
            shown.append(f"{word.split('=', 1)[0]}=***" if "=" in word else word)
            hide = "=" not in word
        else:
            shown.append(word)
    return tuple(shown)


@dataclass(frozen=True, slots=True)
class Option:
    """One argument of ours: a flag with its values, and the other spellings of the flag."""

    flag: str
    values: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def spellings(self) -> frozenset[str]:
        """Return every name under which the user may give the same option."""
        return frozenset({self.flag, *self.aliases})


def merge(ours: Sequence[Option], extra: Sequence[str]) -> tuple[str, ...]:
    """Return one command line: the user's words verbatim, ours only where they said nothing."""
    said = {option_name(word) for word in extra}
    words: list[str] = []
    for option in ours:
        if not option.spellings() & said:
            words += [option.flag, *option.values]
    return (*words, *extra)


def common_env(request: LaunchRequest) -> dict[str, str]:
    """Return the variables that every server of fp8ctl gets."""
    inherited = request.environ.get("PYTHONPATH")
    front = (request.hook_path, request.overlay, inherited)
    env = {
        # Workers inherit it, so they import the engine from the overlay, too.
        "PYTHONPATH": ":".join(str(part) for part in front if part),
        # `-m` would put the current folder first: a folder called `sglang` there would win.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        # setproctitle writes over /proc/PID/environ, where `stop` finds the server's processes.
        "SPT_NOENV": "1",
        RUN_DIR_VARIABLE: str(request.run_dir),
    }
    if request.environ.get("PYTHONPYCACHEPREFIX"):
        # Bytecode outside of the environment: `patch` cannot drop what is stale there.
        env["PYTHONPYCACHEPREFIX"] = ""
    if request.environ.get(_TORCHRUN):
        # A trainer under torchrun starts a server: the server's own ranks would wait for
        # each other in the trainer's store, for ever.
        env[_TORCHRUN] = ""
    if "HF_HUB_OFFLINE" not in request.environ:
        env["HF_HUB_OFFLINE"] = "1"
    if request.trace:
        env["FP8CTL_TRACE"] = request.trace
    if request.await_push:
        env["FP8CTL_AWAIT_PUSH"] = "1"
    return env


def override_json(config: Mapping[str, object]) -> str:
    """Return the JSON that puts an FP8 configuration over that of a 16-bit checkpoint."""
    import json

    return json.dumps({"quantization_config": dict(config)})
