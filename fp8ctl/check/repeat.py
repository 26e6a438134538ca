"""Two greedy answers to one request: are they one, or two that rounding may choose between?

What else a server computes at the same time decides how large its batches are, and by which
kernel they are multiplied: the last bits of log-probabilities follow. Where the two likeliest
tokens are that close, a busy server that is well gives now one and now the other. Pure.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from fp8ctl.check.verdict import Evidence
from fp8ctl.check.words import short

#: How far apart in nats two tokens may be that rounding exchanges: of an FP8 model in batches of 1
#: to 33, 0.22 were seen in 156 pairs (docs/evidence).
NEAR: Final = 0.5
#: What is farther apart than this is a fault. In between nothing is said: 0.62 were seen once, of a
#: busy server whose weights were right bit for bit.
FAR: Final = 2.0
#: Likeliest tokens that are asked for: as many as both engines tell anybody.
TOLD: Final = 5
EXPECTED: Final = "one answer"


class _Apart(NamedTuple):
    """By how much rounding has to move log-probabilities for both answers, at the least.

    Attributes:
        nats: or more, where it is not exact.
        exact: False where a token was not told, since others are as likely or likelier.
    """

    nats: float
    exact: bool = True


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
    if apart is None:
        return Evidence("repeat", "failed", found, EXPECTED)
    if not apart.nats <= NEAR:
        more = "" if apart.exact else " or more"
        found += f", {apart.nats:.2f} nats{more} apart"
        if not apart.nats <= FAR:
            return Evidence("repeat", "failed", found, EXPECTED)
        why = (
            f"{found}: more than rounding most often does; ask again when the server has less to do"
        )
        return Evidence("repeat", "not visible", why)
    if not apart.exact:
        why = f"{found}: more tokens than the server tells are as likely as the likeliest"
        return Evidence("repeat", "not visible", why)
    found += f": as likely to {apart.nats:.3f} nats, so rounding decides"
    return Evidence("repeat", "ok", found)


def _apart(one: Any, other: Any) -> _Apart | None:
    """Return how far apart two answers are where they part; None: it is not told.

    Up to there each token has to be as likely in both; there both tokens have to be as likely in
    both, as each other, and as the likeliest. One that is not among the likeliest that are told
    is as likely as the last of them at the most.
    """
    try:
        for number, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=False)):
            exact = True
            if a == b:
                values = [float(told["token_logprobs"][number]) for told in (one, other)]
            else:
                values = []
                for told, mine in ((one, a), (other, b)):
                    top = {t: float(value) for t, value in told["top_logprobs"][number].items()}
                    if mine not in top or len(top) < 2:
                        return None
                    exact = exact and a in top and b in top
                    values += [top.get(t, min(top.values())) for t in (a, b)]
                    values.append(max(top.values()))
            if not all(map(math.isfinite, values)):
                return None
            apart = _Apart(max(values) - min(values), exact)
            if a != b or apart.nats > NEAR:
                return apart
    except (TypeError, KeyError, IndexError, ValueError, OverflowError, AttributeError):
        return None
    return None  # they are the same as far as they are told, and the texts are not
