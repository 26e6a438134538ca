"""The first level: does the server answer, as what, and with sense?

Looks from outside, through routes that both engines have; works on any SGLang
or vLLM server and says what it could not see. It never proves FP8: a server in
front of garbage answers 200 too. Called by `command`, `launching` and `demo`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from fp8ctl import gate
from fp8ctl.check import code, repeat, words
from fp8ctl.check.answers import Server
from fp8ctl.check.verdict import Evidence, LevelReport, Verdict
from fp8ctl.check.words import short
from fp8ctl.engines.base import is_loopback

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8ctl.check.answers import Reply
    from fp8ctl.gate import Answer

QUESTION: Final = "What is the capital of France?"
PROMPT: Final = "The capital of France is"
TOKENS: Final = 16
REPEAT_TOKENS: Final = 4
"""Three answers of this length: a CPU may give one token a second."""
TIMEOUT: Final = 180.0
"""Seconds for one answer: a first request may compile kernels, a CPU is slow."""


STATE_TIMEOUT: Final = 10.0
_GET_TIMEOUT: Final = 10.0
CODE_TIMEOUT: Final = 60.0
"""Seconds for every process of a server to say which code it runs."""


@dataclass(slots=True)
class _Look:
    """What has been seen so far."""

    evidence: list[Evidence] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    verdict: Verdict | None = None
    code: Mapping[str, object] | None = None

    def ok(self, check: str, found: str, expected: str = "") -> None:
        self.evidence.append(Evidence(check, "ok", found, expected))

    def failed(self, check: str, found: str, expected: str = "") -> None:
        self.evidence.append(Evidence(check, "failed", found, expected))

    def not_visible(self, check: str, why: str) -> None:
        self.evidence.append(Evidence(check, "not visible", why))

    def report(self) -> LevelReport:
        bad = self.verdict is not None or any(one.result == "failed" for one in self.evidence)
        return LevelReport(
            "live",
            "failed" if bad else "ok",
            self.verdict,
            tuple(self.evidence),
            self.facts,
            self.code,
        )


def check(
    url: str,
    expect: str | None = None,
    *,
    api_key: str | None = None,
    timeout: float = TIMEOUT,
) -> LevelReport:
    """Look at a server from outside.

    Args:
        url: its address.
        expect: text that the answer to the capital of France must contain.
        api_key: sent as a Bearer token; None takes FP8CTL_API_KEY.
        timeout: seconds for one answer.
    """
    import httpx

    key = api_key or gate.api_key()
    look = _Look()
    answer = gate.ask(url, key, STATE_TIMEOUT)
    with Server(url, key, timeout) as server:
        try:
            _see_state(look, server, answer)
            _see_code(look, server, answer)
            model = _see_model(look, server)
            _see_quantisation(look, server)
            _see_words(look, answer)
            if model is not None:
                _see_answers(look, server, model, expect, answer)
        except httpx.RequestError as e:
            look.failed("connection", f"{type(e).__name__}: {e}", "an answer")
            look.verdict = "unreachable"
    return look.report()


def _see_state(look: _Look, server: Server, answer: Answer) -> None:
    health = server.get("/health", _GET_TIMEOUT)
    (look.ok if health.status == 200 else look.failed)("health", f"HTTP {health.status}", "200")
    if not answer.gated:
        look.not_visible("state", "not started with fp8ctl's entry module: no /fp8ctl/state")
        return
    look.facts["server"] = dict(answer.data)
    found = f"{answer.state}: {answer.message}" if answer.message else answer.state
    if answer.state == "ready":
        look.ok("state", found)
        return
    look.failed("state", found, "ready")
    if answer.state == "unpushed":
        look.verdict = "unpushed"
    elif answer.state == "failed":
        # An update broke off: what is in memory is neither the old model nor the new one.
        look.verdict = "wrong-weights"


def _see_code(look: _Look, server: Server, answer: Answer) -> None:
    """Ask every process of the server which code it runs; a stock server cannot tell."""
    told = None
    if answer.gated:
        reply = server.get(code.PATH, CODE_TIMEOUT)
        if reply.status == 200:
            told = reply.body
        elif reply.status != 404:  # that is an earlier fp8ctl, which has no such route
            told = {"error": f"HTTP {reply.status}: {short(reply.text)}"}
    found = code.judge(told)
    look.evidence += (*found.evidence, found.in_force)
    look.code = found.to_json()


def _see_model(look: _Look, server: Server) -> str | None:
    reply = server.get("/v1/models", _GET_TIMEOUT)
    if reply.status in {401, 403}:
        look.failed("model", f"HTTP {reply.status}: it wants a key", "FP8CTL_API_KEY set to it")
        return None
    try:
        model = str(reply.body["data"][0]["id"])
    except (TypeError, KeyError, IndexError):
        look.failed("model", f"HTTP {reply.status}: {short(reply.text)}", "a model name")
        return None
    look.ok("model", model)
    look.facts["model"] = model
    return model


def _see_quantisation(look: _Look, server: Server) -> None:
    """Find the engine's own word for its quantisation, as it was asked for, not as it is."""
    import httpx

    try:
        info = server.get("/get_server_info", _GET_TIMEOUT)
    except httpx.ReadTimeout:
        # SGLang 0.4.8 answers this one only after a first generation or update.
        look.not_visible("quantisation", "/get_server_info does not answer")
        return
    if info.status == 200 and isinstance(info.body, dict) and "quantization" in info.body:
        look.facts["engine"] = f"sglang {info.body.get('version', '?')}"
        look.facts["arguments"] = words.arguments(info.body)
        word, is_16_bit = words.sglang_word(info.body, _local_config(server.url, info.body))
    else:
        version = server.get("/version", _GET_TIMEOUT)
        if version.status == 200 and isinstance(version.body, dict):
            look.facts["engine"] = f"vllm {version.body.get('version', '?')}"
        info = server.get("/server_info", _GET_TIMEOUT)
        word, is_16_bit = words.vllm_word(info.status, info.text), False
    look.facts["quantization"] = word
    if word is None:
        look.not_visible("quantisation", "the server does not tell how it was started")
    elif is_16_bit:
        look.failed("quantisation", word, "FP8")
        look.verdict = look.verdict or "bf16-fallback"
    else:
        look.ok("quantisation", word)


