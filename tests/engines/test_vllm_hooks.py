"""What fp8ctl puts around vLLM: its routes, and how its server asks workers and engine core.

vLLM itself is absent: `Engine` stands in for its client of the engine. The worker is in
test_vllm_patches.py with the real layers, the engine core in test_vllm_holding.py with the
real scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import wire
from fp8ctl.engines.hooks import loaded, vllm_ranks
from fp8ctl.engines.hooks.gate import Gate
from fp8ctl.engines.hooks.report import INSPECT, REPORT
from fp8ctl.engines.hooks.updates import Updates
from fp8ctl.engines.hooks.vllm_ranks import Workers
from fp8ctl.engines.hooks.vllm_server import CODE, STATE, UPDATE, Control

if TYPE_CHECKING:
    from collections.abc import Callable

DONE = {"loaded": 3, "error": "", "broken": False}
COMPLETE = {"broken": False, "unfilled": {}, "missing": [], "missing_count": 0}
MANIFEST: dict[str, Any] = {
    "digest": "plan",
    "mode": "per-tensor",
    "block_size": None,
    "tensors": [{"name": "a.weight", "dtype": "BF16", "shape": [2, 2], "quantize": True}],
}
PUSHES = (wire.CONNECT, wire.DISCONNECT, wire.BEGIN, wire.BUCKET, wire.END, wire.ABORT)


class State:
    """A request as vLLM's output processor knows it."""

    def __init__(self, name: str, parent: Any = None) -> None:
        self.name = name
        self.parent_req = parent
        self.queue = SimpleNamespace(put=self._put)
        self.told: list[Any] = []

    def _put(self, output: Any) -> None:
        self.told.append(output)

    def make_request_output(self, tokens: list[int], reason: Any, stop: Any) -> Any:
        assert (tokens, stop) == ([], None)
        return f"{self.name} {reason}"


class Engine:
    """Stands in for AsyncLLM, its output processor and its client of the engine core.

    Attributes:
        answers: to a question, one per rank, or an exception.
        calls: of workers and of the core, in order.
        busy: how many looks find requests that run.
    """

    def __init__(self, *ranks: dict[str, Any]) -> None:
        self.ranks = ranks or (DONE,)
        self.progress = [COMPLETE] * len(self.ranks)
        self.calls: list[tuple[Any, ...]] = []
        self.output_processor = self.engine_core = self
        self.outputs_queue: asyncio.Queue[Any] = asyncio.Queue()
        self.request_states: dict[str, State] = {}
        self.parent_requests: dict[str, Any] = {}
        self.errored = False
        self.busy = 0
        self.core: dict[str, Any] = {}
        self.at_rest = False
        self.model_config = SimpleNamespace(enable_sleep_mode=True)

    def has_unfinished_requests(self) -> bool:
        self.busy -= 1
        return self.busy >= 0

    def get_num_unfinished_requests(self) -> int:
        return self.busy + 1

    def abort_requests(self, ids: list[str]) -> None:
        for one in ids:
            del self.request_states[one]

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        assert method == "fp8ctl_ask"
        what, details = args
        if what == "reload":
            assert self.at_rest, "weights are written under requests that run"
        self.calls.append((what, json.loads(details)))
        given: Any = {"reload": self.ranks, "progress": self.progress, "digests": self.ranks}.get(
            what
        )
        if given is None:
            given = [{}] * len(self.ranks)
        whole = {"next": None, "seconds": 0.1} if what == "digests" else {}
        return [{"rank": i, "pid": 1, **whole, **one} for i, one in enumerate(given)]

    async def call_utility_async(self, method: str, *args: object) -> Any:
        self.calls.append((method, *args))
        fault = self.core.get(method)
        if isinstance(fault, Exception):
            raise fault
        if callable(fault):
            return await fault()
        self.at_rest = method != "fp8ctl_resume"
        return {"held": True, "begun": 0}

    @property
    def asked(self) -> list[str]:
        return [call[0] for call in self.calls]


