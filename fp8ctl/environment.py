"""Finds the environment to work on, and the engines in it, without importing them.

An environment is an interpreter or a bare site-packages folder. What it holds is
read by `probe` from metadata; the engines' Python files are compared with their
RECORD, which the patcher never edits and which therefore is the witness of what
was released.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fp8ctl import hardware, paths, probe
from fp8ctl.errors import ConflictError, NotFoundError, UnsupportedError, UsageError
from fp8ctl.hardware import Gpu, Hardware
from fp8ctl.record import RecordReport, is_writable, verify_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

BackendName = Literal["vllm", "sglang"]
Kind = Literal["wheel", "editable", "conda"]

SUPPORTED: dict[BackendName, str] = {"vllm": "0.9.1", "sglang": "0.4.8"}
LABELS: dict[BackendName, str] = {"vllm": "vLLM", "sglang": "SGLang"}

# Written last into a managed environment: without it, it is unfinished.
MARKER = ".fp8ctl-install.json"

__all__ = [
    "LABELS",
    "MARKER",
    "SUPPORTED",
    "BackendName",
    "Engine",
    "Environment",
    "Gpu",
    "Hardware",
    "RecordReport",
    "find",
    "install_hint",
    "managed_dir",
    "managed_environments",
    "managed_python",
    "parse_backend",
    "target_options",
    "verify_record",
]


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine in an environment.

    Attributes:
        version: as installed, with a local suffix such as `+cu126`.
        supported: whether fp8ctl knows this version.
        package_dir: the folder of the package; in the work tree if editable.
        source: where a VCS, local or editable install came from.
        shadowed_by: another folder of this name that is imported instead.
    """

    backend: BackendName
    version: str
    supported: bool
    kind: Kind
    dist_info: Path
    package_dir: Path
    installer: str | None
    record: RecordReport
    source: str | None = None
    shadowed_by: Path | None = None

    @property
    def label(self) -> str:
        """Name and version as people write them: `SGLang 0.4.8`."""
        return f"{LABELS[self.backend]} {self.version}"


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment a command works on.

    Attributes:
        python: its interpreter; None for a bare folder without one.
        origin: how it was found, a phrase to print.
        packages: normalised distribution name to version.
        writable: whether this user can write site-packages and every folder of
            every engine in it.
        gpus: of this machine, not of the environment.
        cuda: CUDA version that its torch was built for, such as "12.6", or None.
        duplicates: distributions with several metadata folders, and their versions.
        named: the user named it, so that it is taken again whatever else is made.
        front: options that make its overlay anew, where site_packages is that of an overlay.
    """

    python: Path | None
    python_version: tuple[int, int]
    site_packages: Path
    origin: str
    engines: tuple[Engine, ...]
    packages: Mapping[str, str]
    writable: bool
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    duplicates: Mapping[str, tuple[str, ...]] | None = None
    named: bool = False
    front: str | None = None

    def engine(
        self, backend: BackendName, known: Callable[[BackendName, str], bool] | None = None
    ) -> Engine:
        """Return the engine, in a version that fp8ctl knows.

        Args:
            backend: which engine.
            known: says of a version whether it will do; None: the supported one alone does.

        Raises:
            NotFoundError: it is not in this environment.
            UnsupportedError: it is there in another version.
        """
        wanted = SUPPORTED[backend]
        found = next((e for e in self.engines if e.backend == backend), None)
        if found is None:
            others = ", ".join(e.label for e in self.engines) or "no engine"
            gpu = "" if self.gpus or backend == "sglang" else ", and its wheel needs a GPU"
            raise NotFoundError(
                f"{LABELS[backend]} {wanted} is not in {self.site_packages} "
                f"({self.origin}); it holds {others}{gpu}",
                hint=install_hint(backend, stays=self.named),
                data={"site_packages": str(self.site_packages), "origin": self.origin},
            )
        if not (found.supported if known is None else known(backend, found.version)):
            raise UnsupportedError(
                f"{found.label} in {self.site_packages} is not supported; "
                f"fp8ctl knows {LABELS[backend]} {wanted}",
                hint=install_hint(backend, stays=self.named),
                data={"found": found.version, "expected": wanted},
            )
        return found

    @property
    def pip(self) -> str:
        """The start of a command that installs into this environment."""
        if self.python is None:
            # Without --upgrade pip leaves a folder alone that is there already.
            return f"pip install --upgrade --target {shlex.quote(str(self.site_packages))}"
        python = shlex.quote(str(self.python))
        if "pip" not in self.packages and any(e.installer == "uv" for e in self.engines):
            return f"uv pip install --python {python}"
        return f"{python} -m pip install"

    def reinstall(self, requirement: str) -> str:
        """Return the command that installs a package anew, as it was released."""
        if self.front is not None:
            return f"rm -r {shlex.quote(str(self.site_packages))} && fp8ctl patch{self.front}"
        # uv would take the file from its cache, which an editor may have written to.
        fresh = " --no-cache" if self.pip.startswith("uv ") else ""
        return f"{self.pip}{fresh} --force-reinstall --no-deps {requirement}"

    def require_patchable(
        self, backend: BackendName, known: Callable[[BackendName, str], bool] | None = None
    ) -> Engine:
        """Return the engine if its files are fp8ctl's to change; arguments as `engine`.

        Raises:
            NotFoundError, UnsupportedError: as `engine`.
            ConflictError: it is an editable install, whose files belong to a work tree.
        """
        found = self.engine(backend, known)
        if found.kind == "editable":
            raise ConflictError(
                f"{found.label} is an editable install: its files are the work tree "
                f"{found.package_dir}, which is version control's to change",
                hint=f"{install_hint(backend, stays=self.named)}, "
                f"or `patch -p1 -d {shlex.quote(str(found.package_dir.parent))}` with what "
                "`fp8ctl patch --dry-run --print-diff` prints of a plain installation",
                data={"package_dir": str(found.package_dir), "source": found.source},
            )
        return found


def parse_backend(text: str, argument: str = "--backend") -> BackendName:
    """Return `text` as the name of a backend.

    Args:
        text: what was typed.
        argument: what stands in front of the name where it is typed.

    Raises:
        UsageError: it is none.
    """
    if text in SUPPORTED:
        return text
    what = "backend" if argument == "--backend" else "engine"
    raise UsageError(
        f"unknown {what} {text!r}, expected {' or '.join(SUPPORTED)}",
        hint=" or ".join(f"{argument} {name}" for name in SUPPORTED),
    )


def target_options(python: Path | None, site_packages: Path | None) -> str:
    """Return the options that name an environment again, for a hint: with a space in front."""
    text = ""
    if python is not None:
        text += f" --python {shlex.quote(str(python))}"
    if site_packages is not None:
        text += f" --site-packages {shlex.quote(str(site_packages))}"
    return text


def install_hint(backend: BackendName, *, stays: bool = False) -> str:
    """Return the command that brings an engine, such that it ends well on this machine.

    Args:
        backend: the engine that is missing.
        stays: the environment at hand would be taken again, so that the new one has
            to be named from then on.
    """
    gpu = bool(hardware.detect().gpus)
    chosen: BackendName = backend if gpu else "sglang"  # vLLM's released wheel needs a GPU
    text = f"fp8ctl install {chosen}"
    if stays:
        python = managed_dir(chosen, "cuda" if gpu else "cpu") / "bin" / "python"
        text += f" && fp8ctl doctor{target_options(python, None)}"
    return text


def managed_dir(backend: BackendName, device: str) -> Path:
    """Return the folder where `fp8ctl install` puts this engine."""
    return paths.data_dir() / "engines" / f"{backend}-{SUPPORTED[backend]}-{device}"


def managed_python(backend: BackendName, device: str) -> Path | None:
    """Return the interpreter of a finished managed environment, or None."""
    folder = managed_dir(backend, device)
    return folder / "bin" / "python" if (folder / MARKER).is_file() else None


def managed_environments() -> tuple[Path, ...]:
    """Return the interpreters of all finished managed environments, sorted by folder."""
    markers = sorted((paths.data_dir() / "engines").glob(f"*/{MARKER}"))
    return tuple(m.parent / "bin" / "python" for m in markers)


def find(
    python: Path | None, site_packages: Path | None, backend: BackendName | None = None
) -> Environment:
    """Return the environment to work on.

    What the user named; else the first of the active virtual environment,
    fp8ctl's own and the managed ones that holds `backend` (any engine, if
    None) in the known version and not editable; else the first that holds it
    at all; else, with `engines` empty of it, the first of these that exists.
    Its method `engine` then says what is wrong or missing.

    Raises:
        UsageError: both an interpreter and a folder are named.
        NotFoundError: the named one is not there, or does not run.
    """
    if python is not None and site_packages is not None:
        raise UsageError(
            "--python and --site-packages exclude each other", hint="name one of the two"
        )
    if site_packages is not None:
        return replace(_of_folder(site_packages), named=True)
    if python is not None:
        return replace(_of_interpreter(_interpreter(python), "named by --python"), named=True)
    first: Environment | None = None
    second_best: tuple[Environment, Engine] | None = None
    for candidate, origin in _candidates():
        try:
            environment = _of_interpreter(candidate, origin)
        except NotFoundError:
            continue  # a stale VIRTUAL_ENV, an environment being removed
        engines = [e for e in environment.engines if backend in (None, e.backend)]
        if any(e.supported and e.kind != "editable" for e in engines):
            return _passing(environment, second_best)
        if engines and second_best is None:
            second_best = environment, engines[0]
        first = first or environment
    if second_best is not None:
        return second_best[0]
    assert first is not None, "fp8ctl's own environment always exists"
    return first


def _passing(environment: Environment, other: tuple[Environment, Engine] | None) -> Environment:
    """Return the environment with an origin that tells which one before it was passed over."""
    if other is None:
        return environment
    passed, engine = other
    fault = "editable" if engine.supported else "not supported"
    return replace(
        environment,
        origin=f"{environment.origin}; {passed.origin} has {engine.label}, which is {fault}",
    )


def _candidates() -> Iterator[tuple[Path, str]]:
    seen = set()
    for variable, origin in (
        ("VIRTUAL_ENV", "the active virtual environment"),
        ("CONDA_PREFIX", "the active conda environment"),
    ):
        prefix = os.environ.get(variable)
        if prefix and (Path(prefix) / "bin" / "python").exists():
            seen.add(os.path.realpath(prefix))
            yield Path(prefix) / "bin" / "python", origin
    if os.path.realpath(sys.prefix) not in seen:
        yield Path(sys.executable), "fp8ctl's own environment"
    for managed in managed_environments():
        yield managed, f"managed by fp8ctl, {managed.parent.parent.name}"


def _interpreter(python: Path) -> Path:
    # Never resolved: a venv's python is a link, and where it stands is what it is.
    path = python.expanduser()
    if path.is_dir() and (path / "bin" / "python").exists():
        path = path / "bin" / "python"
    elif os.sep not in str(python):
        path = Path(shutil.which(str(python)) or python)
    if not path.is_file():
        raise NotFoundError(
            f"no Python interpreter at {python}",
            hint="name the interpreter itself, such as /path/to/venv/bin/python",
        )
    return path.absolute()


def _of_interpreter(python: Path, origin: str) -> Environment:
    if python == Path(sys.executable):
        data = cast("dict[str, Any]", probe.describe())
    else:
        data = _ask(python)
    sites = cast("list[dict[str, Any]]", data["sites"])
    packages: dict[str, str] = {}
    duplicates: dict[str, tuple[str, ...]] = {}
    found: dict[str, dict[str, Any]] = {}
    for site in reversed(sites):  # the first on the path wins, as in an import
        packages.update(site["packages"])
        duplicates.update({k: tuple(v) for k, v in site["duplicates"].items()})
        found.update({e["name"]: e for e in reversed(site["engines"])})
    imports = cast("dict[str, str | None]", data["imports"])
    engines = tuple(_engine(found[n], imports.get(n)) for n in probe.ENGINES if n in found)
    folder = Path(engines[0].dist_info.parent if engines else str(data["purelib"]))
    version = (int(data["version"][0]), int(data["version"][1]))
    return _environment(python, version, folder, origin, engines, packages, duplicates)


def _of_folder(site_packages: Path) -> Environment:
    folder = site_packages.expanduser().absolute()
    try:
        data = cast("dict[str, Any]", probe.describe_site(str(folder)))
    except OSError as e:
        raise NotFoundError(
            f"cannot read the site-packages folder {site_packages}: {e.strerror}",
            hint="python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'",
        ) from e
    # .../lib/python3.12/site-packages tells its Python; a bare folder does not,
    # and is then compiled for with fp8ctl's own.
    match = re.fullmatch(r"python3\.(\d+)", folder.parent.name)
    version = (3, int(match.group(1))) if match else sys.version_info[:2]
    python = folder.parent.parent.parent / "bin" / "python"
    interpreter = python if match and python.exists() else None
    found = {e["name"]: e for e in reversed(data["engines"])}
    engines = tuple(_engine(found[n], None) for n in probe.ENGINES if n in found)
    duplicates = {k: tuple(v) for k, v in data["duplicates"].items()}
    return _environment(
        interpreter,
        version,
        folder,
        "named by --site-packages",
        engines,
        data["packages"],
        duplicates,
    )


def _environment(
    python: Path | None,
    version: tuple[int, int],
    folder: Path,
    origin: str,
    engines: tuple[Engine, ...],
    packages: dict[str, str],
    duplicates: dict[str, tuple[str, ...]],
) -> Environment:
    machine = hardware.detect()
    return Environment(
        python=python,
        python_version=version,
        site_packages=folder,
        origin=origin,
        engines=engines,
        packages=packages,
        writable=is_writable(folder) and not any(e.record.read_only_dirs for e in engines),
        gpus=machine.gpus,
        driver=machine.driver,
        cuda=_cuda(packages),
        duplicates=duplicates,
    )


def _ask(python: Path) -> dict[str, Any]:
    """Run the probe in another interpreter, with the caller's environment, as an engine would."""
    hint = "name the interpreter itself, such as /path/to/venv/bin/python"
    try:
        done = subprocess.run(
            [str(python), "-B", probe.__file__], capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NotFoundError(f"{python} does not run as a Python interpreter: {e}", hint=hint) from e
    try:
        data = json.loads(done.stdout)
    except ValueError as e:
        lines = [] if done.returncode == 0 else done.stderr.decode(errors="replace").split("\n")
        told = next((line.strip() for line in lines if line.strip()), "printed no JSON")
        raise NotFoundError(
            f"{python} does not run as a Python 3.8 or newer (exit {done.returncode}): {told}",
            hint=hint,
        ) from e
    return cast("dict[str, Any]", data)


def _engine(data: dict[str, Any], imported: str | None) -> Engine:
    backend = cast("BackendName", data["name"])
    package = Path(data["package_dir"])
    info = Path(data["dist_info"])
    conda = data["conda"] is not None or data["installer"] == "conda"
    kind: Kind = "editable" if data["editable"] else "conda" if conda else "wheel"
    shadow = None
    if imported and kind != "editable" and os.path.realpath(imported) != os.path.realpath(package):
        shadow = Path(imported)
    return Engine(
        backend=backend,
        version=data["version"],
        supported=_is_supported(backend, data["version"]),
        kind=kind,
        dist_info=info,
        package_dir=package,
        installer=data["installer"] or ("conda" if conda else None),
        record=RecordReport() if kind == "editable" else verify_record(info, backend),
        source=data["source"],
        shadowed_by=shadow,
    )


def _is_supported(backend: BackendName, version: str) -> bool:
    """Say whether a version is the known one; a local suffix (`+cu126`) does not matter."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(version).public) == Version(SUPPORTED[backend])
    except InvalidVersion:
        return False


def _cuda(packages: Mapping[str, str]) -> str | None:
    """Return the CUDA that torch was built for: by its suffix, else by the runtime beside it."""
    torch = packages.get("torch", "")
    suffix = re.search(r"\+cu(\d+)(\d)$", torch)
    if suffix:
        return f"{suffix.group(1)}.{suffix.group(2)}"
    if not torch or "+" in torch:
        return None
    for name in ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu11", "nvidia-cuda-runtime"):
        if name in packages:
            return ".".join(packages[name].split(".")[:2])
    return None
