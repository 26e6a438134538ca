"""Which explanation of a server's log-probabilities fits best, and by how much. Pure.

Of every token of some fixed texts there is what the server says, s, and what a hypothesis
expects, h. What is told of s - h:

- mean and 99th percentile of its magnitude;
- k3 = r - 1 - log r with r = exp(h - s), averaged: never negative, zero where the two agree.
  J. Schulman, "Approximating KL Divergence", 2020 (http://joschu.net/blog/kl-approx.html): of
  tokens sampled from the server it is an unbiased estimate of KL(server || h), which is what
  trainers print as mismatch. Here the tokens are given, not sampled, so it is a distance of
  the same kind, dominated by tokens that h finds likelier than the server does;
- how often the likeliest token is the same one.

A hypothesis is computed twice (`expectation`): plain, where an engine lies on average, and
in the engines' arithmetic, whose rounding to FP8 scatters around it. The scatter of the
second around the first, `noise`, is therefore what a right server must be expected to show,
and `ratio` = mean |s - h| / noise is near 1 for the right hypothesis, whatever the model.
Of the two computations the nearer one counts: a shallow model follows the rounding itself.

Whether one hypothesis fits better than another is asked of every text: the mean over texts
of the difference of their mean magnitudes, in standard errors (`sigmas`). Tokens of one
text are not independent of each other, texts are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fp8ctl.formats import Mode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fp8ctl.check.prompts import Scores

APART: Final = 4.0
"""Standard errors between two hypotheses that are told apart."""

EXPLAINED: Final = 1.5
"""Largest `ratio` of a hypothesis that explains a server; 0.85 to 1.15 were seen of right ones."""

FLOOR: Final = 0.002
"""Least noise that is believed: two builds of one engine differ by as much."""

NO_NUMBER: Final = -9999.0
"""Counts for a log-probability that is no number, as vLLM spells minus infinity."""

BARS: Final = 40

BF16: Final = "bf16"
BROKEN: Final = "broken"
FP8: Final = {mode: f"fp8-{mode.value}" for mode in Mode}
#: Stands in front of those whose scales are dropped.
UNSCALED: Final = "unscaled-"


@dataclass(frozen=True, slots=True)
class Summary:
    """How far a server is from a hypothesis; the module says what each number is."""

    mean_abs: float
    p99_abs: float
    k3_kl: float
    top1: float
    tokens: int

    def to_json(self) -> dict[str, float | int]:
        """Return the numbers as JSON types."""
        return {
            "mean_abs": self.mean_abs,
            "p99_abs": self.p99_abs,
            "k3_kl": self.k3_kl,
            "top1": self.top1,
            "tokens": self.tokens,
        }


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a server might be.

    Attributes:
        name: `bf16`, `fp8-block` and so on.
        plain: what it would say on average.
        engine: the same in the engines' arithmetic.
        sound: False for a known fault.
    """

    name: str
    plain: Scores
    engine: Scores
    sound: bool = True