class Server:
    """The gate and the routes over a server that answers 200 to everything."""

    def __init__(
        self,
        engine: Any = None,
        *,
        await_push: bool = True,
        key: str = "",
        plan: dict[str, Any] = MANIFEST,
    ) -> None:
        self.gate = Gate(engine="vllm", engine_version="0.9.1", await_push=await_push)
        self.engine = engine or Engine()

        async def engine_app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b'"answer"'})

        self.workers = Workers(lambda: self.engine, 1)
        self.updates = Updates(self.gate, self.workers, plan, device="cuda", folder=None)
        control = Control(engine_app, self.gate, plan, key or None, self.workers, self.updates)
        self._app = self.gate.wrap(control)

    async def soon(
        self, method: str, path: str, body: object = None, key: str = "", query: str = ""
    ) -> tuple[int, Any]:
        sent: list[Any] = []
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope: dict[str, Any] = {"type": "http", "method": method, "path": path}
        scope |= {"headers": headers, "query_string": query.encode()}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    def ask(self, method: str, path: str, body: object = None, key: str = "") -> tuple[int, Any]:
        return asyncio.run(self.soon(method, path, body, key))

    def update(self) -> tuple[int, Any]:
        return self.ask("POST", UPDATE, {"model_path": "/b"})

    @property
    def state(self) -> str:
        return str(self.ask("GET", STATE)[1]["state"])


# --- an update from a folder ----------------------------------------------------------------------


def test_a_complete_update_opens_the_gate_and_forgets_the_caches() -> None:
    server = Server(Engine(DONE, DONE))
    assert server.state == "unpushed"
    assert server.ask("POST", "/v1/completions")[0] == 503
    assert server.update() == (200, {"success": True, "message": "", "missing": 0})
    assert server.engine.calls == [
        ("fp8ctl_hold", "finish"),
        ("reload", {"path": "/b"}),
        ("fp8ctl_flush",),
        ("progress", {"expected": ["a.weight", "a.weight_scale"]}),
        ("fp8ctl_resume",),
    ]
    assert server.state == "ready"
    assert server.ask("POST", "/v1/completions") == (200, "answer")


def test_a_part_of_the_weights_leaves_the_gate_closed() -> None:
    engine = Engine(DONE, DONE)
    engine.progress = [COMPLETE, {**COMPLETE, "unfilled": {"x.weight": "rows 0-3 of 4"}}]
    server = Server(engine)
    status, answer = server.update()
    assert (status, answer["missing"]) == (200, 1)
    assert "x.weight" in answer["message"]
    assert server.state == "unpushed"


@pytest.mark.parametrize("plan", [MANIFEST, {}])
def test_a_server_with_weights_takes_a_part(plan: dict[str, Any]) -> None:
    server = Server(await_push=False, plan=plan)
    server.update()
    assert ("progress", {"expected": []}) in server.engine.calls
    assert server.state == "ready"


def test_without_a_plan_a_folder_is_all_there_is() -> None:
    server = Server(plan={})
    assert server.update()[0] == 200
    assert server.state == "ready"


