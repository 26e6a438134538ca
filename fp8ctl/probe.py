"""What one Python environment holds, read from metadata alone.

Runs in two ways: as a script inside the target interpreter (`python probe.py`,
which prints JSON), and imported by `environment` for a bare folder. Standard
library only, Python 3.8 syntax, and it never imports a package that it finds:
importing torch or vllm takes seconds and may start CUDA.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Python put this file's folder, fp8ctl's own, in front: `fp8ctl/check` must
    # not become `import check` here.
    del sys.path[0]

import json
import os
import re

ENGINES = ("vllm", "sglang")
# Where an editable install keeps the package under its project folder.
_LAYOUTS = ("", "python", "src")


def normalise(name: str) -> str:
    """Return a distribution name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError:
        return None


def _identity(folder: str) -> tuple[str, str] | None:
    """Return (name, version) of a metadata folder, from its file where there is one."""
    for file in ("METADATA", "PKG-INFO"):
        text = _read(os.path.join(folder, file))
        if text:
            name = re.search(r"^Name:\s*(\S+)", text, re.M)
            version = re.search(r"^Version:\s*(\S+)", text, re.M)
            if name and version:
                return name.group(1), version.group(1)
    match = re.match(r"(.+?)-(.+)\.(?:dist|egg)-info$", os.path.basename(folder))
    return (match.group(1), match.group(2)) if match else None


def _editable_package(url: str, name: str) -> str | None:
    from urllib.parse import unquote, urlparse

    root = unquote(urlparse(url).path)
    for layout in _LAYOUTS:
        folder = os.path.join(root, layout, name)
        if os.path.isfile(os.path.join(folder, "__init__.py")):
            return folder
    return None


def _engine(
    site: str, entry: str, name: str, version: str, prefix: str | None
) -> dict[str, object]:
    info = os.path.join(site, entry)
    direct: dict[str, object] = {}
    text = _read(os.path.join(info, "direct_url.json"))
    if text:
        try:
            loaded = json.loads(text)
        except ValueError:
            loaded = None
        direct = loaded if isinstance(loaded, dict) else {}
    details = direct.get("dir_info")
    editable = isinstance(details, dict) and bool(details.get("editable"))
    source = direct.get("url")
    package = os.path.join(site, name)
    # `setup.py develop` leaves a link file and no direct_url.json.
    link = _read(os.path.join(site, name + ".egg-link"))
    if link:
        editable, source = True, "file://" + link.splitlines()[0].strip()
    if editable and isinstance(source, str):
        package = _editable_package(source, name) or package
    conda = None
    if prefix:
        folder = os.path.join(prefix, "conda-meta")
        if os.path.isdir(folder):
            pattern = re.compile(re.escape(name) + r"-\d[^-]*-[^-]*\.json$")
            conda = next((f for f in sorted(os.listdir(folder)) if pattern.match(f)), None)
    installer = _read(os.path.join(info, "INSTALLER"))
    record = os.path.join(info, "RECORD")
    return {
        "name": name,
        "version": version,
        "site": site,
        "dist_info": info,
        "package_dir": package,
        "installer": installer.strip() if installer else None,
        "editable": editable,
        "source": source if isinstance(source, str) else None,
        "vcs": isinstance(direct.get("vcs_info"), dict),
        "conda": conda,
        "record": record if os.path.isfile(record) else None,
    }


def describe_site(site: str, prefix: str | None = None) -> dict[str, object]:
    """Return what one site-packages folder holds.

    Keys: `packages` (normalised name to version), `duplicates` (name to the
    versions of all its metadata folders, where there are several), `engines`.

    Raises:
        OSError: the folder cannot be listed.
    """
    packages: dict[str, str] = {}
    engines: list[dict[str, object]] = []
    seen: dict[str, list[str]] = {}
    for entry in sorted(os.listdir(site)):
        if not entry.endswith((".dist-info", ".egg-info")):
            continue
        match = re.match(r"(.+?)-(.+)\.(?:dist|egg)-info$", entry)
        guess = normalise(match.group(1)) if match else normalise(entry.rsplit(".", 1)[0])
        # Folder names carry the name and the version already; only what a finding
        # will quote is read from the file itself.
        found: tuple[str, str] | None = (guess, match.group(2)) if match else None
        if guess in ENGINES or found is None:
            found = _identity(os.path.join(site, entry)) or found
        if found is None:
            continue
        name, version = normalise(found[0]), found[1]
        seen.setdefault(name, []).append(version)
        packages[name] = version
        if name in ENGINES:
            engines.append(_engine(site, entry, name, version, prefix))
    duplicates = {name: versions for name, versions in seen.items() if len(versions) > 1}
    return {"site": site, "packages": packages, "duplicates": duplicates, "engines": engines}


def first_package(paths: list[str], name: str) -> str | None:
    """Return the folder that `import name` would take from these paths."""
    for path in paths:
        folder = os.path.join(path, name)
        if os.path.isfile(os.path.join(folder, "__init__.py")):
            return folder
    return None


def describe() -> dict[str, object]:
    """Return what the running interpreter sees: itself, and every site on its path."""
    import sysconfig

    paths = [p for p in sys.path if p and os.path.isdir(p)]
    sites = []
    # lib64 is a link to lib in many environments: one folder, one site.
    for path in {os.path.realpath(p): p for p in reversed(paths)}.values():
        try:
            site = describe_site(path, sys.prefix)
        except OSError:
            continue
        if site["packages"]:
            sites.append(site)
    return {
        "executable": sys.executable,
        "version": list(sys.version_info[:3]),
        "prefix": sys.prefix,
        "purelib": sysconfig.get_paths()["purelib"],
        "sites": sites[::-1],
        "imports": {name: first_package(paths, name) for name in ENGINES},
    }


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
