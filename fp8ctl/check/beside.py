"""Whether an update ran beside a look, which judges nothing then.

A trainer updates all the time: what was asked was asked of two sets of weights, or answered 503.
Called by `watch`, and by `supervisor`, whose server has other weights than it was started on then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fp8ctl import gate
from fp8ctl.check import live

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8ctl.check.levels import Found

WHY: Final = "the weights changed beside this check, which judges nothing"
#: What no update explains.
_OTHER: Final = {"bf16-fallback", "unreachable"}


def update_ran(found: Found, since: Mapping[str, object], key: str | None) -> bool:
    """Return whether a fault that was found may be an update's, and one ran.

    Args:
        found: what was found.
        since: what the server told of itself before, of which `state` and `updates` are read.
        key: the server's API key.
    """
    end = found.conclusion
    if end.result == "ok" or found.live.other_code or end.verdict in _OTHER:
        return False
    if since.get("state") == "updating":
        return True
    now = gate.ask(found.data["url"], key, live.STATE_TIMEOUT)
    told = now.data.get("updates")  # no stock server tells it
    return now.state == "updating" or (told is not None and told != since.get("updates"))