@pytest.mark.parametrize(
    ("ranks", "state"),
    [
        ([{**DONE, "error": "E", "broken": True}], "failed"),
        ([{**DONE, "error": "E"}, DONE], "failed"),  # the ranks differ now
        ([{**DONE, "error": "E"}], "ready"),  # nothing was changed
    ],
)
def test_an_error_closes_the_gate_only_where_weights_may_be_mixed(
    ranks: list[dict[str, Any]],
    state: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _fake_vllm(monkeypatch)
    server = Server(Engine(*ranks), await_push=False)
    status, answer = server.update()
    assert (status, answer["success"]) == (400, False)
    assert "rank 0: E" in answer["message"]
    assert server.state == state
    assert server.engine.asked.count("forget") == (state == "failed")
    assert server.engine.asked[-1] == "fp8ctl_resume"


def test_an_update_waits_for_the_requests_that_run() -> None:
    server = Server()
    server.engine.busy = 3
    assert server.update()[0] == 200
    assert server.engine.busy < 0


@pytest.mark.parametrize("body", [None, [], {}, {"model_path": 3}])
def test_a_request_that_names_no_folder_changes_nothing(body: object) -> None:
    server = Server(await_push=False)
    assert server.ask("POST", UPDATE, body)[0] == 400
    assert server.engine.calls == []
    assert server.state == "ready"


def test_two_updates_from_folders_follow_each_other() -> None:
    server = Server()

    async def both() -> list[tuple[int, Any]]:
        body = {"model_path": "/b"}
        return await asyncio.gather(*(server.soon("POST", UPDATE, body) for _ in range(2)))

    assert [status for status, _ in asyncio.run(both())] == [200, 200]
    assert [one for one in server.engine.asked if "hold" in one or "resume" in one] == [
        *("fp8ctl_hold", "fp8ctl_resume"),
        *("fp8ctl_hold", "fp8ctl_resume"),
    ]


@pytest.mark.parametrize("path", [UPDATE, "/sleep", "/wake_up"])
def test_while_a_push_is_open_nothing_else_touches_the_weights(path: str) -> None:
    server = Server(await_push=False)
    server.engine.progress = [COMPLETE]

    async def test() -> None:
        offer = {"protocol": wire.PROTOCOL, "client": {}, "carrier": None}

        async def ask(what: str, **details: Any) -> list[dict[str, Any]]:
            return [{"refittable": True}]

        server.workers.ask = ask  # type: ignore[method-assign]
        connection = (await server.soon("POST", wire.CONNECT, offer))[1]["connection"]
        begin = wire.Begin("p", connection, "1", MANIFEST["digest"])
        assert (await server.soon("POST", wire.BEGIN, begin.to_json()))[0] == 200
        assert (await server.soon("POST", path, {"model_path": "/b"}))[0] == 409
        assert (await server.soon("POST", wire.ABORT, {"push": "p"}))[1]["outcome"] == "rejected"
        assert (await server.soon("POST", "/sleep"))[0] == 200

    asyncio.run(test())


@pytest.mark.parametrize(
    ("query", "sleeps", "state"),
    [
        ("", True, "ready"),  # level 1 keeps a copy
        ("level=1", True, "ready"),
        ("level=2", True, "unpushed"),
        ("level=2", False, "ready"),  # without sleep mode nothing is given up
    ],
)
def test_a_sleep_that_drops_the_weights_closes_the_gate(
    query: str, sleeps: bool, state: str
) -> None:
    server = Server(await_push=False)
    server.engine.model_config = SimpleNamespace(enable_sleep_mode=sleeps)

    async def test() -> None:
        assert (await server.soon("POST", "/sleep", query=query))[0] == 200
        assert (await server.soon("POST", "/wake_up", query="level=2"))[0] == 200

    asyncio.run(test())
    assert server.state == state, "waking up brings none back"
    assert (("forget", {}) in server.engine.calls) == (state == "unpushed")


@pytest.mark.parametrize(
    ("woken", "refused"),
    [
        (None, True),
        ("tags=kv_cache", True),
        ("tags=weights&tags=other", True),  # vLLM ignores such a list
        ("tags=weights", False),
        ("", False),
    ],
)
def test_nothing_is_written_to_an_engine_that_sleeps(woken: str | None, refused: bool) -> None:
    """Also where it keeps a copy and the gate stays open."""
    server = Server(await_push=False)
    offer = {"protocol": wire.PROTOCOL, "client": {}, "carrier": None}

    async def test() -> None:
        assert (await server.soon("POST", "/sleep", query="level=1"))[0] == 200
        if woken is not None:
            assert (await server.soon("POST", "/wake_up", query=woken))[0] == 200
        status, answer = await server.soon("POST", wire.CONNECT, offer)
        if refused:
            assert (status, answer["error"]["id"]) == (409, "FP8-RELEASED")
            assert "/wake_up" in answer["error"]["hint"]
        own = (await server.soon("POST", UPDATE, {"model_path": "/b"}))[0]
        report = (await server.soon("POST", REPORT))[0]
        assert (own, report) == ((409, 409) if refused else (200, 200))
        if refused:
            assert not server.engine.calls

    asyncio.run(test())


# --- routes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", STATE), ("GET", CODE), ("POST", REPORT), ("POST", UPDATE), ("POST", INSPECT)],
        *[("GET", wire.LOG), *(("POST", path) for path in PUSHES)],
    ],
)
def test_the_key_guards_every_route_of_fp8ctl(method: str, path: str) -> None:
    server = Server(key="secret")
    body = {"model_path": "/b"}
    assert server.ask(method, path, body)[0] == 401
    assert server.ask(method, path, body, key="wrong")[0] == 401
    assert server.engine.calls == []
    assert server.ask(method, path, body, key="secret")[0] != 401


def test_a_report_carries_state_plan_and_ranks() -> None:
    held: dict[str, Any] = {"format": "checkpoint", "tensors": [], "next": None, "seconds": 0.25}
    server = Server(Engine(held), await_push=False)
    status, answer = server.ask("POST", REPORT)
    assert status == 200
    assert answer["state"]["state"] == "ready"
    assert answer["manifest"] == MANIFEST
    took = {"total": 0.25, "longest": 0.25, "slices": 1}
    told = {"rank": 0, "pid": 1, "format": "checkpoint", "tensors": [], "seconds": took}
    assert answer["ranks"] == [told]
    broken = Server(Engine({"failed": "E"}))
    assert broken.ask("POST", REPORT) == (500, {"error": "rank 0: E"})


