"""A server from its start to its end: readiness, the closing check, death, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import gate, process, registry, server, supervisor
from fp8ctl.check import levels, live, weights
from fp8ctl.errors import (
    AbortedError,
    BusyError,
    CheckFailedError,
    EngineFailedError,
    NotFoundError,
)
from fp8ctl.process import free_port
from fp8ctl.supervisor import About, RunFiles, Watch, serve
from tests.reporting import reporter
from tests.starts import FAKE, fake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8ctl.engines.base import LaunchPlan
    from fp8ctl.render import Reporter

ABOUT = About(engine="fake 0", source="/models/tiny", mode="block", site_packages="/nowhere")


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_ALL", 0.3)
    monkeypatch.setattr(process.stop_tree, "__kwdefaults__", {"grace": 0.6})
    monkeypatch.setenv("FP8CTL_TESTER", str(os.getpid()))
    monkeypatch.setattr(supervisor, "_ASK_EVERY", 0.1)


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    for record, _ in server.running(ask_state=False)[0]:
        server.stop(record)
    assert not marked(registry.servers_dir())


def marked(folder: Path) -> list[int]:
    """Return who carries a run folder below `folder` in its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"FP8CTL_RUN_DIR={folder}".encode() in text:
                found.append(int(entry.name))
    return found


def plan_of(*arguments: str, await_push: bool = False, name: str = "sglang-1") -> LaunchPlan:
    folder = registry.servers_dir() / name
    return fake(folder, free_port("127.0.0.1"), *arguments, await_push=await_push)


DETACH = Watch(detach=True, timeout=20)
ASK_EVERY = supervisor._ASK_EVERY


def test_detach_returns_a_checked_server_that_keeps_running() -> None:
    report, out, err = reporter()
    plan = plan_of("--quantization", "fp8", "--delay", "0.3")
    data = serve(report, plan, ABOUT, replace(DETACH, expect="Paris"), RunFiles("{}\n"))
    assert (data["name"], data["url"], data["state"]) == ("sglang-1", plan.url, "ready")
    assert gate.ask(plan.url).state == "ready"
    assert "live: ok" in out.getvalue()
    assert "fp8ctl stop sglang-1" in err.getvalue()
    assert (plan.run_dir / "manifest.json").read_text() == "{}\n"
    [(record, state)], _ = server.running()
    assert (record.name, state) == ("sglang-1", "ready")
    server.stop(record)
    assert gate.ask(plan.url).state == "starting"


def test_no_wait_returns_at_once() -> None:
    begun = time.monotonic()
    data = serve(reporter()[0], plan_of("--delay", "30"), ABOUT, Watch(detach=True, wait=False))
    assert time.monotonic() - begun < 5
    assert (data["state"], data["check"]) == ("starting", None)
    [(record, state)], _ = server.running()
    assert state == "starting"
    server.stop(record)


def test_a_port_in_use_is_busy_before_anything_starts() -> None:
    plan = plan_of()
    serve(reporter()[0], plan, ABOUT, DETACH)
    other = replace(plan, run_dir=registry.servers_dir() / "sglang-2")
    with pytest.raises(BusyError, match=f"port {plan.port}") as caught:
        serve(reporter()[0], other, ABOUT, DETACH)
    assert (caught.value.exit_code, other.run_dir.exists()) == (7, False)
    # The server that was there is as it was.
    assert gate.ask(plan.url).state == "ready"


def test_a_crash_before_ready_shows_the_log_and_the_cause() -> None:
    report, _, err = reporter()
    text = "\n".join(f"line {n}" for n in range(50)) + "\nModuleNotFoundError: No module named 'x'"
    with pytest.raises(EngineFailedError, match=r"died before it was ready \(exit 3\)") as caught:
        serve(report, plan_of("--crash", text), ABOUT, DETACH)
    assert caught.value.exit_code == 9
    assert caught.value.data["cause"] == "import"
    shown = err.getvalue()
    assert "ModuleNotFoundError" in shown
    assert "line 49" in shown
    assert "line 19\n" not in shown, "more than the last 30 lines were shown"
    # Nothing is left but the log.
    assert not registry.folder("sglang-1").exists()
    report, out, _ = reporter()
    server.run_logs(report, name="sglang-1")
    assert "line 0" in out.getvalue()


