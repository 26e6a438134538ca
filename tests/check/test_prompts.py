"""What either engine tells of prompts, in the shapes of its own sources, and what it may refuse.

SGLang 0.4.8: `/generate`, a list of answers, `meta_info.input_token_logprobs` of
(log-probability, id, text) with None first. vLLM 0.9.1: `prompt_logprobs` of each choice, None
first, then for each place a mapping from ids as text.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import threading
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.check.prompts import Prompts
from fp8ctl.errors import CheckFailedError, UnsupportedError
from fp8ctl.process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Answer = Callable[[str, dict[str, Any]], tuple[int, object]]
    Serve = Callable[[Answer], str]

IDS = ((1, 2, 3), (4, 5))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server that answers every request by a function; returns its address."""
    with contextlib.ExitStack() as stack:

        def begin(answer: Answer) -> str:
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    self.reply({})

                def do_POST(self) -> None:
                    length = int(self.headers["Content-Length"])
                    self.reply(json.loads(self.rfile.read(length)))

                def reply(self, body: dict[str, Any]) -> None:
                    body["key"] = self.headers.get("Authorization")
                    try:
                        status, found = answer(self.path, body)
                    except ConnectionAbortedError:
                        self.close_connection = True
                        return
                    data = (found if isinstance(found, str) else json.dumps(found)).encode()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

                def log_message(self, *_: object) -> None:
                    pass

            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield begin


def sglang(path: str, body: dict[str, Any]) -> tuple[int, object]:
    """Answer as SGLang 0.4.8 does: a token's log-probability is -id, the likeliest id + 1."""
    if path == "/get_model_info":
        return 200, {"model_path": "/m", "tokenizer_path": "/m", "is_generation": True}
    if path == "/v1/models":
        return 200, {"data": [{"id": "served"}]}
    if path != "/generate":
        return 404, {"detail": "Not Found"}
    assert body["logprob_start_len"] == 0, "else the radix cache swallows what it knows"
    assert body["sampling_params"]["max_new_tokens"] == 1
    ids = body.get("input_ids") or [[9, 8, 7, 6] for _ in body["text"]]
    answers = [
        {
            "text": "x",
            "meta_info": {
                "input_token_logprobs": [
                    [None, t[0], None],
                    *([-float(i), i, None] for i in t[1:]),
                ],
                "input_top_logprobs": [None, *([[-0.1, i + 1, None]] for i in t[1:])],
            },
        }
        for t in ids
    ]
    return 200, answers


def vllm(path: str, body: dict[str, Any]) -> tuple[int, object]:
    """Answer as vLLM 0.9.1 does; the token itself is first, the likeliest has rank 1."""
    if path == "/version":
        return 200, {"version": "0.9.1"}
    if path == "/v1/models":
        return 200, {"data": [{"id": "served"}]}
    if path == "/tokenize":
        return 200, {"count": 4, "max_model_len": 99, "tokens": [9, 8, 7, 6]}
    if path != "/v1/completions":
        return 404, {"detail": "Not Found"}
    assert body["model"] == "served"
    choices = [
        {
            "index": number,
            "prompt_logprobs": [
                None,
                *(
                    {
                        str(i): {"logprob": -float(i), "rank": 3, "decoded_token": "a"},
                        str(i + 1): {"logprob": -0.1, "rank": 1, "decoded_token": "b"},
                    }
                    for i in text[1:]
                ),
            ],
        }
        for number, text in enumerate(body["prompt"])
    ]
    return 200, {"choices": choices}


@pytest.mark.parametrize(("answer", "engine"), [(sglang, "sglang"), (vllm, "vllm")])
def test_both_engines_are_understood(serve: Serve, answer: Answer, engine: str) -> None:
    with Prompts(serve(answer), None) as prompts:
        assert (prompts.engine, prompts.model) == (engine, "served")
        found = prompts.score(IDS)
        assert found.logprobs == ((-2.0, -3.0), (-5.0,))
        assert found.top == ((3, 4), (6,))
        assert (found.tokens, found.not_finite) == (3, 0)
        assert prompts.score(IDS, batch=1) == found
        assert prompts.tokenise(["a", "b"], 3) == ((9, 8, 7), (9, 8, 7))


def test_the_token_that_is_the_likeliest_itself_is_named(serve: Serve) -> None:
    def sure(path: str, body: dict[str, Any]) -> tuple[int, object]:
        status, found = vllm(path, body)
        if path == "/v1/completions":
            place = {"2": {"logprob": -0.1, "rank": 1, "decoded_token": "a"}}
            found = {"choices": [{"index": 0, "prompt_logprobs": [None, place]}]}
        return status, found

    with Prompts(serve(sure), None) as prompts:
        assert prompts.score([(1, 2)]).top == ((2,),)