def test_every_process_is_asked_for_its_code_also_while_the_gate_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server()
    server.gate.ranks = 2
    monkeypatch.setattr(loaded, "everyone", lambda ranks: {"ranks": ranks})
    assert server.state == "unpushed"
    assert server.ask("GET", CODE) == (200, {"ranks": 2})


def test_other_routes_of_fp8ctl_do_not_reach_the_engine() -> None:
    assert Server().ask("POST", STATE)[0] == 404
    assert Server().ask("GET", "/health") == (200, "answer")


def test_the_engine_of_before_v1_is_told_apart() -> None:
    server = Server(SimpleNamespace())
    status, answer = server.ask("POST", REPORT)
    assert status == 500
    assert "V0" in answer["error"]


# --- workers and core -----------------------------------------------------------------------------


def _fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the one name that ending requests takes from vLLM."""
    module = ModuleType("vllm.v1.engine")
    module.FinishReason = SimpleNamespace(ABORT="abort")  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", module)


def of(engine: Engine) -> Workers:
    return Workers(lambda: engine, len(engine.ranks))


def test_a_rank_that_failed_is_named() -> None:
    engine = Engine(DONE, DONE)
    engine.progress = [COMPLETE, {"failed": "ValueError: no"}]
    with pytest.raises(RuntimeError, match="rank 1: ValueError: no"):
        asyncio.run(of(engine).ask("progress", expected=[]))


def test_finishing_goes_on_where_a_late_request_has_begun() -> None:
    async def test() -> None:
        engine = Engine()
        answers = [{"held": False, "begun": 1}, {"held": True, "begun": 0}]

        async def hold() -> dict[str, Any]:
            return answers.pop(0)

        engine.core["fp8ctl_hold"] = hold
        await of(engine).hold("finish", 5.0)
        assert engine.calls == [("fp8ctl_hold", "finish")] * 2

    asyncio.run(test())


def test_finishing_ends_with_its_time() -> None:
    engine = Engine()
    engine.busy = 1 << 30
    with pytest.raises(TimeoutError, match=r"\d+ requests still run after 0.02 s"):
        asyncio.run(of(engine).hold("finish", 0.02))
    assert engine.calls == []


def test_pausing_is_the_cores_business_alone() -> None:
    engine = Engine()
    engine.busy = 1 << 30
    asyncio.run(of(engine).hold("pause", 0.0))
    assert engine.calls == [("fp8ctl_hold", "pause")]


def test_aborting_tells_every_client_that_the_core_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes while the core is asked is not the core's yet: it waits there."""
    _fake_vllm(monkeypatch)

    async def test() -> None:
        engine = Engine()
        parent = SimpleNamespace(request_id="p", child_requests=set())
        states = {"a": State("a"), "0_p": State("0_p", parent), "ended": State("ended")}
        engine.request_states = dict(states)
        engine.parent_requests = {"p": parent}
        late = State("late")

        async def hold() -> dict[str, Any]:
            engine.request_states["late"] = late
            # The last thing that the core gave is on its way: this one has ended by itself.
            engine.outputs_queue.put_nowait("ended")

            async def handle() -> None:
                del engine.request_states[await engine.outputs_queue.get()]

            engine.handler = asyncio.ensure_future(handle())  # type: ignore[attr-defined]
            return {"held": True, "begun": 3}

        engine.core["fp8ctl_hold"] = hold
        await of(engine).hold("abort", 0.0)
        assert states["a"].told == ["a abort"]
        assert states["0_p"].told == ["0_p abort"]
        assert states["ended"].told == late.told == []
        assert engine.request_states == {"late": late}
        assert engine.parent_requests == {}

    asyncio.run(test())


def test_aborting_does_not_wait_for_outputs_of_an_engine_that_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody reads them any more."""
    _fake_vllm(monkeypatch)

    async def test() -> None:
        engine = Engine()

        async def hold() -> dict[str, Any]:
            engine.outputs_queue.put_nowait("the last")
            engine.errored = True
            return {"held": True, "begun": 1}

        engine.core["fp8ctl_hold"] = hold
        workers = of(engine)
        with contextlib.suppress(RuntimeError):
            await workers.hold("abort", 0.0)
        await asyncio.sleep(0.1)
        assert not workers._calls

    asyncio.run(test())


def test_aborting_goes_on_to_tell_the_clients_where_its_caller_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The core has dropped the requests: nobody else would."""
    _fake_vllm(monkeypatch)

    async def test() -> None:
        engine = Engine()
        engine.request_states = {"a": State("a")}
        [state] = engine.request_states.values()
        go_on = asyncio.Event()

        async def hold() -> dict[str, Any]:
            await go_on.wait()
            return {"held": True, "begun": 1}

        engine.core["fp8ctl_hold"] = hold
        workers = of(engine)
        holding = asyncio.ensure_future(workers.hold("abort", 0.0))
        await asyncio.sleep(0.01)
        holding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await holding
        go_on.set()
        await asyncio.sleep(0.05)
        assert state.told == ["a abort"]

    asyncio.run(test())


