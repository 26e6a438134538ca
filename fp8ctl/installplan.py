"""What `fp8ctl install` will do, as data: an engine's lock, and the commands that fill from it.

Reads only. Made by `make_plan`, printed by `--dry-run`, carried out by `install`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from fp8ctl import environment, hardware
from fp8ctl.environment import LABELS, SUPPORTED, BackendName
from fp8ctl.errors import NotFoundError, UnsupportedError, UsageError
from fp8ctl.packager import OWN_PLACE, UV_SETTINGS

DEVICES = ("cpu", "cuda")
# The versions that every pin of every lock has a wheel for.
PYTHONS = ((3, 11), (3, 12))

CONSTRAINTS = "constraints.txt"
_LOCKS = Path(__file__).parent / "locks"


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock file: exact versions, with the size of each download.

    Attributes:
        pins: requirement (`torch==2.13.0`) to bytes, as measured; in the file's order.
        installed: bytes on disk afterwards, None where not measured.
        installed_cuda: the same where a CPU has to take the CUDA build of torch.
        sha256: of the pins, the identity of an environment made from them; another
            comment in the file makes nothing anew.
    """

    path: Path
    pins: dict[str, int]
    installed: int | None
    installed_cuda: int | None
    sha256: str

    @property
    def download(self) -> int:
        """Bytes to download in all, about."""
        return sum(self.pins.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What an installation will do.

    Attributes:
        commands: argument lists, run in this order.
        constraints: lines of the file that the placeholder `CONSTRAINTS` in a
            command stands for.
        options: that were given, as typed.
    """

    backend: BackendName
    device: str
    folder: Path
    lock: Lock
    tool: str
    commands: tuple[tuple[str, ...], ...]
    constraints: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def again(self) -> str:
        """The command that asks for it."""
        return shlex.join(["fp8ctl", "install", self.backend, *self.options])

    def elsewhere(self, folder: str = "/a/folder/you/own") -> str:
        """Return what to type to have it in another folder."""
        if "--dir" not in self.options:
            return OWN_PLACE.replace("/a/folder/you/own", folder)
        at = self.options.index("--dir")
        given = (*self.options[: at + 1], folder)
        return shlex.join(["fp8ctl", "install", self.backend, *given])

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.folder / "bin" / "python"


def read_lock(backend: BackendName, device: str) -> Lock:
    """Return the lock of an engine on a device.

    Raises:
        UnsupportedError: the engine has no release for the device.
    """
    if (backend, device) == ("vllm", "cpu"):
        raise UnsupportedError(
            f"vLLM {SUPPORTED['vllm']} cannot be installed for the CPU: "
            "its released wheel is a CUDA build",
            hint="fp8ctl install sglang --device cpu",
        )
    path = _LOCKS / f"{backend}-{SUPPORTED[backend]}-{device}.txt"
    text = path.read_text(encoding="utf-8")
    pins = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(\S+==\S+)\s+# ([\d.]+) MB", line)
        if match:
            pins[match.group(1)] = round(float(match.group(2)) * 1e6)

    def figure(words: str) -> int | None:
        found = re.search(rf"^# {words} about ([\d.]+) GB", text, re.M)
        return round(float(found.group(1)) * 1e9) if found else None

    return Lock(
        path,
        pins,
        figure("installed:"),
        figure("installed with the CUDA build:"),
        hashlib.sha256("\n".join(pins).encode()).hexdigest(),
    )


def make_plan(backend: BackendName, device: str | None, folder: Path | None) -> Plan:
    """Return what installing would do; reads only.

    Args:
        device: `cpu` or `cuda`; None: `cuda` where a GPU is seen.
        folder: of the environment; None: the managed one.

    Raises:
        UsageError: no such device.
        UnsupportedError: no release of the engine for it, or not for this Python.
    """
    options: tuple[str, ...] = () if device is None else ("--device", device)
    options += () if folder is None else ("--dir", str(folder))
    if device is None:
        device = "cuda" if hardware.detect().gpus else "cpu"
    if device not in DEVICES:
        raise UsageError(
            f"unknown device {device!r}, expected {' or '.join(DEVICES)}",
            hint=f"fp8ctl install {backend} --device cpu",
        )
    lock = read_lock(backend, device)
    if sys.version_info[:2] not in PYTHONS:
        known = " or ".join(f"{a}.{b}" for a, b in PYTHONS)
        raise UnsupportedError(
            f"{LABELS[backend]} {SUPPORTED[backend]} is installed with Python {known}; "
            f"fp8ctl runs on {sys.version_info[0]}.{sys.version_info[1]}",
            hint="python3.11 -m pip install fp8ctl, and install again from there",
        )
    target = folder.expanduser().absolute() if folder else environment.managed_dir(backend, device)
    tool, uv = _tool()
    python = str(target / "bin" / "python")
    if uv:
        make: tuple[str, ...] = (sys.executable, "-m", "venv", "--without-pip", str(target))
        add: tuple[str, ...] = (uv, "pip", "install", "--python", python)
    else:
        make = (sys.executable, "-m", "venv", str(target))
        add = (python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check")
        add += ("--progress-bar", "off")
    torch = next(pin for pin in lock.pins if pin.startswith("torch=="))
    everything = (*add, "--no-deps", "-r", str(lock.path))
    if device == "cpu":
        # An index's own torch 2.13.0 may be a CUDA build: it cannot be imported
        # without its CUDA packages, which the lock cannot know. It asks for its own
        # triton as well, which the second command replaces.
        commands: tuple[tuple[str, ...], ...] = (
            make,
            (*add, "-c", CONSTRAINTS, torch),
            everything,
        )
        # Nor is torch constrained, being asked for: an index without it would be told
        # as a conflict of the two.
        constraints = tuple(pin for pin in lock.pins if not pin.startswith(("triton==", "torch==")))
    else:
        commands, constraints = (make, everything), ()
    return Plan(backend, device, target, lock, tool, commands, constraints, options)


def _tool() -> tuple[str, str | None]:
    """Choose pip, or uv where the user has set uv up or asked for it."""
    wanted = os.environ.get("FP8CTL_INSTALLER")
    if wanted not in (None, "", "pip", "uv"):
        raise UsageError(
            f"FP8CTL_INSTALLER is {wanted!r}, expected pip or uv",
            hint="export FP8CTL_INSTALLER=pip",
        )
    uv = shutil.which("uv")
    if wanted == "uv" and not uv:
        raise NotFoundError(
            "FP8CTL_INSTALLER is uv, but there is no uv on PATH",
            hint="export FP8CTL_INSTALLER=pip",
        )
    if uv and (wanted == "uv" or (not wanted and any(os.environ.get(v) for v in UV_SETTINGS))):
        return "uv", uv
    return "pip", None


def shown(plan: Plan, command: tuple[str, ...]) -> str:
    """Return a command as bash takes it; the constraints come from the lock."""
    lock = shlex.quote(str(plan.lock.path))
    return shlex.join(command).replace(
        f"-c {CONSTRAINTS}", f"-c <(grep -Ev '^(triton|torch)==' {lock})"
    )
