"""What fp8ctl puts around SGLang's server: updates move the gate, questions reach every rank.

SGLang itself is absent: its app is a function, and the few names that a question
goes through are stand-ins. The real server is in tests/e2e.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8ctl import wire
from fp8ctl.engines.hooks import manifest, ranklog, sglang_ranks, sglang_server, sglang_worker
from fp8ctl.engines.hooks.gate import Gate, GateMiddleware
from fp8ctl.engines.hooks.routes import PushRoutes
from fp8ctl.engines.hooks.secret import Secret
from fp8ctl.engines.hooks.sglang_ranks import Workers
from fp8ctl.engines.hooks.sglang_server import UPDATING, UpdateWatch
from fp8ctl.engines.hooks.updates import Updates
from fp8ctl.kernels.digest import digest, to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

EXPECTED = ["a.weight", "a.weight_scale_inv", "norm.weight"]
FORGET: tuple[str, dict[str, Any]] = ("forget", {})
COMPLETE = {"broken": False, "unfilled": {}, "missing": [], "missing_count": 0}
BROKEN = {**COMPLETE, "broken": True, "missing": ["a.weight"], "missing_count": 3}
PART = {**COMPLETE, "missing": ["norm.weight"], "missing_count": 1}
UNFILLED = {**COMPLETE, "unfilled": {"a.weight": "rows 2-3", "b.weight": "rows 0-3"}}
DISK = "/update_weights_from_disk"
TENSOR = "/update_weights_from_tensor"
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


class Asked:
    """Stands in for `Workers`: answers what it was given, and notes the questions."""

    def __init__(self, *answers: dict[str, Any], error: Exception | None = None) -> None:
        self.answers = answers
        self.error = error
        self.can_release = True
        self.ranks = len(answers)
        self.questions: list[tuple[str, dict[str, Any]]] = []
        self.listening = 0

    def listen(self) -> None:
        self.listening += 1

    async def ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        self.questions.append((what, details))
        if self.error is not None:
            raise self.error
        if what == "forget":
            return []
        return list(self.answers)


class Server:
    """SGLang's app behind the watch and the gate.

    Attributes:
        seen: the gate's state as the app ran, and as each message left for the client.
    """

    def __init__(
        self,
        *answers: dict[str, Any],
        await_push: bool = True,
        status: int = 200,
        parts: tuple[bytes, ...] = (b'{"success": true}',),
        raises: Exception | None = None,
        error: Exception | None = None,
        expected: list[str] = EXPECTED,
    ) -> None:
        self.inside = self.most = 0
        self.gate = Gate(engine="sglang", engine_version="0.4.8", await_push=await_push)
        self.workers = Asked(*answers, error=error)
        self.seen: list[str] = []

        async def engine(scope: Any, receive: Any, send: Any) -> None:
            self.seen.append(self.gate.state)
            self.inside += 1
            self.most = max(self.most, self.inside)
            await receive()
            await asyncio.sleep(0)
            self.inside -= 1
            if raises is not None:
                raise raises
            await send({"type": "http.response.start", "status": status, "headers": []})
            for i, part in enumerate(parts):
                more = i < len(parts) - 1
                await send({"type": "http.response.body", "body": part, "more_body": more})

        self.engine = engine
        workers: Any = self.workers
        self.updates = Updates(self.gate, workers, {}, device="cpu", folder=None)
        watch = UpdateWatch(engine, self.gate, workers, expected, self.updates)
        self._app = GateMiddleware(watch, self.gate)

    def ask(self, path: str, kind: str = "http", body: bytes = b"") -> tuple[int, bytes]:
        return asyncio.run(self.ask_soon(path, kind, body))

    async def at_once(self, *paths: str) -> int:
        """Send requests together; return how many were in the engine at a time."""
        self.most = 0
        await asyncio.gather(*(self.ask_soon(path) for path in paths))
        return self.most

    async def ask_soon(self, path: str, kind: str = "http", body: bytes = b"") -> tuple[int, bytes]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            self.seen.append(self.gate.state)
            sent.append(message)

        await self._app({"type": kind, "method": "POST", "path": path}, receive, send)
        return sent[0]["status"], b"".join(m["body"] for m in sent[1:])

    @property
    def message(self) -> str:
        return str(self.gate.describe()["message"])


# --- updates and the gate -----------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(UPDATING))
def test_the_gate_is_closed_during_an_update_and_open_before_its_answer_leaves(path: str) -> None:
    server = Server(COMPLETE)
    assert server.ask("/generate")[0] == 503
    server.seen.clear()
    assert server.ask(path) == (200, b'{"success": true}')
    assert server.seen == ["updating", "ready", "ready"]
    assert server.ask("/generate")[0] == 200


@pytest.mark.parametrize(
    ("answers", "status", "state"),
    [
        ([COMPLETE, COMPLETE], 200, "ready"),
        ([COMPLETE, PART], 200, "unpushed"),
        ([UNFILLED, COMPLETE], 200, "unpushed"),
        ([COMPLETE, BROKEN], 400, "failed"),
        ([COMPLETE], 400, "ready"),
    ],
)
def test_the_state_follows_from_the_worst_rank(
    answers: list[dict[str, Any]], status: int, state: str
) -> None:
    server = Server(*answers, await_push=False, status=status)
    assert server.ask(DISK)[0] == status
    assert server.gate.state == state


def test_a_rejected_update_leaves_a_waiting_server_waiting() -> None:
    server = Server(COMPLETE, status=400)
    assert server.ask(DISK)[0] == 400
    assert server.gate.state == "unpushed"


def test_the_message_names_a_tensor_that_is_missing_and_how_many_are() -> None:
    server = Server(COMPLETE, PART)
    server.ask(DISK)
    assert server.message == "1 tensors have not arrived, such as norm.weight"
    server = Server(PART, UNFILLED)
    server.ask(DISK)
    assert server.message == "2 tensors have not arrived, such as a.weight"


def test_the_message_of_a_failure_is_what_the_engine_said() -> None:
    server = Server(BROKEN, status=400, parts=(b'{"message": "no', b" such file " + b'"}'))
    assert server.ask(DISK) == (400, b'{"message": "no such file "}')
    assert server.message == '{"message": "no such file "}'


def test_only_a_server_that_lacks_weights_asks_for_all_of_them() -> None:
    waiting = Server(COMPLETE)
    waiting.ask(DISK)
    assert waiting.workers.questions == [("progress", {"expected": EXPECTED})]
    # Now it has them: a trainer may send one tensor.
    waiting.ask(DISK)
    assert waiting.workers.questions[1] == ("progress", {"expected": []})
    broken = Server(BROKEN, await_push=False, status=400)
    broken.ask(DISK)
    broken.ask(DISK)
    asked = [details.get("expected") for _, details in broken.workers.questions]
    assert asked == [[], None, EXPECTED, None]
    assert broken.workers.questions[1::2] == [FORGET, FORGET]


def test_a_rank_that_failed_alone_turns_the_engines_good_answer_into_an_error() -> None:
    """Rank 0 alone answers SGLang's request."""
    server = Server(COMPLETE, BROKEN, await_push=False, status=200)
    status, body = server.ask(DISK)
    assert (status, json.loads(body)["success"]) == (500, False)
    assert server.gate.state == "failed"
    assert server.seen == ["updating", "failed", "failed"]