@pytest.mark.parametrize(
    "value", [None, -9999.0, "x", float("nan")], ids=["null", "clamped", "text", "nan"]
)
def test_what_is_no_number_is_counted(serve: Serve, value: object) -> None:
    def odd(path: str, body: dict[str, Any]) -> tuple[int, object]:
        status, found = sglang(path, body)
        if path == "/generate":
            assert isinstance(found, list)
            found[0]["meta_info"]["input_token_logprobs"][1][0] = value
        return status, found

    with Prompts(serve(odd), None) as prompts:
        found = prompts.score(IDS)
    assert found.not_finite == 1
    assert math.isnan(found.logprobs[0][0])


@pytest.mark.parametrize(
    ("answer", "field"), [(sglang, "return_logprob"), (vllm, "prompt_logprobs")]
)
def test_a_server_whose_json_has_no_nan_answers_500_and_is_understood(
    serve: Serve, answer: Answer, field: str
) -> None:
    def speechless(path: str, body: dict[str, Any]) -> tuple[int, object]:
        return (
            (500, "Internal Server Error")
            if field in body
            else answer(path, body | {"logprob_start_len": 0})
        )

    with Prompts(serve(speechless), None) as prompts:
        assert prompts.score(IDS).not_finite == 3


def test_a_connection_that_the_server_closes_after_an_error_is_opened_again(serve: Serve) -> None:
    closed: list[str] = []

    def closing(path: str, body: dict[str, Any]) -> tuple[int, object]:
        if path == "/generate" and not closed:
            closed.append(path)
            raise ConnectionAbortedError  # the handler's thread ends, and its socket
        return sglang(path, body)

    with Prompts(serve(closing), None) as prompts:
        assert prompts.score(IDS).tokens == 3
    assert closed


def test_a_server_that_is_broken_altogether_is_not_taken_for_one_without_numbers(
    serve: Serve,
) -> None:
    def broken(path: str, body: dict[str, Any]) -> tuple[int, object]:
        return (500, "Internal Server Error") if path == "/generate" else sglang(path, body)

    with Prompts(serve(broken), None) as prompts, pytest.raises(UnsupportedError, match="500"):
        prompts.score(IDS)


@pytest.mark.parametrize("answer", [sglang, vllm])
def test_a_prefix_that_is_left_out_is_seen(serve: Serve, answer: Answer) -> None:
    # What a cache knows is not computed: an engine may then tell of the rest alone.
    def short(path: str, body: dict[str, Any]) -> tuple[int, object]:
        status, found = answer(path, body)
        if path == "/generate":
            assert isinstance(found, list)
            del found[0]["meta_info"]["input_token_logprobs"][1]
            del found[0]["meta_info"]["input_top_logprobs"][1]
        elif path == "/v1/completions":
            assert isinstance(found, dict)
            del found["choices"][0]["prompt_logprobs"][-1]
        return status, found

    with (
        Prompts(serve(short), None) as prompts,
        pytest.raises(UnsupportedError, match="tells 1 log-probabilities of a prompt of 3"),
    ):
        prompts.score(IDS)


@pytest.mark.parametrize(
    ("status", "found", "words"),
    [
        (400, {"message": "no prompt_logprobs here"}, "answers 400.*no prompt_logprobs here"),
        (503, {"error": {"state": "unpushed"}}, "answers 503.*unpushed"),
        (200, {"choices": [{"prompt_logprobs": None}]}, "no log-probabilities of prompts"),
        (200, {"choices": []}, "unknown form"),
        (200, {"choice": 1}, "unknown form"),
        (200, "no json", "answers 200"),
    ],
)
def test_a_refusal_is_told_with_the_servers_words(
    serve: Serve, status: int, found: object, words: str
) -> None:
    def refuse(path: str, body: dict[str, Any]) -> tuple[int, object]:
        return (status, found) if path == "/v1/completions" else vllm(path, body)

    with Prompts(serve(refuse), None) as prompts, pytest.raises(UnsupportedError, match=words):
        prompts.score([(1, 2)])


def test_what_is_neither_engine_is_refused(serve: Serve) -> None:
    url = serve(lambda path, body: (200, {"hello": "there"}))
    with pytest.raises(UnsupportedError, match="neither"), Prompts(url, None):
        pass


def test_a_key_goes_with_every_request_and_its_lack_is_named(serve: Serve) -> None:
    def locked(path: str, body: dict[str, Any]) -> tuple[int, object]:
        return sglang(path, body) if body["key"] == "Bearer k" else (401, {"error": "Unauthorized"})

    url = serve(locked)
    with Prompts(url, "k") as prompts:
        assert prompts.score(IDS).tokens == 3
    with pytest.raises(UnsupportedError, match="wants a key"), Prompts(url, None):
        pass


def test_a_proxy_of_the_environment_is_passed_by(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    with Prompts(serve(sglang), None) as prompts:
        assert prompts.score(IDS).tokens == 3


def test_a_server_that_is_not_there_is_unreachable() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(CheckFailedError, match="does not answer"), Prompts(url, None):
        pass
