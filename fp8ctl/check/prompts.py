"""Asks a server, ours or a stranger's, for the log-probabilities of prompts.

SGLang tells them on `/generate` (`return_logprob` from position 0, which also keeps its
radix cache out of the way: what is cached is not computed, and has no log-probabilities);
vLLM on `/v1/completions` with its own field `prompt_logprobs`, which skips its prefix cache.
Neither needs a tokenizer here: prompts go as token ids. Called by `logprobs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from fp8ctl.check.answers import Server
from fp8ctl.errors import CheckFailedError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

Ids = tuple[tuple[int, ...], ...]

TIMEOUT: Final = 180.0
"""Seconds for one request: a CPU is slow, a first one may compile kernels."""

BATCH: Final = 6
"""Texts of a request: some 240 tokens, within what any server prefills at once."""

_LOWEST: Final = -9999.0
"""vLLM's word for minus infinity, which JSON has not."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a server, or an expectation, says of texts: every token but the first of each.

    Attributes:
        logprobs: NaN where it is no finite number.
        top: the likeliest token at each place; -1 where that was not told.
    """

    logprobs: tuple[tuple[float, ...], ...]
    top: Ids

    @property
    def tokens(self) -> int:
        """How many have a log-probability."""
        return sum(map(len, self.logprobs))

    @property
    def not_finite(self) -> int:
        """How many of them are no number."""
        return sum(not math.isfinite(value) for text in self.logprobs for value in text)


class Prompts:
    """A server that is asked about prompts; a context, since it keeps a connection.

    Attributes:
        engine: whose routes it has.
        version: of vLLM; SGLang's is found by `find_version`.
        model: the name it serves under.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float = TIMEOUT) -> None:
        self._server = Server(url, api_key, timeout)
        self._url = self._server.url
        self.engine: Literal["sglang", "vllm"] = "sglang"
        self.version = "?"
        self.model = ""

    def __enter__(self) -> Prompts:
        """Find out what the server is.

        Raises:
            CheckFailedError: it does not answer.
            UnsupportedError: it is neither engine, or wants another key.
        """
        try:
            self._recognise()
        except BaseException:
            self._server.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._server.close()

    def tokenise(self, texts: Sequence[str], cap: int) -> Ids:
        """Return the ids of texts by the server's own tokenizer, at most `cap` each.

        Raises:
            CheckFailedError, UnsupportedError: as `score`.
        """
        if self.engine == "sglang":
            answers = self._generate({"text": list(texts)}, len(texts))
            if answers is None:
                raise UnsupportedError(f"{self._url} tells no token ids of texts")
            found = [[int(t[1]) for t in a["meta_info"]["input_token_logprobs"]] for a in answers]
        else:
            found = []
            for text in texts:
                body = self._post("/tokenize", {"model": self.model, "prompt": text})
                found.append([int(one) for one in body["tokens"]])
        return tuple(tuple(ids[:cap]) for ids in found)

    def find_version(self) -> str:
        """Return the engine's version; SGLang tells it after a first answer, or "?" for never."""
        if self.engine == "sglang" and self.version == "?":
            status, info = self._get("/get_server_info")
            if status == 200 and isinstance(info, dict):
                self.version = str(info.get("version", "?"))
        return self.version

    def score(self, ids: Sequence[Sequence[int]], batch: int = BATCH) -> Scores:
        """Return what the server says of token ids.

        Args:
            ids: of the texts, two or more each.
            batch: texts of a request.

        Raises:
            CheckFailedError: it does not answer any more.
            UnsupportedError: it refuses, or tells less than was asked for.
        """
        logprobs: list[tuple[float, ...]] = []
        top: list[tuple[int, ...]] = []
        for first in range(0, len(ids), batch):
            few = [list(text) for text in ids[first : first + batch]]
            ask = self._ask_sglang if self.engine == "sglang" else self._ask_vllm
            try:
                found = ask(few)
            except (KeyError, TypeError, ValueError, IndexError) as e:
                raise UnsupportedError(
                    f"{self._url} tells log-probabilities in an unknown form:"
                    f" {type(e).__name__} {e}"
                ) from e
            for text, (values, best) in zip(few, found, strict=True):
                if len(values) != len(text) - 1:
                    raise UnsupportedError(
                        f"{self._url} tells {len(values)} log-probabilities of a prompt of"
                        f" {len(text)} tokens; expected {len(text) - 1}"
                    )
                logprobs.append(tuple(values))
                top.append(tuple(best))
        return Scores(tuple(logprobs), tuple(top))

    def _recognise(self) -> None:
        status, info = self._get("/get_model_info")
        if status == 200 and isinstance(info, dict) and "model_path" in info:
            self.engine = "sglang"
        elif status in {401, 403}:
            raise UnsupportedError(f"{self._url} answers {status}: it wants a key")
        else:
            status, version = self._get("/version")
            if status != 200 or not isinstance(version, dict) or "version" not in version:
                raise UnsupportedError(
                    f"{self._url} has neither SGLang's /get_model_info nor vLLM's /version"
                )
            self.engine, self.version = "vllm", str(version["version"])
        status, found = self._get("/v1/models")
        try:
            self.model = str(found["data"][0]["id"])
        except (TypeError, KeyError, IndexError):
            raise UnsupportedError(f"{self._url}/v1/models answers {status}: no model") from None

    def _ask_sglang(self, ids: list[list[int]]) -> list[tuple[list[float], list[int]]]:
        answers = self._generate({"input_ids": ids}, len(ids))
        if answers is None:
            return _no_numbers(ids)
        found = []
        for answer in answers:
            meta = answer["meta_info"]
            best = [place[0][1] if place else -1 for place in meta["input_top_logprobs"][1:]]
            found.append(([_number(one[0]) for one in meta["input_token_logprobs"][1:]], best))
        return found

    def _generate(self, prompt: dict[str, Any], count: int) -> list[Any] | None:
        body = prompt | {
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 1,
        }
        answers = self._logprobs("/generate", body, "return_logprob")
        if answers is None:
            return None
        answers = answers if isinstance(answers, list) else [answers]
        if len(answers) != count:
            raise UnsupportedError(f"{self._url} gives {len(answers)} answers to {count} prompts")
        return answers

    def _ask_vllm(self, ids: list[list[int]]) -> list[tuple[list[float], list[int]]]:
        body = {
            "model": self.model,
            "prompt": ids,
            "temperature": 0,
            "max_tokens": 1,
            "prompt_logprobs": 1,
        }
        answer = self._logprobs("/v1/completions", body, "prompt_logprobs")
        if answer is None:
            return _no_numbers(ids)
        choices = answer["choices"]
        found: list[tuple[list[float], list[int]]] = []
        for text, choice in zip(ids, choices, strict=True):
            told = choice["prompt_logprobs"]
            if told is None:
                raise UnsupportedError(f"{self._url} tells no log-probabilities of prompts")
            values, best = [], []
            for token, place in zip(text[1:], told[1:], strict=False):
                values.append(_number(place[str(token)]["logprob"]))
                # The token itself, and the likeliest where that is another one.
                first = [int(name) for name, one in place.items() if one.get("rank") == 1]
                best.append(first[0] if first else -1)
            found.append((values, best))
        return found

    def _logprobs(self, path: str, body: dict[str, Any], field: str) -> Any:
        """Post a request for log-probabilities; None where the server has them and cannot say them.

        Neither engine's JSON has NaN: the answer is then an error 500 of the web framework, not
        one of the engine's own, which is JSON; without `field` the same request is answered.
        """
        status, found, text = self._send("POST", path, body)
        if status == 500 and found is None:
            without = {name: value for name, value in body.items() if name != field}
            if self._send("POST", path, without)[0] == 200:
                return None
        return self._sound(path, status, found, text)

    def _get(self, path: str) -> tuple[int, Any]:
        return self._send("GET", path, None)[:2]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._sound(path, *self._send("POST", path, body))

    def _sound(self, path: str, status: int, found: Any, text: str) -> Any:
        if status == 200 and found is not None:
            return found
        flat = " ".join(text.split())[:200]
        raise UnsupportedError(f"{self._url}{path} answers {status}: {flat}")

    def _send(self, method: str, path: str, body: object) -> tuple[int, Any, str]:
        import httpx

        try:
            try:
                reply = self._server.ask(method, path, body)
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                # After an error of its web framework a server closes the connection, which may
                # be seen at the next request only. Prompts may be asked twice.
                reply = self._server.ask(method, path, body)
        except httpx.RequestError as e:
            raise CheckFailedError(
                f"{self._url}{path} does not answer: {type(e).__name__}: {e}", hint="fp8ctl ps"
            ) from e
        return reply.status, reply.body, reply.text


def _no_numbers(ids: list[list[int]]) -> list[tuple[list[float], list[int]]]:
    return [([math.nan] * (len(text) - 1), [-1] * (len(text) - 1)) for text in ids]


def _number(value: object) -> float:
    """Return a log-probability; NaN for null, which is how NaN travels, and for -infinity."""
    if isinstance(value, int | float) and value > _LOWEST:
        return float(value)
    return math.nan