def test_a_server_that_is_not_ready_in_time_is_stopped() -> None:
    with pytest.raises(EngineFailedError) as caught:
        serve(reporter()[0], plan_of("--delay", "60"), ABOUT, replace(DETACH, timeout=1.0))
    # It did not die, so nobody knows a cause.
    assert caught.value.message == "fake 0 was not ready after 1 s (--timeout)"
    assert caught.value.hint == "--timeout 2, or see fp8ctl logs sglang-1"
    assert not marked(registry.servers_dir())


def test_the_last_error_of_a_log_without_a_known_cause_is_in_the_message() -> None:
    with pytest.raises(EngineFailedError) as caught:
        serve(reporter()[0], plan_of("--crash", "KeyError: 'model.layers.0'"), ABOUT, DETACH)
    died = "fake 0 died before it was ready (exit 3); its last error: KeyError: 'model.layers.0'"
    assert caught.value.message == died
    assert caught.value.hint == "fp8ctl logs sglang-1"


# --- whose answer it is ---


@pytest.fixture
def intruder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function: have a stand-in take the port just after the server was started."""
    started: list[subprocess.Popen[bytes]] = []

    def arrange(*arguments: str) -> None:
        spawn = process.spawn

        def spawn_and_intrude(
            plan: LaunchPlan, log: Path, environ: dict[str, str]
        ) -> subprocess.Popen[bytes]:
            child = spawn(plan, log, environ)
            argv = [sys.executable, str(FAKE), "--port", str(plan.port), *arguments]
            started.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL))
            while gate.ask(plan.url).state == "starting":
                assert started[-1].poll() is None
                time.sleep(0.02)
            return child

        monkeypatch.setattr(supervisor, "spawn", spawn_and_intrude)

    yield arrange
    for one in started:
        assert one.poll() is None, "what was not ours was ended"
        one.kill()
        one.wait()


@pytest.mark.parametrize(
    "kind", [(), ("--state", "unpushed"), ("--state", "none"), ("--key", "NO_SUCH_VARIABLE")]
)
def test_the_answer_of_another_server_is_not_taken_for_its_own(
    intruder: Callable[..., None], kind: tuple[str, ...]
) -> None:
    intruder(*kind)
    plan = plan_of("--delay", "60")
    begun = time.monotonic()
    with pytest.raises(BusyError, match=f"port {plan.port} on 127.0.0.1 was taken by") as caught:
        serve(reporter()[0], plan, ABOUT, DETACH)
    assert time.monotonic() - begun < 10
    assert caught.value.exit_code == 7
    assert str(caught.value.hint).startswith("--port ")
    assert not marked(registry.servers_dir()), "its own process was left running"
    assert server.running() == ((), ())


def test_a_server_that_wants_a_key_which_launch_lacks_is_known_by_its_socket() -> None:
    plan = plan_of("--key", "NO_SUCH_VARIABLE")
    data = serve(reporter()[0], plan, ABOUT, replace(DETACH, check=None))
    assert data["state"] == "locked"
    [(_, state)], _ = server.running()
    assert state == "locked"


def test_a_key_of_vllms_own_variable_is_asked_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    plan = replace(plan_of("--key", "VLLM_API_KEY"), backend="vllm")
    data = serve(reporter()[0], plan, ABOUT, replace(DETACH, check=None))
    assert data["state"] == "ready"


def test_an_answer_from_before_its_death_does_not_make_a_server_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask = gate.ask

    def ask_and_die(*given: Any, pid: int | None = None) -> gate.Answer:
        answer = ask(*given, pid=pid)
        if answer.state == "ready" and pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return answer

    monkeypatch.setattr(gate, "ask", ask_and_die)
    with pytest.raises(EngineFailedError, match=r"died before it was ready \(exit -9\)"):
        serve(reporter()[0], plan_of(), ABOUT, DETACH)


def test_a_port_that_a_loading_server_is_going_to_take_is_busy_at_once() -> None:
    plan = plan_of("--delay", "30")
    serve(reporter()[0], plan, ABOUT, Watch(detach=True, wait=False))
    second = replace(plan, run_dir=registry.servers_dir() / "sglang-2")
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        begun = time.monotonic()
        with pytest.raises(BusyError) as caught:
            serve(reporter()[0], replace(second, host=host), ABOUT, DETACH)
        assert time.monotonic() - begun < 3
        assert caught.value.message == (f"port {plan.port} is taken by sglang-1, which is starting")
        assert caught.value.exit_code == 7
        assert "fp8ctl stop sglang-1" in str(caught.value.hint)
    assert not second.run_dir.exists()
    # Another address of this machine is another door.
    other = replace(second, host="127.0.0.2")
    other = replace(other, argv=(*other.argv, "--host", "127.0.0.2"))
    serve(reporter()[0], other, ABOUT, Watch(detach=True, wait=False))


def test_of_two_launches_in_the_same_moment_one_gets_the_port() -> None:
    plan = plan_of("--delay", "30")
    outcomes: list[str] = []

    def launch(name: str) -> None:
        one = replace(plan, run_dir=registry.servers_dir() / name)
        one = replace(one, env=(("FP8CTL_RUN_DIR", str(one.run_dir)), *plan.env[1:]))
        try:
            serve(reporter()[0], one, ABOUT, Watch(detach=True, wait=False))
            outcomes.append("started")
        except BusyError:
            outcomes.append("busy")

    threads = [threading.Thread(target=launch, args=(f"sglang-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(outcomes) == ["busy", "busy", "busy", "started"]
    assert len(server.running(ask_state=False)[0]) == 1


# --- what is asked and shown while it starts ---


def test_a_death_is_seen_between_two_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_ASK_EVERY", 60.0)
    begun = time.monotonic()
    with pytest.raises(EngineFailedError, match="died before it was ready"):
        serve(reporter()[0], plan_of("--delay", "0.5", "--crash", "x"), ABOUT, DETACH)
    assert time.monotonic() - begun < 10


def test_the_server_is_asked_no_oftener_than_its_log_can_bear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ASK_EVERY >= 1.0
    monkeypatch.setattr(supervisor, "_ASK_EVERY", ASK_EVERY)
    asked: list[float] = []
    ask = gate.ask

    def count(*given: Any, pid: int | None = None) -> gate.Answer:
        asked.append(time.monotonic())
        return ask(*given, pid=pid)

    monkeypatch.setattr(gate, "ask", count)
    with pytest.raises(EngineFailedError, match="not ready after 2 s"):
        serve(reporter()[0], plan_of("--delay", "60"), ABOUT, replace(DETACH, timeout=2.0))
    assert 2 <= len(asked) <= 3


def test_what_fp8ctl_itself_leaves_in_the_log_is_not_shown() -> None:
    own = 'INFO:     127.0.0.1:1 - "GET /fp8ctl/state HTTP/1.1" 503 Service Unavailable'
    other = 'INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK'
    for watch in (DETACH, Watch(timeout=20)):
        report, _, err = reporter()
        with pytest.raises(EngineFailedError) as caught:
            serve(report, plan_of("--crash", f"{own}\n{other}\n{own}"), ABOUT, watch)
        assert caught.value.data["last_lines"] == ["loading", other]
        assert "/fp8ctl/state" not in err.getvalue()
        assert other in err.getvalue()


def test_a_silent_start_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_TELL_EVERY", 0.3)
    mute = replace(plan_of(), argv=(sys.executable, "-c", "import time; time.sleep(60)"))
    for watch in (DETACH, Watch()):
        report, _, err = reporter()
        with pytest.raises(EngineFailedError):
            serve(report, mute, ABOUT, replace(watch, timeout=1.0))
        said = err.getvalue()
        assert "fake 0 is starting: it imports its packages" in said
        assert "waiting, 0 s: the engine imports its packages" in said
        assert "Connection" not in said
    report, _, err = reporter()
    with pytest.raises(EngineFailedError):
        serve(report, plan_of("--delay", "60"), ABOUT, replace(DETACH, timeout=3.0))
    assert "s: loading\n" in err.getvalue(), "the last line of its log is what it does"


def test_a_server_that_says_it_failed_is_stopped() -> None:
    with pytest.raises(EngineFailedError, match="says it has failed"):
        serve(reporter()[0], plan_of("--state", "failed"), ABOUT, DETACH)
    assert not marked(registry.servers_dir())


def test_a_failing_check_stops_the_server_even_when_detached() -> None:
    report, _, err = reporter()
    with pytest.raises(CheckFailedError, match="chat: 'Lyon'") as caught:
        serve(report, plan_of("--answer", "Lyon"), ABOUT, replace(DETACH, expect="Paris"))
    assert caught.value.exit_code == 8
    assert "sglang-1 was stopped" in err.getvalue()
    assert not marked(registry.servers_dir())


def test_a_death_under_the_check_is_a_death_with_its_cause() -> None:
    with pytest.raises(EngineFailedError, match="died while it was checked") as caught:
        serve(reporter()[0], plan_of("--die-when-asked"), ABOUT, DETACH)
    assert caught.value.data["cause"] == "memory-host"


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize("state", ["updating", "failed"])
def test_a_trainer_may_push_before_anybody_has_seen_that_the_server_is_ready(
    state: str, updates: int
) -> None:
    plan = plan_of("--state", state, "--about", json.dumps({"updates": updates}), await_push=True)
    if state == "failed" and not updates:
        with pytest.raises(EngineFailedError, match="says it has failed"):
            serve(reporter()[0], plan, ABOUT, DETACH)
    else:
        data: Any = serve(reporter()[0], plan, ABOUT, replace(DETACH, timeout=10))
        assert data["state"] == state
        assert data["check"]["beside_update"] is True
        assert gate.ask(plan.url).state == state


def test_an_update_that_came_to_nothing_beside_the_check_does_not_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = tmp_path / "state"
    look = live.check

    def beside(*args: Any, **more: Any) -> Any:
        turn.write_text("updating")
        try:
            return look(*args, **more)
        finally:
            turn.write_text("unpushed")

    monkeypatch.setattr(live, "check", beside)
    words = ("--turn", str(turn), "--about", '{"updates": 0}', "--quantization", "fp8")
    plan = plan_of("--state", "unpushed", *words, await_push=True)
    data: Any = serve(reporter()[0], plan, ABOUT, DETACH)
    assert data["check"]["beside_update"] is True
    assert gate.ask(plan.url).state == "unpushed"


@pytest.mark.parametrize("state", ["ready", "unpushed"])
@pytest.mark.parametrize("after", ["updating", "ready"])
def test_a_trainer_that_updates_beside_the_check_keeps_its_server(
    state: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks the gate, and need not wait until somebody has looked."""
    turn = tmp_path / "state"
    look = live.check

    def beside(*args: Any, **more: Any) -> Any:
        turn.write_text(after)
        return look(*args, **more)

    monkeypatch.setattr(live, "check", beside)
    told = json.dumps({"updates": int(after == "ready")})
    words = ("--turn", str(turn), "--about", told, "--answer", "Lyon", "--quantization", "fp8")
    plan = plan_of("--state", state, *words, await_push=state == "unpushed")
    report, out, _ = reporter()
    data: Any = serve(report, plan, ABOUT, replace(DETACH, expect="Paris"))
    assert "verdict: updating, the weights changed beside this check" in out.getvalue()
    assert data["check"]["live"]["result"] == "failed", "it is told as it was seen"
    assert data["check"]["beside_update"] is True
    assert gate.ask(plan.url).state == after


