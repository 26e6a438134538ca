"""The plan of the model that this server serves, as `launch` left it in the run folder."""

from __future__ import annotations

import json
from typing import Any

from fp8ctl import formats
from fp8ctl.engines.hooks import ranklog


def read() -> dict[str, Any]:
    """Return the plan's JSON; {} where the server was started without one."""
    folder = ranklog.run_dir()
    path = folder / "manifest.json" if folder else None
    if path is None or not path.exists():
        return {}
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def expected_names(manifest: dict[str, Any]) -> list[str]:
    """Return the names of all tensors that a complete push of a plan's model brings."""
    names: list[str] = []
    for tensor in manifest.get("tensors", []):
        names.append(tensor["name"])
        if tensor["quantize"]:
            names.append(formats.scale_name(tensor["name"], formats.Mode(manifest["mode"])))
    return names
