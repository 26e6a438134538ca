"""Two greedy answers to one request: are they one, or two that rounding may choose between?

What else a server computes at the same time decides how large its batches are, and by which
kernel they are multiplied: the last bits of log-probabilities follow. Where the two likeliest
tokens are that close, a busy server that is well gives now one and now the other. Pure.
"""

from __future__ import annotations

import math
from typing import Any, Final

from fp8ctl.check.verdict import Evidence

#: How far apart in nats two tokens may be that rounding exchanges: batches of 1 and of 64 move a
#: log-probability of an FP8 model by some 0.1.
NEAR: Final = 0.25
EXPECTED: Final = "one answer"


def judge(one: Any, other: Any) -> Evidence:
    """Return what two choices of `/v1/completions` say of the server.

    Args:
        one, other: with `text`, and with `logprobs` where the server gave any: `tokens` and
            `top_logprobs` of at least two tokens for each place.
    """
    if one["text"] == other["text"]:
        return Evidence("repeat", "ok", "two greedy requests, one answer")
    found = f"{_short(one['text'])!r}, then {_short(other['text'])!r}"
    gap = _gap(one.get("logprobs"), other.get("logprobs"))
    if gap is None or not gap <= NEAR:
        by = "" if gap is None else f", {gap:.2f} nats apart"
        return Evidence("repeat", "failed", found + by, EXPECTED)
    return Evidence("repeat", "ok", f"{found}: as likely to {gap:.3f} nats, so rounding decides")


def _gap(one: Any, other: Any) -> float | None:
    """Return how far apart the tokens are with which two answers part; None: not told."""
    try:
        for number, pair in enumerate(zip(one["tokens"], other["tokens"], strict=False)):
            if pair[0] != pair[1]:
                tops = (one["top_logprobs"][number], other["top_logprobs"][number])
                return max(abs(float(top[pair[0]]) - float(top[pair[1]])) for top in tops)
    except (TypeError, KeyError, IndexError, ValueError):
        return None
    return math.nan  # they are the same as far as they are told, and the texts are not


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 80 else flat[:79] + "…"