def test_no_check_leaves_the_server_unasked() -> None:
    data = serve(
        reporter()[0],
        plan_of("--answer", "Lyon"),
        ABOUT,
        replace(DETACH, expect="Paris", check=None),
    )
    assert data["check"] is None


@pytest.mark.parametrize("level", ["weights", "logprobs"])
def test_a_further_level_that_proves_nothing_stops_the_server(level: levels.Level) -> None:
    """The stand-in answers well, and shows nothing of its weights: not what was asked for."""
    report, _, err = reporter()
    plan = plan_of("--quantization", "fp8")
    with pytest.raises(CheckFailedError, match="not proven to serve FP8") as caught:
        serve(report, plan, ABOUT, replace(DETACH, check=level))
    seen: Any = caught.value.data
    assert (seen["level"], seen[level]["result"]) == (level, "not visible")
    assert "sglang-1 was stopped" in err.getvalue()
    assert not marked(registry.servers_dir())


@pytest.mark.parametrize(("verdict", "result"), [("fp8-ok", "ok"), ("stale", "failed")])
def test_the_closing_check_is_that_of_the_level_with_the_servers_key_and_model(
    verdict: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str | None, str | None]] = []

    def verify(url: str, model: str | None, _: Reporter, key: str | None) -> dict[str, object]:
        asked.append((model, key))
        return {"result": result, "verdict": verdict, "message": f"as {url} says"}

    monkeypatch.setattr(weights, "verify", verify)
    monkeypatch.setenv("VLLM_API_KEY", "k-1234")
    plan = plan_of("--quantization", "fp8", "--key", "VLLM_API_KEY", name="vllm-1")
    plan = replace(plan, backend="vllm")
    watch = replace(DETACH, check="weights", model="/models/m")
    if result == "ok":
        seen: Any = serve(reporter()[0], plan, ABOUT, watch)["check"]
        assert gate.ask(plan.url, "k-1234").state == "ready"
    else:
        with pytest.raises(CheckFailedError, match="is stale: as http") as caught:
            serve(reporter()[0], plan, ABOUT, watch)
        seen = caught.value.data
        assert not marked(registry.servers_dir())
    assert asked == [("/models/m", "k-1234")]
    assert (seen["level"], seen["verdict"], seen["weights"]["verdict"]) == (
        "weights",
        verdict,
        verdict,
    )


