"""What the weights level asks a server, over HTTP: its report, and more of a few tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8ctl.check.answers import Server
from fp8ctl.errors import CheckFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.check.answers import Reply

REPORT_PATH, INSPECT_PATH = "/fp8ctl/report", "/fp8ctl/inspect"
#: Seconds for all workers to digest their weights: about 1 s per GB on a busy CPU core.
TIMEOUT = 900.0
#: Bytes of a report: 140 000 lines of each of 32 ranks; and of values: 64 MiB, packed.
_REPORT, _VALUES = 1 << 30, 256 << 20


class ChangingError(Exception):
    """The weights do not stay the same for as long as they are digested."""


def _post(url: str, path: str, api_key: str | None, limit: int, body: object = None) -> Reply:
    with Server(url, api_key, TIMEOUT) as server:
        return server.post(path, body, limit, as_sent=True)


def report(url: str, api_key: str | None) -> dict[str, Any] | None:
    """Return the server's report; None where it has no such route.

    Raises:
        ChangingError: updates follow each other too fast.
        CheckFailedError: it does not answer, or refuses.
    """
    import httpx

    try:
        reply = _post(url, REPORT_PATH, api_key, _REPORT)
    except httpx.RequestError as e:
        raise CheckFailedError(
            f"{url}{REPORT_PATH} does not answer: {type(e).__name__}: {e}", hint="fp8ctl ps"
        ) from e
    if reply.status in {404, 405, 501}:
        return None
    if isinstance(reply.body, dict) and reply.body.get("id") == "FP8-BUSY":
        raise ChangingError(f"the server tells no weights now: {reply.text[:300]}")
    if reply.status != 200:
        raise CheckFailedError(
            f"{url}{REPORT_PATH} answers {reply.status}: {reply.text[:300]}",
            hint="fp8ctl logs NAME",
        )
    found = reply.body
    sound = isinstance(found, dict) and {"state", "manifest", "ranks"} <= found.keys()
    return found if sound else None  # something else answers any POST with 200


def more(
    url: str,
    api_key: str | None,
    names: Sequence[str],
    rows: Mapping[str, Sequence[int]],
    most: int,
) -> list[dict[str, Any]]:
    """Return the lines of all ranks about some tensors; none where the server cannot say."""
    import httpx

    if not names:
        return []
    body = {"names": list(names), "rows": dict(rows), "most": most}
    try:
        reply = _post(url, INSPECT_PATH, api_key, _VALUES, body)
        lines = reply.body["tensors"] if reply.status == 200 else []
    except (httpx.RequestError, KeyError, TypeError):
        return []
    return lines if isinstance(lines, list) else []
