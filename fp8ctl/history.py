"""`fp8ctl push-log`: which weights a server got when, and what differs between two versions.

The lines are those of a server (`GET` of `wire.LOG`) or of a file that `push --record`
wrote: of each update its tensors, then the update itself.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ctl import gate, wire
from fp8ctl.check.command import parse_url
from fp8ctl.engines.base import API_KEY_VARIABLE
from fp8ctl.errors import NotFoundError, NotPermittedError, UsageError
from fp8ctl.render import human_bytes, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from fp8ctl.render import Reporter

    Line = Mapping[str, Any]

_TIMEOUT = 60.0
_LIMIT = 256 << 20
_COLUMNS = ("version", "outcome", "started", "sent", "skipped", "bytes", "seconds", "rate")
_FACTS = ("amax", "saturated")
_RECORDS = "fp8ctl push URL --model M --record FILE writes one"


@dataclass(frozen=True, slots=True)
class Pushed:
    """One update.

    Attributes:
        line: what the log says of it.
        tensors: the line of each tensor, by name.
    """

    line: Line
    tensors: Mapping[str, Line] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """What the trainer called these weights."""
        return str(self.line.get("version", ""))

    @property
    def applied(self) -> bool:
        """Whether the server served them afterwards."""
        return self.line.get("outcome") == "applied"


def run(
    report: Reporter, *, source: str, versions: tuple[str, str] | None = None
) -> dict[str, object]:
    """Print the updates of a server or of a file; with two versions, what differs.

    Args:
        source: address of a server, or a file of `push --record`.

    Raises:
        UsageError: a file that is no such log.
        NotFoundError: no such file, server, log or version.
        NotPermittedError: the server wants an API key, or another one.
    """
    told: dict[str, object]
    if "://" in source:
        url = parse_url(source)
        updates, told = group(_of_server(url)), {"url": url}
    else:
        path = Path(source).expanduser()
        updates, told = group(_of_file(path)), {"file": str(path)}
    if versions is not None:
        return {**told, **_diff(report, updates, *versions)}
    if updates:
        report.table(_COLUMNS, [_row(one.line) for one in updates])
    else:
        report.say("nothing was pushed yet")
    return {**told, "updates": [dict(one.line) for one in updates]}


def group(lines: Iterable[Line]) -> list[Pushed]:
    """Return the updates, each with the tensors whose lines stand before its own.

    Lines without an update behind them are dropped: their writer was killed, or still writes.
    """
    found: list[Pushed] = []
    tensors: dict[str, Line] = {}
    for line in lines:
        if line.get("kind") == "tensor":
            tensors[str(line["name"])] = line
        elif line.get("kind") == "update":
            # A recorded update that was killed left its tensors in front of the next one's.
            own = line.get("push")
            kept = {n: one for n, one in tensors.items() if one.get("push", own) == own}
            found.append(Pushed(line, kept))
            tensors = {}
    return found


def held(updates: Sequence[Pushed], version: str) -> dict[str, Line]:
    """Return what a server held when it had got `version`: of each tensor its newest line.

    An update may bring a part; the rest is that of the updates before it.

    Raises:
        NotFoundError: no update brought that version whole.
    """
    ends = [i for i, one in enumerate(updates) if one.applied and one.version == version]
    if not ends:
        known = list(dict.fromkeys(one.version for one in updates if one.applied))
        there = f"there is {', '.join(known[-8:])}" if known else "no update was applied yet"
        raise NotFoundError(
            f"version {version!r} is not in the log; {there}",
            hint="fp8ctl push-log URL|FILE lists them, without --diff",
        )
    state: dict[str, Line] = {}
    for one in updates[: ends[-1] + 1]:
        if not one.applied:
            continue
        for name, line in one.tensors.items():
            # Of a tensor that was not sent, since it is there, no facts were gathered anew.
            older: Line = {} if line.get("sent", True) else state.get(name, {})
            state[name] = {**older, **line}
    return state


def differences(before: Mapping[str, Line], after: Mapping[str, Line]) -> list[dict[str, object]]:
    """Return of each tensor of two versions whether it changed, and what is known of both.

    `changed` is None where one side has no digest: nobody knows.
    """
    found: list[dict[str, object]] = []
    for name in {**before, **after}:
        old, new = before.get(name, {}), after.get(name, {})
        pair = str(old.get("digest") or ""), str(new.get("digest") or "")
        one: dict[str, object] = {
            "name": name,
            "changed": pair[0] != pair[1] if all(pair) else None,
            "digests": list(pair),
            "bytes": int(new.get("bytes") or 0),
        }
        for fact in _FACTS:
            if fact in old or fact in new:
                one[fact] = [old.get(fact), new.get(fact)]
        found.append(one)
    return found


def _diff(report: Reporter, updates: Sequence[Pushed], old: str, new: str) -> dict[str, object]:
    found = differences(held(updates, old), held(updates, new))
    counts = {
        word: sum(1 for one in found if one["changed"] is value)
        for word, value in (("changed", True), ("unchanged", False), ("unknown", None))
    }
    rows = [
        [str(one["name"]), *(str(d)[:16] or "-" for d in _pair(one, "digests")), *_facts(one)]
        for one in found
        if one["changed"] is not False
    ]
    if rows:
        columns = ("tensor", old, new, *(f"{fact} {v}" for fact in _FACTS for v in (old, new)))
        report.table(columns, rows)
    sent = _sent(updates, old, new)
    report.data(
        f"{old} -> {new}: {plural(counts['changed'], 'tensor')} of {len(found)} changed,"
        f" {counts['unchanged']} did not"
        + (f", {counts['unknown']} have no digest" if counts["unknown"] else "")
        + f"; {human_bytes(sent)} sent from one to the other"
    )
    return {"versions": [old, new], "counts": counts, "bytes": sent, "tensors": found}


def _sent(updates: Sequence[Pushed], old: str, new: str) -> int:
    """Return the bytes of what was applied behind `old`, up to `new`; whichever came first."""
    last = {one.version: i for i, one in enumerate(updates) if one.applied}
    first, end = sorted((last[old], last[new]))
    between = (one for one in updates[first + 1 : end + 1] if one.applied)
    return sum(int(one.line.get("bytes") or 0) for one in between)


def _pair(one: Mapping[str, object], key: str) -> Sequence[object]:
    value = one.get(key, (None, None))
    assert isinstance(value, list | tuple)
    return value


def _facts(one: Mapping[str, object]) -> Iterator[str]:
    for fact in _FACTS:
        for value in _pair(one, fact):
            yield f"{value:.6g}" if isinstance(value, int | float) else "-"


def _row(line: Line) -> list[str]:
    took = line.get("seconds") or 0.0
    whole = float(line.get("ended") or 0.0) - float(line.get("started") or 0.0)
    seconds = whole if isinstance(took, dict) or not took else float(took)
    size = int(line.get("bytes") or 0)
    started = float(line.get("started") or 0.0)
    return [
        str(line.get("version", "")),
        str(line.get("outcome", "")),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)),
        str(line.get("tensors", "")),
        str(line.get("skipped", "")),
        human_bytes(size),
        f"{seconds:.2f}",
        f"{human_bytes(size / seconds)}/s" if seconds > 0 else "-",
    ]


def _of_file(path: Path) -> Iterator[Line]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise NotFoundError(f"cannot read {path}: {e.strerror}", hint=_RECORDS) from e
    found = [line for line in map(_line, lines) if line is not None]
    if lines and not found:
        raise UsageError(
            f"{path} has no line of a log of updates",
            hint=_RECORDS,
        )
    yield from found


def _line(text: bytes) -> Line | None:
    """Return a line of a log, None for another: a writer that was killed leaves half a line."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "kind" in found else None


def _of_server(url: str) -> Iterator[Line]:
    after = 0
    while True:
        path = f"{wire.LOG}?after={after}"
        try:
            status, body = gate.get(url, path, gate.api_key(), _TIMEOUT, _LIMIT)
        except (OSError, http.client.HTTPException) as e:
            raise NotFoundError(
                f"{url} does not answer: {type(e).__name__}: {e}", hint="fp8ctl ps"
            ) from e
        if status in {401, 403}:
            raise NotPermittedError(
                f"{url} answers {status}: it wants an API key",
                hint=f"export {API_KEY_VARIABLE}=KEY",
            )
        try:
            found = json.loads(body) if status == 200 else {}
            lines, following = found["lines"], int(found["next"])
        except (ValueError, KeyError, TypeError):
            raise NotFoundError(
                f"{url} has no log of updates: {wire.LOG} answers {status}",
                hint="fp8ctl launch --backend BACKEND --model MODEL starts one that has",
            ) from None
        yield from lines
        if not lines or following <= after:
            return
        after = following