def test_a_check_that_cannot_be_made_stops_the_server_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def verify(*_: object) -> dict[str, object]:
        raise NotFoundError("no interpreter here has torch")

    monkeypatch.setattr(weights, "verify", verify)
    report, _, err = reporter()
    with pytest.raises(NotFoundError, match="has torch"):
        serve(report, plan_of("--quantization", "fp8"), ABOUT, replace(DETACH, check="weights"))
    assert "sglang-1 was stopped" in err.getvalue()
    assert not marked(registry.servers_dir())


def test_a_death_at_a_further_level_is_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(*_: object) -> dict[str, object]:
        [record] = [one for one, _ in server.running(ask_state=False)[0]]
        os.kill(record.identity.pid, signal.SIGKILL)
        raise CheckFailedError("/fp8ctl/report does not answer")

    monkeypatch.setattr(weights, "verify", verify)
    with pytest.raises(EngineFailedError, match="died while it was checked"):
        serve(
            reporter()[0],
            plan_of("--quantization", "fp8"),
            ABOUT,
            replace(DETACH, check="weights"),
        )


def test_a_server_that_awaits_a_push_is_as_it_should_be() -> None:
    report, out, _ = reporter()
    plan = plan_of("--state", "unpushed", "--quantization", "fp8", await_push=True)
    data = serve(report, plan, ABOUT, DETACH)
    assert data["state"] == "unpushed"
    assert "verdict: unpushed, as asked" in out.getvalue()