def test_a_call_is_never_cancelled_with_who_waits_for_it() -> None:
    """vLLM takes an answer that nobody waits for as the death of its engine."""

    async def test() -> None:
        engine = Engine()
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        async def hold() -> dict[str, Any]:
            return await answered

        engine.core["fp8ctl_hold"] = hold
        holding = asyncio.ensure_future(of(engine).hold("pause", 0.0))
        await asyncio.sleep(0.01)
        holding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await holding
        assert not answered.cancelled()
        answered.set_result({"held": True})
        await asyncio.sleep(0)

    asyncio.run(test())


@pytest.mark.parametrize(
    ("die", "told"),
    [
        (lambda engine: setattr(engine, "errored", True), "vLLM's engine has died"),
        (lambda engine: None, "did not answer within 0 s"),
    ],
)
def test_an_engine_that_will_not_answer_does_not_hang_its_server(
    die: Callable[[Engine], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_ranks, "_LOOK_FOR_DEATH", 0.01)
    if "0 s" in told:
        monkeypatch.setattr(vllm_ranks, "ANSWER_WITHIN", 0.05)

    async def test() -> None:
        engine = Engine()
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def wait() -> Any:
            return await answered

        engine.core["fp8ctl_flush"] = wait
        die(engine)
        with pytest.raises(RuntimeError, match=told):
            await of(engine).flush()
        answered.set_result({})
        await asyncio.sleep(0)

    asyncio.run(test())


def test_the_core_is_told_to_forget_its_caches_before_the_ranks_are_asked() -> None:
    """And to compute again after they are told what to trust: in this order, without a wait."""

    async def test() -> None:
        engine = Engine()
        asked, go_on = engine.collective_rpc, asyncio.Event()

        async def late(*args: Any, **kwargs: Any) -> Any:
            answer = await asked(*args, **kwargs)
            await go_on.wait()
            return answer

        engine.collective_rpc = late  # type: ignore[method-assign]
        for doing, order in (
            (of(engine).settle(expected=[]), ["fp8ctl_flush", "progress"]),
            (of(engine).receive({"slot": 0}, {"expected": []}), ["fp8ctl_flush", "receive"]),
            (of(engine).receive({"slot": 0}), ["receive"]),
            (of(engine).resume(["a"]), ["trust", "fp8ctl_resume"]),
        ):
            engine.calls.clear()
            task: asyncio.Future[Any] = asyncio.ensure_future(doing)
            for _ in range(10):
                await asyncio.sleep(0)
            assert (engine.asked, task.done()) == (order, False)
            go_on.set()
            await task
            go_on.clear()

    asyncio.run(test())


@pytest.mark.parametrize("wrong", ["ranks", "core", "both"])
def test_a_failure_of_either_is_that_of_both_and_the_ranks_is_told_first(wrong: str) -> None:
    engine = Engine()
    if wrong != "core":
        engine.progress = [{"failed": "out of memory"}]
    if wrong != "ranks":
        engine.core["fp8ctl_flush"] = Exception("in use")
    with pytest.raises(RuntimeError, match="in use" if wrong == "core" else "out of memory"):
        asyncio.run(of(engine).settle(expected=[]))


def test_ranks_that_cannot_trust_what_was_proven_compute_all_the_same() -> None:
    engine = Engine()
    refuse = {"failed": "out of memory"}

    async def refusing(*args: Any, **kwargs: Any) -> Any:
        return [{"rank": 0, **refuse}]

    engine.collective_rpc = refusing  # type: ignore[method-assign]
    assert "out of memory" in asyncio.run(of(engine).resume(["a"]))
    assert engine.asked == ["fp8ctl_resume"]
    engine.core["fp8ctl_resume"] = Exception("dead")
    with pytest.raises(RuntimeError, match="dead"):
        asyncio.run(of(engine).resume(["a"]))


def test_a_core_that_refuses_is_an_error_with_its_words() -> None:
    engine = Engine()
    engine.core["fp8ctl_hold"] = Exception("Call to fp8ctl_hold method failed: no")
    with pytest.raises(RuntimeError, match="fp8ctl_hold method failed: no"):
        asyncio.run(of(engine).hold("pause", 0.0))