@pytest.mark.parametrize(("path", "state"), [(DISK, "ready"), (TENSOR, "unpushed")])
def test_without_a_plan_only_a_whole_checkpoint_opens_the_gate(path: str, state: str) -> None:
    server = Server(COMPLETE, expected=[])
    assert server.ask(path)[0] == 200
    assert server.gate.state == state
    # Who has its weights may send a part either way.
    ready = Server(COMPLETE, expected=[], await_push=False)
    ready.ask(path)
    assert ready.gate.state == "ready"


def test_updates_are_taken_one_at_a_time() -> None:
    server = Server(COMPLETE, COMPLETE, await_push=False)
    most = asyncio.run(server.at_once(DISK, TENSOR, DISK))
    assert most == 1
    assert server.gate.state == "ready"
    # Positive control: what is no update does run beside others.
    assert asyncio.run(server.at_once("/health", "/get_load", "/ping")) == 3


def test_an_update_that_breaks_off_in_the_server_closes_the_gate() -> None:
    server = Server(COMPLETE, await_push=False, raises=RuntimeError("connection lost"))
    with pytest.raises(RuntimeError, match="connection lost"):
        server.ask(DISK)
    assert server.gate.state == "failed"
    assert server.message == "the update broke off"


def test_ranks_that_do_not_answer_close_the_gate() -> None:
    # What they hold now, nobody knows.
    server = Server(await_push=False, error=RuntimeError("rank 1 did not answer"))
    with pytest.raises(RuntimeError, match="rank 1"):
        server.ask(DISK)
    assert server.gate.state == "failed"


