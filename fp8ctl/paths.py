"""Where fp8ctl keeps what is its own, and nothing else.

State of patched files lives in the patched environment (`patching.store`);
these folders hold what can be rebuilt (cache), managed engines (data) and
running servers (state, 0700). `FP8CTL_HOME` puts all three under one folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from fp8ctl.errors import NotPermittedError


def _base(variable: str, fallback: str, kind: str) -> Path:
    home = os.environ.get("FP8CTL_HOME")
    if home:
        return Path(home).expanduser().absolute() / kind
    root = os.environ.get(variable)
    if root and os.path.isabs(root):  # the specification has relative ones ignored
        return Path(root) / "fp8ctl"
    try:
        return Path.home() / fallback / "fp8ctl"
    except RuntimeError as e:
        raise NotPermittedError(
            f"user {os.getuid()} has no home folder", hint="export FP8CTL_HOME=/a/folder/you/own"
        ) from e


def cache_dir() -> Path:
    """Return the folder of things that can be made again: models, wheels, quantised checkpoints."""
    return _base("XDG_CACHE_HOME", ".cache", "cache")


def data_dir() -> Path:
    """Return the folder of managed engine environments."""
    return _base("XDG_DATA_HOME", ".local/share", "data")


def state_dir() -> Path:
    """Return the folder of running servers, created 0700 and owned by this user.

    Raises:
        NotPermittedError: the folder cannot be made, or belongs to somebody else.
    """
    path = _base("XDG_STATE_HOME", ".local/state", "state")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        owner = path.stat().st_uid
    except OSError as e:
        raise NotPermittedError(
            f"cannot use {path} for server state: {e.strerror}",
            hint="export FP8CTL_HOME=/a/folder/you/own",
        ) from e
    if owner != os.getuid():
        raise NotPermittedError(
            f"{path} belongs to user {owner}, not to {os.getuid()}",
            hint="export FP8CTL_HOME=/a/folder/you/own",
        )
    return path