def _see_words(look: _Look, answer: Answer) -> None:
    """Tell versions, and the mode of the plan: of a server of ours, who knows it."""
    engine = look.facts.get("engine")
    if told := words.versions(str(engine) if engine else None, answer.data):
        look.ok("versions", told)
    else:
        look.not_visible("versions", "the server tells none")
    mode = words.mode(answer.data)
    look.facts["mode"] = mode
    if mode is not None:
        look.ok("mode", mode)
    else:
        look.not_visible("mode", words.modeless(answer.data))


def _local_config(url: str, info: Mapping[str, Any]) -> dict[str, Any] | None:
    if not is_loopback(urlsplit(url).hostname or ""):
        return None
    try:
        data = json.loads((Path(str(info.get("model_path"))) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _see_answers(
    look: _Look, server: Server, model: str, expect: str | None, answer: Answer
) -> None:
    if answer.state in {"unpushed", "updating", "failed"}:
        for name in ("chat", "generation", "log-probabilities", "repeat"):
            look.not_visible(name, f"generation is closed while the server is {answer.state}")
        return
    chat = server.post(
        "/v1/chat/completions",
        {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": TOKENS,
            "logprobs": True,
        },
    )
    seen = False
    if chat.status == 400 and "template" in chat.text.lower():
        look.not_visible("chat", "the model has no chat template")
    else:
        seen = _judge_chat(look, chat, expect)
    _judge_generation(look, server, model, probabilities=not seen)


def _judge_chat(look: _Look, chat: Reply, expect: str | None) -> bool:
    """Judge text and log-probabilities of a chat completion; say whether it had any of these."""
    try:
        choice = chat.body["choices"][0]
        content = choice["message"]["content"]
        text = content if isinstance(content, str) else ""
    except (TypeError, KeyError, IndexError):
        look.failed("chat", f"HTTP {chat.status}: {short(chat.text)}", "an answer")
        return False
    look.facts |= {"answer": text, "latency_s": round(chat.seconds, 3)}
    found = f"{short(text)!r} in {chat.seconds:.2f} s"
    if expect is not None and expect not in text:
        look.failed("chat", found, f"an answer with {expect!r}")
    elif not text.strip():
        look.failed("chat", found, "some text")
    else:
        look.ok("chat", found, f"an answer with {expect!r}" if expect is not None else "")
    told = choice.get("logprobs")
    content = told.get("content") if isinstance(told, dict) else None
    if not isinstance(content, list) or not content:
        return False
    _judge_probabilities(
        look, [one.get("logprob") if isinstance(one, dict) else None for one in content]
    )
    return True


def _judge_probabilities(look: _Look, values: list[Any]) -> None:
    # NaN travels as null, since JSON has no NaN.
    bad = sum(not isinstance(v, (int, float)) or not math.isfinite(v) for v in values)
    if bad:
        look.failed("log-probabilities", f"{bad} of {len(values)} are not finite", "finite")
    else:
        look.ok("log-probabilities", f"{len(values)}, from {min(values):.2f} to {max(values):.2f}")


def _judge_generation(look: _Look, server: Server, model: str, *, probabilities: bool) -> None:
    """Ask for the same raw completion three times: the last two find the prompt in the cache.

    Args:
        look: what is seen.
        server: to ask.
        model: its name.
        probabilities: judge the log-probabilities of the first: no chat had any.
    """
    request = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": REPEAT_TOKENS}
    choices: list[Any] = []
    for number in range(3):
        # Of the two that are compared, how near to the next each token was.
        wanted = repeat.TOLD if number else 1
        more = {"logprobs": wanted} if number or probabilities else {}
        reply = server.post("/v1/completions", request | more)
        if reply.status == 400 and number:
            reply = server.post("/v1/completions", request)
        try:
            choice = reply.body["choices"][0]
            text = choice["text"] if isinstance(choice["text"], str) else ""
        except (TypeError, KeyError, IndexError):
            name = "repeat" if choices else "generation"
            look.failed(name, f"HTTP {reply.status}: {short(reply.text)}", "an answer")
            return
        choices.append({**choice, "text": text})
        if number == 0:
            look.facts["generation_s"] = round(reply.seconds, 3)
            found = f"{short(text)!r} in {reply.seconds:.2f} s"
            (look.ok if text else look.failed)("generation", found, "some text")
            if probabilities:
                told = choice.get("logprobs")
                values = told.get("token_logprobs") if isinstance(told, dict) else None
                if isinstance(values, list) and values:
                    _judge_probabilities(look, values)
                else:
                    look.not_visible("log-probabilities", "no answer carries any")
    look.facts["completion"] = choices[-1]["text"]
    look.evidence.append(repeat.judge(*choices[1:]))