@pytest.mark.parametrize(
    "path", ["/generate", "/health", "/fp8ctl/state", "/init_weights_update_group"]
)
def test_other_routes_pass_as_they_are_and_ask_nobody(path: str) -> None:
    server = Server(COMPLETE, await_push=False, parts=(b"one ", b"two"))
    assert server.ask(path) == (200, b"one two")
    assert server.seen == ["ready"] * 4
    assert server.workers.questions == []


# --- weights that are given up ------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{}", b'{"tags": null}', b'{"tags": ["weights", "kv"]}'])
def test_weights_that_are_released_close_the_gate_before_the_answer_leaves(body: bytes) -> None:
    server = Server(COMPLETE, await_push=False)
    assert server.ask(RELEASE, body=body)[0] == 200
    assert server.seen == ["ready", "unpushed", "unpushed"]
    assert "released" in server.message
    assert server.workers.questions == [FORGET], "what was there before does not count"
    states = []
    for path in ("/resume_memory_occupation", DISK):
        server.ask(path)
        states.append(server.gate.state)
    assert states == ["unpushed", "ready"], "resuming brings no weights back, a push does"


@pytest.mark.parametrize(
    "body", [b'{"tags": ["kv_cache"]}', b'{"tags": []}', b'{"tags": 1}', b"no json", b"[]"]
)
def test_what_releases_no_weights_leaves_the_gate_open(body: bytes) -> None:
    server = Server(COMPLETE, await_push=False)
    server.ask(RELEASE, body=body)
    assert server.gate.state == "ready"


def test_weights_that_are_released_close_the_gate_whatever_the_ranks_answer() -> None:
    server = Server(COMPLETE, await_push=False, error=RuntimeError("rank 1 did not answer"))
    assert server.ask(RELEASE)[0] == 200
    assert server.gate.state == "unpushed"


def test_a_release_that_is_refused_or_gives_nothing_up_leaves_the_gate_open() -> None:
    refused = Server(COMPLETE, await_push=False, status=400)
    refused.ask(RELEASE)
    assert refused.gate.state == "ready"
    without_saver = Server(COMPLETE, await_push=False)
    without_saver.workers.can_release = False
    without_saver.ask(RELEASE)
    assert without_saver.gate.state == "ready"


