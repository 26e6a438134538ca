"""Two greedy answers to one request: are they one, or two that rounding may choose between?

What else a server computes at the same time decides how large its batches are, and by which
kernel they are multiplied: the last bits of log-probabilities follow. Where the two likeliest
tokens are that close, a busy server that is well gives now one and now the other. Pure.
"""

from __future__ import annotations

import math
from typing import Any, Final

from fp8ctl.check.verdict import Evidence
from fp8ctl.check.words import short

#: How far apart in nats two tokens may be that rounding exchanges: batches of 1 and of 64 move a
#: log-probability of an FP8 model by some 0.1.
NEAR: Final = 0.25
EXPECTED: Final = "one answer"


def judge(one: Any, other: Any) -> Evidence:
    """Return what two choices of `/v1/completions` say of the server.

    Args:
        one, other: with `text`, and with `logprobs` where the server gave any: `tokens`,
            `token_logprobs` and `top_logprobs` of at least two tokens for each place.
    """
    if one["text"] == other["text"]:
        return Evidence("repeat", "ok", "two greedy requests, one answer")
    found = f"{short(one['text'])!r}, then {short(other['text'])!r}"
    apart = _apart(one.get("logprobs"), other.get("logprobs"))
    if apart is None or not apart <= NEAR:
        by = "" if apart is None else f", {apart:.2f} nats apart"
        return Evidence("repeat", "failed", found + by, EXPECTED)
    return Evidence("repeat", "ok", f"{found}: as likely to {apart:.3f} nats, so rounding decides")


def _apart(one: Any, other: Any) -> float | None:
    """Return by how much rounding has to move log-probabilities for both; None: not told.

    Up to where they part each token has to be as likely in both; there both tokens have to be as
    likely in both, as each other, and as the likeliest.
    """
    try:
        for number, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=False)):
            if a == b:
                values = [float(told["token_logprobs"][number]) for told in (one, other)]
            else:
                tops = [told["top_logprobs"][number] for told in (one, other)]
                values = [float(top[token]) for top in tops for token in (a, b)]
                values += [max(map(float, top.values())) for top in tops]
            if not all(map(math.isfinite, values)):
                return None
            apart = max(values) - min(values)
            if a != b or apart > NEAR:
                return apart
    except (TypeError, KeyError, IndexError, ValueError, OverflowError, AttributeError):
        return None
    return None  # they are the same as far as they are told, and the texts are not
