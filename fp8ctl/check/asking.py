"""What the weights level asks a server, over HTTP: its report, and more of a few tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fp8ctl.engines.base import is_loopback
from fp8ctl.errors import CheckFailedError
from fp8ctl.gate import without_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REPORT_PATH, INSPECT_PATH = "/fp8ctl/report", "/fp8ctl/inspect"
#: Seconds for all workers to digest their weights: about 1 s per GB on a busy CPU core.
TIMEOUT = 900.0


def _post(url: str, api_key: str | None, body: object = None) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    trust = not is_loopback(urlsplit(url).hostname or "")
    return httpx.post(url, json=body, headers=headers, timeout=TIMEOUT, trust_env=trust)


def report(url: str, api_key: str | None) -> dict[str, Any] | None:
    """Return the server's report; None where it has no such route."""
    import httpx

    try:
        answer = _post(url + REPORT_PATH, api_key)
    except httpx.RequestError as e:
        raise CheckFailedError(
            f"{url}{REPORT_PATH} does not answer: {type(e).__name__}: {e}", hint="fp8ctl ps"
        ) from e
    if answer.status_code in {404, 405, 501}:
        return None
    if answer.status_code != 200:
        said = without_key(answer.text, api_key)[:300]
        raise CheckFailedError(
            f"{url}{REPORT_PATH} answers {answer.status_code}: {said}",
            hint="fp8ctl logs NAME",
        )
    try:
        found: dict[str, Any] = answer.json()
        sound = {"state", "manifest", "ranks"} <= found.keys()
    except (ValueError, AttributeError):
        sound = False
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
        answer = _post(url + INSPECT_PATH, api_key, body)
        lines = answer.json()["tensors"] if answer.status_code == 200 else []
    except (httpx.RequestError, ValueError, KeyError, TypeError):
        return []
    return lines if isinstance(lines, list) else []