@pytest.mark.parametrize(
    ("released", "resumed", "refused"),
    [
        (b"", None, True),
        (b'{"tags": ["weights"]}', None, True),
        (b"", b'{"tags": ["kv_cache"]}', True),
        (b"", b'{"tags": ["weights"]}', False),  # keys and values may come back later
        (b"", b'{"tags": []}', False),
        (b'{"tags": ["kv_cache"]}', None, False),
    ],
)
def test_nothing_is_written_to_memory_that_is_released(
    released: bytes, resumed: bytes | None, refused: bool
) -> None:
    server = Server({**COMPLETE, "refittable": True}, await_push=False)
    offer = json.dumps({"protocol": wire.PROTOCOL, "client": {}, "carrier": None}).encode()

    async def test() -> tuple[int, dict[str, Any]]:
        await server.ask_soon(RELEASE, body=released)
        if resumed is not None:
            await server.ask_soon(RESUME, body=resumed)
        own, _ = await server.ask_soon(TENSOR)
        status, answer = await PushRoutes(server.engine, server.updates).answer(
            "POST", wire.CONNECT, offer
        )
        assert (own == 409) == (status == 409), "the engine's own updates as well"
        return status, answer

    server.gate.started = True
    status, answer = asyncio.run(test())
    if not refused:
        assert status == 200
        return
    assert (status, answer["error"]["id"]) == (409, "FP8-RELEASED")
    assert RESUME in answer["error"]["hint"]
    assert "progress" not in [what for what, _ in server.workers.questions]


def test_a_release_that_breaks_off_may_have_given_up_everything() -> None:
    server = Server(COMPLETE, await_push=False, raises=RuntimeError("connection lost"))
    with pytest.raises(RuntimeError, match="connection lost"):
        server.ask(RELEASE)
    assert server.gate.state == "unpushed"
    assert server.updates.memory.released == {"weights", "kv_cache"}


def test_every_http_request_makes_sure_that_the_schedulers_are_heard() -> None:
    server = Server(COMPLETE)
    for path in ("/get_server_info", DISK):
        server.ask(path)
    assert server.workers.listening == 2
    server.ask("/update_weights_from_disk", "websocket")
    assert server.workers.listening == 2, "there is no event loop to listen on at the start"


def test_the_gate_tells_a_state_only_when_the_warm_up_is_over() -> None:
    gate = Gate(engine="sglang", engine_version="0.4.8", await_push=False)
    gate.started = False
    during: list[object] = []

    def warm_up(*args: object, **kwargs: object) -> None:
        during.append((args, kwargs, gate.answer()[0]))

    sglang_server._then_start(gate, warm_up)("args", pipe=1)
    assert during == [(("args",), {"pipe": 1}, 503)]
    assert gate.answer()[0] == 200


def test_a_warm_up_that_fails_leaves_the_server_not_started() -> None:
    gate = Gate(engine="sglang", engine_version="0.4.8", await_push=False)
    gate.started = False

    def warm_up() -> None:
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        sglang_server._then_start(gate, warm_up)()
    assert gate.answer()[0] == 503


# --- questions ----------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ranklog.RUN_DIR, str(tmp_path))
    return tmp_path


