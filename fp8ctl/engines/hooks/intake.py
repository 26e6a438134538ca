"""A bucket of a push: read from its request, loaded by every rank."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ctl import wire
from fp8ctl.engines.hooks.refused import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8ctl.engines.hooks.openpush import OpenPush
    from fp8ctl.engines.hooks.workers import Workers


def require_place(found: Mapping[str, Any]) -> None:
    """Refuse a bucket that does not say where it lies.

    Raises:
        WireError: it does not.
    """
    if type(found.get("nbytes")) is not int or type(found.get("slot")) is not int:
        raise wire.WireError("slot and nbytes: expected whole numbers")


def read(found: Mapping[str, Any], *, disk: bool) -> list[wire.Entry]:
    """Return the entries of a bucket.

    Args:
        found: the request.
        disk: the bucket is a folder.

    Raises:
        WireError: it does not say what it should.
    """
    entries = found.get("entries")
    if not disk:
        require_place(found)
        return wire.read_entries(entries, found["nbytes"])
    path = found.get("path")
    if not isinstance(path, str) or not path.startswith("/"):
        raise wire.WireError(f"path {path!r}; expected a folder that starts with /")
    # In files of their own, no tensor lies at a place in a bucket.
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise wire.WireError("entries: expected a list of objects")
    read = [wire.read_entries([{**e, "offset": 0}], 1 << 62)[0] for e in entries]
    if len({entry.name for entry in read}) < len(read):
        raise wire.WireError("a name comes twice in one folder")
    return read


class Loaded(NamedTuple):
    """What became of a bucket.

    Attributes:
        told: loaded: how many tensors went in; seconds: of each stage on the slowest rank; ways:
            how many went through loaders and how many were copied, most on any rank, where it is
            told.
        then: what each rank answered to what it was asked behind it.
    """

    told: dict[str, Any]
    then: Sequence[Mapping[str, Any]]


async def load(
    workers: Workers,
    push: OpenPush,
    found: Mapping[str, Any],
    listed: Mapping[str, Any] | None,
    then: Mapping[str, Any] | None = None,
) -> Loaded:
    """Have every rank load a bucket; marks the push as touched where a weight may be written.

    Args:
        workers: that are asked.
        push: that it is of.
        found: the request.
        listed: what they are told of what lies in it; None where it is a folder.
        then: what they are asked behind it, where the update ends with it.

    Raises:
        RefusedError: a rank failed; `push.touched` says whether any weight may have changed.
        RuntimeError: a rank did not answer: weights may have changed.
    """
    if listed is None:
        seconds = await folder(workers, push, found["path"])
        return Loaded({"loaded": len(found["entries"]), "seconds": seconds}, ())
    before, push.touched = push.touched, True  # until the ranks say otherwise
    details = {name: found[name] for name in ("number", "slot", "nbytes")}
    answers = await workers.receive({**details, **listed}, then)
    errors = [f"rank {rank}: {a['error']}" for rank, a in enumerate(answers) if a["error"]]
    if errors:
        untouched = all(a["error"] and not a["loaded"] and not a["broken"] for a in answers)
        push.touched = before or not untouched
        raise RefusedError(500, "FP8-LOAD", "; ".join(errors))
    loaded: dict[str, Any] = {"loaded": min(int(a["loaded"]) for a in answers)}
    loaded["seconds"] = _most(a.get("seconds", {}) for a in answers)
    ways = _most(a.get("ways", {}) for a in answers)
    behind = [a["then"] for a in answers if "then" in a]
    return Loaded({**loaded, "ways": ways} if ways else loaded, behind)


def _most(told: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the largest value of each name on any rank."""
    most: dict[str, float] = {}
    for one in told:
        for name, value in one.items():
            most[name] = max(value, most.get(name, 0))
    return most


async def folder(workers: Workers, push: OpenPush, path: str) -> dict[str, float]:
    """Have every rank load a folder; as `load`, but for what it returns: the seconds alone."""
    before, push.touched = push.touched, True
    started = time.monotonic()
    done = await workers.load_from_disk(path)
    if not done.ok:
        push.touched = before or done.changed
        raise RefusedError(500, "FP8-LOAD", done.message)
    return {"load": time.monotonic() - started}