def test_an_unpushed_server_that_should_be_open_fails_the_check() -> None:
    with pytest.raises(CheckFailedError, match="unpushed"):
        serve(reporter()[0], plan_of("--state", "unpushed"), ABOUT, DETACH)


def test_in_the_foreground_the_log_is_shown_and_a_later_death_is_an_error() -> None:
    report, _, err = reporter()
    plan = plan_of("--die-after", "3.0")
    with pytest.raises(EngineFailedError, match=r"fake 0 died \(exit 4\)") as caught:
        serve(report, plan, ABOUT, Watch(timeout=20))
    assert caught.value.data["cause"] == "memory-gpu"
    assert err.getvalue().index("loading") < err.getvalue().index("listening")


def test_in_the_foreground_fp8ctl_stop_is_a_good_end() -> None:
    report, _, err = reporter()
    plan = plan_of()

    def stop() -> None:
        end = time.monotonic() + 15
        while "live: " not in out.getvalue() and time.monotonic() < end:
            time.sleep(0.05)
        server.run_stop(reporter()[0], name="sglang-1")

    report, out, err = reporter()
    thread = threading.Thread(target=stop)
    thread.start()
    data = serve(report, plan, ABOUT, Watch(timeout=20))
    thread.join(20)
    assert data["state"] == "stopped"
    assert "stopped by `fp8ctl stop`" in err.getvalue()