class Engine:
    """Two ranks of SGLang: hands a request to the custom loader of each, rank 0 last.

    Attributes:
        rank: whose turn it is.
        silent: ranks that never get the request.
    """

    def __init__(self, *models: nn.Module) -> None:
        self.models = models
        self.rank = 0
        self.silent: set[int] = set()
        self.waiting = False
        self.refusal = ""
        self.replicas = 1
        self.requests: list[Any] = []

    def auto_create_handle_loop(self) -> None:
        pass

    async def update_weights_from_tensor_communicator(self, request: Any) -> list[Any]:
        """As SGLang's own: one question at a time, and one that is left alone blocks it."""
        assert not self.waiting
        self.waiting = True
        await asyncio.sleep(0.01)
        self.waiting = False
        self.requests.append(request)
        if self.refusal:
            return [SimpleNamespace(success=False, message=self.refusal)] * self.replicas
        assert request.load_format == sglang_worker.LOADER
        assert not request.flush_cache
        for rank in reversed(range(len(self.models))):
            self.rank = rank
            if rank not in self.silent:
                named = pickle.loads(request.serialized_named_tensors[rank])
                named = [(name, tensor.to("the device")) for name, tensor in named]
                sglang_worker.load(self.models[rank], named)
        return [SimpleNamespace(success=True, message="Success")]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = Engine(nn.Linear(3, 2), nn.Linear(3, 2))

    def module(name: str, **names: object) -> None:
        stub = ModuleType(name)
        vars(stub).update(names)
        monkeypatch.setitem(sys.modules, name, stub)
        parent, _, last = name.rpartition(".")
        if parent in sys.modules and parent.startswith("sglang"):
            setattr(sys.modules[parent], last, stub)

    for package in ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.layers"):
        module(package)
    serializer = SimpleNamespace(serialize=pickle.dumps)
    module("sglang.srt.utils", MultiprocessingSerializer=serializer)
    module("sglang.srt.managers.io_struct", UpdateWeightsFromTensorReqInput=SimpleNamespace)
    module("sglang.srt.distributed", get_tensor_model_parallel_rank=lambda: made.rank)
    module("sglang.srt.layers.quantization")
    fp8 = "sglang.srt.layers.quantization.fp8"
    module(fp8, Fp8LinearMethod=type("Fp8LinearMethod", (), {"refittable": True}))
    monkeypatch.setattr(sglang_worker, "_receivers", {})
    return made  # type: ignore[return-value]


def workers(engine: Engine) -> Workers:
    http_server = SimpleNamespace(_global_state=SimpleNamespace(tokenizer_manager=engine))
    arguments = SimpleNamespace(tp_size=len(engine.models), enable_memory_saver=False)
    return Workers(http_server, arguments)


def test_digests_of_every_rank_come_back_in_the_order_of_ranks(
    run_dir: Path, engine: Engine
) -> None:
    answers = asyncio.run(workers(engine).ask("digests"))
    assert [answer["rank"] for answer in answers] == [0, 1]
    for answer, model in zip(answers, engine.models, strict=True):
        assert answer["format"] == "checkpoint"
        told = {line["name"]: line["digest"] for line in answer["tensors"]}
        assert told == {n: to_text(digest(t)) for n, t in model.named_parameters()}
    assert list((run_dir / "reports").iterdir()) == [], "answers are left behind"


def quantised(kind: str, **facts: object) -> nn.Module:
    """Return a layer with a method of SGLang's, as far as it is looked at."""
    config = SimpleNamespace(is_checkpoint_fp8_serialized=True)
    module = nn.Linear(2, 4)
    module.logical_widths = [4]  # type: ignore[assignment]
    method = type(kind, (), {"block_quant": False, "quant_config": config, **facts})()
    module.quant_method = method
    return module


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        (nn.Linear(2, 4), "checkpoint"),
        (quantised("Fp8LinearMethod", block_quant=True), "checkpoint"),
        (quantised("Fp8MoEMethod", refittable=True), "checkpoint"),
        (quantised("Fp8LinearMethod"), "shared"),  # not patched: one scale for what is fused
        (quantised("Fp8LinearMethod", cutlass_fp8_supported=True), "engine"),
        (quantised("Fp8LinearMethod", use_marlin=True), "engine"),
        (quantised("Fp8LinearMethod", refittable=False), "engine"),
        (
            quantised(
                "Fp8MoEMethod",
                refittable=True,
                quant_config=SimpleNamespace(is_checkpoint_fp8_serialized=False),
            ),
            "online",  # a scale for every row
        ),
        (quantised("Fp8EPMoEMethod", block_quant=True), "engine"),
    ],
)
def test_weights_in_the_form_of_a_kernel_are_told_apart(
    layer: nn.Module, form: str, run_dir: Path, engine: Engine
) -> None:
    engine.models = (nn.Sequential(nn.Linear(3, 2), layer),)
    [answer] = asyncio.run(workers(engine).ask("digests"))
    assert answer["format"] == form