@dataclass(frozen=True, slots=True)
class Fit:
    """A hypothesis beside what the server said.

    Attributes:
        name: of the hypothesis.
        summary: of the nearer one of its two computations.
        nearer: which: `plain` or `engine`.
        noise: what the arithmetic alone does to it.
        per_text: mean magnitude of each text.
    """

    name: str
    summary: Summary
    nearer: str
    noise: float
    per_text: tuple[float, ...] = field(repr=False)

    @property
    def ratio(self) -> float:
        """How many times as far from the server as its noise."""
        return self.summary.mean_abs / self.noise

    @property
    def explains(self) -> bool:
        """Whether the server is no further away than noise puts it."""
        return self.ratio <= EXPLAINED

    def to_json(self) -> dict[str, object]:
        """Return the fit as JSON types."""
        return {
            **self.summary.to_json(),
            "nearer": self.nearer,
            "noise": self.noise,
            "ratio": self.ratio,
        }


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the hypotheses together say.

    Attributes:
        fits: every hypothesis, best first.
        rivals: names of those that cannot be told from the best one.
        sigmas: standard errors between the best and the next one; None where there is none.
        reach: how far from `bf16` FP8 of some form puts this model.
    """

    fits: tuple[Fit, ...]
    rivals: tuple[str, ...]
    sigmas: float | None
    reach: float

    @property
    def best(self) -> Fit:
        """The hypothesis that fits best."""
        return self.fits[0]

    @property
    def by(self) -> float | None:
        """How many times as far away the next hypothesis is."""
        if len(self.fits) < 2:
            return None
        return self.fits[1].summary.mean_abs / max(self.best.summary.mean_abs, 1e-9)

    @property
    def beyond(self) -> bool:
        """Whether no quantisation to FP8 puts a server as far away as this one is."""
        return not self.best.explains and self.best.summary.mean_abs > EXPLAINED * self.reach


def summarise(served: Scores, expected: Scores) -> Summary:
    """Return how far two are apart; of the same tokens, at least one."""
    differences = list(_differences(served, expected))
    sizes = sorted(map(abs, differences))
    agree = [
        a == b
        for mine, theirs in zip(served.top, expected.top, strict=True)
        for a, b in zip(mine, theirs, strict=True)
        if a >= 0 and b >= 0
    ]
    return Summary(
        mean_abs=math.fsum(sizes) / len(sizes),
        p99_abs=sizes[min(len(sizes) - 1, math.ceil(0.99 * len(sizes)) - 1)],
        k3_kl=math.fsum(map(k3, differences)) / len(differences),
        top1=sum(agree) / len(agree) if agree else 0.0,
        tokens=len(sizes),
    )


def k3(difference: float) -> float:
    """Return k3 of one token, for s - h; capped at h - s = 50, far beyond any meaning."""
    log_ratio = min(-difference, 50.0)
    return math.expm1(log_ratio) - log_ratio


def per_text(served: Scores, expected: Scores) -> tuple[float, ...]:
    """Return the mean magnitude of the difference of each text."""
    result = []
    for mine, theirs in zip(served.logprobs, expected.logprobs, strict=True):
        sizes = [abs(_number(a) - _number(b)) for a, b in zip(mine, theirs, strict=True)]
        result.append(math.fsum(sizes) / len(sizes))
    return tuple(result)


def sigmas(near: Sequence[float], far: Sequence[float]) -> float:
    """Return by how many standard errors `far` is larger than `near`, text by text.

    Infinite where every text differs by the same amount; zero where none differs.
    """
    differences = [b - a for a, b in zip(near, far, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return 0.0
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    if variance == 0.0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / math.sqrt(variance / count)


def fit(served: Scores, hypothesis: Hypothesis, own_noise: float = 0.0) -> Fit:
    """Lay one hypothesis beside a server.

    Args:
        served: what the server said.
        hypothesis: what it might be.
        own_noise: mean magnitude by which the server differs from itself.
    """
    plain = summarise(served, hypothesis.plain)
    engine = summarise(served, hypothesis.engine)
    noise = summarise(hypothesis.engine, hypothesis.plain).mean_abs
    word, summary, scores = "plain", plain, hypothesis.plain
    if engine.mean_abs < plain.mean_abs:
        word, summary, scores = "engine", engine, hypothesis.engine
    floor = max(noise, own_noise, FLOOR)
    return Fit(hypothesis.name, summary, word, floor, per_text(served, scores))


def judge(served: Scores, hypotheses: Sequence[Hypothesis], own_noise: float = 0.0) -> Judgement:
    """Say which hypothesis fits best; one of them is `bf16`."""
    fits = sorted(
        (fit(served, one, own_noise) for one in hypotheses), key=lambda one: one.summary.mean_abs
    )
    best = fits[0]
    margins = {one.name: sigmas(best.per_text, one.per_text) for one in fits[1:]}
    [base] = [one.plain for one in hypotheses if one.name == BF16]
    reach = max(summarise(one.engine, base).mean_abs for one in hypotheses if one.sound)
    return Judgement(
        tuple(fits),
        tuple(name for name, margin in margins.items() if margin < APART),
        margins[fits[1].name] if len(fits) > 1 else None,
        max(reach, FLOOR, own_noise),
    )


def unrelated(scores: Scores) -> Scores:
    """Return what another model might say: every text has the numbers of the next one.

    As likely tokens as the right ones, at the wrong places; texts of equal length are needed
    for it, others wrap around.
    """
    count = len(scores.logprobs)
    logprobs, top = [], []
    for number, (mine, best) in enumerate(zip(scores.logprobs, scores.top, strict=True)):
        other = (number + 1) % count
        theirs, their_best = scores.logprobs[other], scores.top[other]
        logprobs.append(tuple(theirs[i % len(theirs)] for i in range(len(mine))))
        top.append(tuple(their_best[i % len(their_best)] for i in range(len(best))))
    return type(scores)(tuple(logprobs), tuple(top))


def histogram(served: Scores, expected: Mapping[str, Scores]) -> dict[str, object]:
    """Return bars of s - h for each hypothesis; the outermost hold what is further out."""
    differences = {name: list(_differences(served, one)) for name, one in expected.items()}
    sizes = sorted(abs(d) for some in differences.values() for d in some)
    limit = max(0.01, sizes[int(0.98 * (len(sizes) - 1))])
    edges = [limit * (2 * i / BARS - 1) for i in range(BARS + 1)]
    counts = {}
    for name, some in differences.items():
        bars = [0] * BARS
        for difference in some:
            place = int((difference + limit) / (2 * limit) * BARS)
            bars[min(BARS - 1, max(0, place))] += 1
        counts[name] = bars
    return {"edges": edges, "counts": counts}


def _differences(served: Scores, expected: Scores) -> Iterator[float]:
    for mine, theirs in zip(served.logprobs, expected.logprobs, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            yield _number(a) - _number(b)


def _number(value: float) -> float:
    return value if math.isfinite(value) else NO_NUMBER