@pytest.mark.usefixtures("interrupts_count")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_whole_tree(number: signal.Signals) -> None:
    plan = plan_of("--child", "--deaf")
    before = signal.getsignal(number)

    def interrupt() -> None:
        end = time.monotonic() + 15
        while len(marked(plan.run_dir)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(AbortedError) as caught:
        serve(reporter()[0], plan, ABOUT, Watch(timeout=20))
    thread.join(20)
    assert caught.value.exit_code == 130
    assert not marked(registry.servers_dir())
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("interrupts_count")
def test_a_second_interrupt_does_not_cut_the_end_short() -> None:
    plan = plan_of("--child", "--deaf")

    def interrupt() -> None:
        end = time.monotonic() + 15
        while len(marked(plan.run_dir)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.15)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(AbortedError):
        serve(reporter()[0], plan, ABOUT, Watch(timeout=20))
    thread.join(20)
    assert not marked(registry.servers_dir())


@pytest.mark.usefixtures("interrupts_count")
@pytest.mark.parametrize("what", ["an interrupt", "an error"])
def test_an_interrupt_before_the_end_has_begun_does_not_cut_it_short(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = supervisor._end
    calls: list[object] = []

    def end(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        ends(*args)

    def fail(*_: object) -> None:
        if what == "an interrupt":
            signal.raise_signal(signal.SIGTERM)
        raise CheckFailedError("it is not what it should be")

    monkeypatch.setattr(supervisor, "_end", end)
    monkeypatch.setattr(supervisor, "_check", fail)
    with pytest.raises(AbortedError if what == "an interrupt" else CheckFailedError):
        serve(reporter()[0], plan_of(), ABOUT, replace(DETACH, check="live"))
    assert not marked(registry.servers_dir())


@pytest.mark.usefixtures("interrupts_count")
def test_an_interrupt_behind_the_start_finds_what_was_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only = registry.one_launch_at_a_time

    @contextlib.contextmanager
    def interrupted() -> Iterator[None]:
        with only():
            yield
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(registry, "one_launch_at_a_time", interrupted)
    with pytest.raises(AbortedError, match="sglang-1 was stopped"):
        serve(reporter()[0], plan_of(), ABOUT, DETACH)
    assert not marked(registry.servers_dir())


def test_a_flood_of_log_does_not_hold_up_the_start() -> None:
    report, _, err = reporter()
    plan = plan_of("--flood", "20")
    begun = time.monotonic()
    data = serve(report, plan, ABOUT, DETACH)
    assert data["state"] == "ready"
    assert time.monotonic() - begun < 15
    assert len(err.getvalue()) < 10_000, "the flood reached the terminal of a detached launch"


def test_an_interpreter_that_cannot_be_run_leaves_no_folder() -> None:
    plan = replace(plan_of(), argv=("/no/such/python", "-m", "x"))
    with pytest.raises(EngineFailedError, match="cannot run /no/such/python"):
        serve(reporter()[0], plan, ABOUT, DETACH)
    assert list(registry.servers_dir().iterdir()) == []


def test_the_printed_line_gives_a_shell_the_same_words_and_variables() -> None:
    plan = replace(plan_of("--quantization", "fp8"), env=(("A_JSON", '{"a": [1, "b c"]}'),))
    tell = 'import os, sys, json; print(json.dumps([os.environ["A_JSON"], sys.argv[1:]]))'
    plan = replace(plan, argv=(sys.executable, "-c", tell, *plan.argv[2:]))
    done = subprocess.run(
        ["sh", "-c", plan.command_line()], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ['{"a": [1, "b c"]}', list(plan.argv[3:])]