def test_what_the_engine_quantised_by_rows_shows_the_scales_that_kernels_read(
    run_dir: Path, engine: Engine
) -> None:
    config = SimpleNamespace(is_checkpoint_fp8_serialized=False)
    layer = quantised("Fp8LinearMethod", refittable=True, quant_config=config)
    layer.register_buffer("weight_scale_channel", torch.randn(4, 1))
    engine.models = (nn.Sequential(layer),)
    [answer] = asyncio.run(workers(engine).ask("digests"))
    told = {line["name"]: (line["shape"], line["digest"]) for line in answer["tensors"]}
    scales = layer.weight_scale_channel
    assert told["0.weight_scale"] == ([4, 1], to_text(digest(scales)))  # type: ignore[arg-type]


def test_a_stock_layer_shows_its_codes_as_the_checkpoint_has_them(
    run_dir: Path, engine: Engine
) -> None:
    layer: Any = quantised("Fp8LinearMethod")
    codes = layer.weight.detach().clone()
    layer.weight = nn.Parameter(codes.t())
    layer.weight_scale = nn.Parameter(torch.tensor(2.0))
    engine.models = (nn.Sequential(layer),)
    [answer] = asyncio.run(workers(engine).ask("digests"))
    told = {line["name"]: line["digest"] for line in answer["tensors"]}
    assert told["0.weight"] == to_text(digest(codes))
    assert told["0.weight_scale"] == to_text(digest(torch.tensor([2.0])))


def test_scales_are_those_that_the_kernels_multiply_with(run_dir: Path, engine: Engine) -> None:
    """Refit keeps a copy of per-tensor scales with one entry per channel, and it is the truth."""
    layer = quantised("Fp8LinearMethod", refittable=True)
    layer.weight_scale = nn.Parameter(torch.tensor([1.0, 2.0]))
    layer.input_scale = nn.Parameter(torch.tensor([9.0]))
    layer.logical_widths = [1, 3]  # type: ignore[assignment]
    layer.weight_scale_channel = torch.tensor([[1.0], [2.0], [2.0], [2.0]])
    engine.models = (layer,)

    def told() -> dict[str, str]:
        [answer] = asyncio.run(workers(engine).ask("digests"))
        return {line["name"]: line["digest"] for line in answer["tensors"]}

    assert set(told()) == {"weight", "bias", "weight_scale"}
    assert told()["weight_scale"] == to_text(digest(torch.tensor([1.0, 2.0])))
    layer.weight_scale_channel[2] = 5.0
    assert told()["weight_scale"] == to_text(digest(torch.tensor([1.0, 5.0])))


def test_progress_counts_what_has_not_arrived(run_dir: Path, engine: Engine) -> None:
    for rank, model in enumerate(engine.models):
        sglang_worker._receiver(model, rank).arrived.update(EXPECTED[:1])
    answers = asyncio.run(workers(engine).ask("progress", expected=EXPECTED))
    assert [a["missing"] for a in answers] == [EXPECTED[1:]] * 2
    assert [a["missing_count"] for a in answers] == [2, 2]


def test_a_question_that_a_rank_cannot_answer_is_an_error_that_names_it(
    run_dir: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="rank 1: ValueError: unknown question 'nonsense'"):
        asyncio.run(workers(engine).ask("nonsense"))
    assert list((run_dir / "reports").iterdir()) == []
    assert "Traceback" in capsys.readouterr().err


def test_a_server_of_several_replicas_is_told_that_it_is_one(run_dir: Path, engine: Engine) -> None:
    engine.refusal, engine.replicas = "whatever", 2
    with pytest.raises(RuntimeError, match="data parallelism: one server would have several sets"):
        asyncio.run(workers(engine).ask("refittable"))


def test_a_refusal_of_the_engine_is_an_error(run_dir: Path, engine: Engine) -> None:
    engine.refusal = "no such load format"
    with pytest.raises(RuntimeError, match="no such load format"):
        asyncio.run(workers(engine).ask("digests"))


