"""What a server answers, asked by its own API: standard library only, both engines."""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tests.gpu.leg import FailedError

if TYPE_CHECKING:
    from collections.abc import Iterator

Json = dict[str, Any]
Backend = Literal["sglang", "vllm"]
VOCABULARY = 256  # token ids of prompts stay below: bytes in every tokenizer of models.py


@dataclass(frozen=True)
class Said:
    """Log-probabilities of prompts and of greedy continuations.

    Attributes:
        tokens: of the continuations, an entry for each prompt.
        values: of prompt and continuation, in order; NaN where the server told none.
    """

    tokens: tuple[tuple[str, ...], ...]
    values: tuple[float, ...]

    def finite(self) -> bool:
        return all(math.isfinite(value) for value in self.values)


def request(url: str, path: str, body: Json | None, limit: float) -> Any:
    """Return the JSON of an answer.

    Raises:
        FailedError: no answer, or one that is an error.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(url.rstrip("/") + path, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=limit) as answer:
            text = answer.read()
    except urllib.error.HTTPError as e:
        raise FailedError(
            f"{path}: HTTP {e.code}: {e.read()[:300].decode(errors='replace')}"
        ) from e
    except OSError as e:
        raise FailedError(f"{path}: {type(e).__name__}: {e}") from e
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text.decode(errors="replace")


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Return prompts of token ids that share no beginning."""
    random_ = random.Random(seed)
    return [[random_.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]


def said(url: str, backend: Backend, model: str, asked: list[list[int]], new: int = 24) -> Said:
    """Ask for log-probabilities, one prompt at a time: the same kernels in the same shapes."""
    tokens: list[tuple[str, ...]] = []
    values: list[float] = []
    for ids in asked:
        if backend == "sglang":
            found, text = _sglang(url, ids, new)
        else:
            found, text = _vllm(url, model, ids, new)
        tokens.append(text)
        values += found
    return Said(tuple(tokens), tuple(values))


def _sglang(url: str, ids: list[int], new: int) -> tuple[list[float], tuple[str, ...]]:
    body = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    meta = request(url, "/generate", body, 60)["meta_info"]
    before = [_number(entry[0]) for entry in meta["input_token_logprobs"][1:]]
    after = meta["output_token_logprobs"]
    return before + [_number(entry[0]) for entry in after], tuple(str(e[1]) for e in after)


def _vllm(url: str, model: str, ids: list[int], new: int) -> tuple[list[float], tuple[str, ...]]:
    body = {
        "model": model,
        "prompt": ids,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "echo": True,
        "return_tokens_as_token_ids": True,
    }
    told = request(url, "/v1/completions", body, 60)["choices"][0]["logprobs"]
    values = [_number(value) for value in told["token_logprobs"][1:]]
    return values, tuple(told["tokens"][-new:])


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def difference(one: Said, other: Said) -> Json:
    """Say how far two servers are from each other."""
    gaps = [abs(a - b) for a, b in zip(one.values, other.values, strict=False)]
    return {
        "values": len(gaps),
        "max_difference": max(gaps, default=math.nan),
        "mean_difference": sum(gaps) / len(gaps) if gaps else math.nan,
        "same_tokens": one.tokens == other.tokens,
        "finite": one.finite() and other.finite(),
    }


def require_equal(one: Said, other: Said, what: str) -> Json:
    """Return the difference, which must be none.

    Raises:
        FailedError: it is not.
    """
    found = difference(one, other)
    found["seen"] = (
        f"{found['values']} values, largest difference {found['max_difference']:.3g}, "
        f"tokens {'equal' if found['same_tokens'] else 'differ'}"
    )
    if not (found["finite"] and found["same_tokens"] and found["max_difference"] == 0.0):
        raise FailedError(f"{what}: {found['seen']}, mean {found['mean_difference']:.3g}")
    return found


@contextlib.contextmanager
def meanwhile(url: str, backend: Backend, model: str) -> Iterator[list[float]]:
    """Ask for a few tokens, again and again; yield the seconds that each answer took so far."""
    waits: list[float] = []
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            began = time.perf_counter()
            said(url, backend, model, [[1, 2, 3, 4]], 4)
            waits.append(time.perf_counter() - began)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(go_on)
        try:
            yield waits
        finally:
            over.set()
    asking.result()


def chat(url: str, model: str) -> Json:
    """Ask the question of the seed.

    Raises:
        FailedError: no text comes back, or a log-probability that is no number.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 16,
        "logprobs": True,
    }
    choice = request(url, "/v1/chat/completions", body, 60)["choices"][0]
    text = str(choice["message"]["content"] or "")
    told = (choice.get("logprobs") or {}).get("content") or []
    values = [_number(token.get("logprob")) for token in told]
    if not text.strip() or not values or not all(map(math.isfinite, values)):
        raise FailedError(f"chat: {text!r}, log-probabilities {values[:4]}")
    return {"answer": text, "seen": repr(text[:60])}


def speed(url: str, backend: Backend, model: str, at_once: int, new: int, length: int = 64) -> Json:
    """Return tokens per second of requests that run at once, after one such round to warm up."""

    def one(ids: list[int]) -> int:
        if backend == "sglang":
            body: Json = {
                "input_ids": ids,
                "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
            }
            return int(request(url, "/generate", body, 120)["meta_info"]["completion_tokens"])
        body = {
            "model": model,
            "prompt": ids,
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
        }
        return int(request(url, "/v1/completions", body, 120)["usage"]["completion_tokens"])

    rates = []
    with ThreadPoolExecutor(at_once) as pool:
        for turn in range(3):
            asked = prompts(at_once, length, 1000 + turn)
            began = time.perf_counter()
            tokens = sum(pool.map(one, asked))
            rates.append(tokens / (time.perf_counter() - began))
    return {
        "at_once": at_once,
        "new_tokens": new,
        "tokens_per_second": [round(rate, 1) for rate in rates[1:]],
        "seen": f"{max(rates[1:]):.0f} tokens/s, {at_once} at once",
    }