def test_a_question_that_is_cancelled_is_answered_and_the_next_one_too(
    run_dir: Path, engine: Engine
) -> None:
    async def ask() -> list[dict[str, Any]]:
        asked = workers(engine)
        first = asyncio.ensure_future(asked.ask("digests"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        second = asyncio.ensure_future(asked.ask("digests"))
        await asked.ask("digests")
        return await second

    assert [answer["rank"] for answer in asyncio.run(ask())] == [0, 1]
    assert len(engine.requests) == 3
    assert list((run_dir / "reports").iterdir()) == [], "answers are left behind"


def test_a_rank_that_stays_silent_is_named(
    run_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_ranks, "ANSWER_WITHIN", 0.1)
    engine.silent = {1}
    with pytest.raises(RuntimeError, match=r"no \w+\.1\.json within 0 s"):
        asyncio.run(workers(engine).ask("digests"))
    assert list((run_dir / "reports").iterdir()) == [], "the other's answer is left behind"


def test_schedulers_that_hang_do_not_keep_the_server_waiting_for_ever(
    run_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_ranks, "ANSWER_WITHIN", 0.05)
    monkeypatch.setattr(sglang_ranks, "GRACE", 0.05)
    stock = engine.update_weights_from_tensor_communicator

    async def test() -> None:
        asked, go_on = workers(engine), asyncio.Event()

        async def hang(request: Any) -> list[Any]:
            await go_on.wait()
            return await stock(request)

        monkeypatch.setattr(engine, "update_weights_from_tensor_communicator", hang)
        with pytest.raises(RuntimeError, match="did not answer within"):
            await asked.ask("digests")
        # The communicator takes one at a time, so that another would never be sent.
        with pytest.raises(RuntimeError, match="have not answered the question before"):
            await asked.ask("digests")
        assert engine.requests == []
        go_on.set()
        assert len(await asked.ask("digests")) == 2
        assert list((run_dir / "reports").iterdir()) == [], "the late answer is left behind"

    asyncio.run(test())


def test_without_a_run_folder_nothing_is_asked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ranklog.RUN_DIR, raising=False)
    with pytest.raises(RuntimeError, match="FP8CTL_RUN_DIR"):
        asyncio.run(workers(engine).ask("digests"))
    assert engine.requests == []


@pytest.mark.parametrize(
    "tensors",
    [
        [("model.norm.weight", torch.ones(2))],
        [(sglang_worker.QUESTION, torch.tensor([255, 0], dtype=torch.uint8))],
        [(sglang_worker.QUESTION, sglang_worker.Question(b"no JSON"))],
        [],
    ],
)
def test_what_is_no_question_is_passed_over(
    tensors: list[tuple[str, torch.Tensor]], run_dir: Path, engine: Engine
) -> None:
    """An exception here would end the server."""
    sglang_worker.load(engine.models[0], tensors)
    assert list(run_dir.iterdir()) == []


# --- in the scheduler ---------------------------------------------------------------------------


def loads(names: Sequence[str]) -> Any:
    """Return a request to load tensors of these names."""
    return SimpleNamespace(names=names, load_format=None)


class Worker:
    """SGLang's TpModelWorker and ModelRunner, as far as they are wrapped."""

    model: Any
    tp_rank = 0

    def load_model(self) -> None:
        self.model = nn.Linear(3, 2)
        self.model.load_weights = self._load

    def _load(self, weights: Any) -> None:
        for name, _ in weights:
            if name == "bad":
                raise ValueError("shape mismatch")

    def update_weights_from_disk(self, request: Any) -> tuple[bool, str]:
        self.model.load_weights((name, torch.zeros(1)) for name in request.names)
        return True, "Success"

    update_weights_from_tensor = update_weights_from_disk
    update_weights_from_distributed = update_weights_from_disk
    init_weights_update_group = update_weights_from_disk


@pytest.fixture
def worker(engine: Engine) -> Any:
    kind = type("Worker", (Worker,), dict(vars(Worker)))
    module: Any = SimpleNamespace(TpModelWorker=kind, ModelRunner=kind)
    sglang_worker._take_updates_safely(module)
    sglang_worker._watch_loading(module)
    made = kind()
    made.load_model()
    return made


WAYS = (
    "init_weights_update_group",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
)


@pytest.mark.parametrize("way", WAYS)
def test_a_loader_that_raises_is_an_answer_and_not_the_end_of_the_server(
    worker: Any, way: str, run_dir: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    update: Callable[[Any], tuple[bool, str]] = getattr(worker, way)
    assert update(loads(["a", "b"])) == (True, "Success")
    receiver = sglang_worker._receivers[worker.model]
    assert receiver.arrived == {"a", "b"}
    assert update(loads(["c", "bad", "d"])) == (False, "ValueError: shape mismatch")
    assert "Traceback" in capsys.readouterr().err
    assert receiver.progress(["a", "b"])["broken"]


def test_a_way_around_the_loaders_is_refused(worker: Any) -> None:
    request = loads(["a"])
    request.load_format = "direct"
    ok, message = worker.update_weights_from_tensor(request)
    assert (ok, "'direct'" in message) == (False, True)
    assert sglang_worker._receivers[worker.model].arrived == set()


@pytest.mark.parametrize("way", ["broken", "forget"])
def test_what_was_loaded_before_does_not_count_any_more(
    way: str, worker: Any, run_dir: Path, engine: Engine
) -> None:
    """After a push that broke off, and where the server says so: on every rank."""
    engine.models = (worker.model,)

    def progress() -> tuple[bool, list[str]]:
        [answer] = asyncio.run(workers(engine).ask("progress", expected=["a", "b"]))
        return answer["broken"], answer["missing"]

    worker.update_weights_from_tensor(loads(["a", "bad"] if way == "broken" else ["a"]))
    if way == "forget":
        asyncio.run(workers(engine).ask("forget"))
    assert progress() == (way == "broken", ["a", "b"])
    worker.update_weights_from_tensor(loads(["b"]))
    assert progress() == (False, ["a"])
    worker.update_weights_from_tensor(loads(["a"]))
    assert progress() == (False, [])


# --- the key ----------------------------------------------------------------------------------


def test_a_key_is_itself_and_does_not_show_itself() -> None:
    """SGLang logs its arguments as a dataclass, and pickles them for its children."""
    arguments = SimpleNamespace(api_key=Secret("hunter2"))
    assert "hunter2" not in repr(arguments) + repr([arguments.api_key])
    assert arguments.api_key == "hunter2"
    assert f"Bearer {arguments.api_key}" == "Bearer hunter2"
    copy = pickle.loads(pickle.dumps(arguments)).api_key
    assert (copy, repr(copy)) == ("hunter2", "'***'")


# --- the plan -----------------------------------------------------------------------------------


def test_a_complete_push_is_every_tensor_of_the_plan_with_its_scales() -> None:
    tensors = [
        {"name": "a.weight", "quantize": True},
        {"name": "norm.weight", "quantize": False},
    ]
    block = {"mode": "block", "tensors": tensors}
    assert manifest.expected_names(block) == ["a.weight", "a.weight_scale_inv", "norm.weight"]
    per_tensor = {"mode": "per-tensor", "tensors": tensors}
    assert manifest.expected_names(per_tensor) == ["a.weight", "a.weight_scale", "norm.weight"]
    assert manifest.expected_names({}) == []


def test_the_plan_is_read_from_the_run_folder(run_dir: Path) -> None:
    assert manifest.read() == {}
    (run_dir / "manifest.json").write_text(json.dumps({"mode": "block"}))
    assert manifest.read() == {"mode": "block"}
