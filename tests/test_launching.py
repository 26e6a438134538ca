"""From options to a started server: refusals, readiness, death, Ctrl-C; and the diagnosis."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import environment, gate, interpreter, launching, process, registry, server, supervisor
from fp8ctl.check import levels, weights
from fp8ctl.diagnosis import likeliest
from fp8ctl.engines.base import LaunchPlan
from fp8ctl.errors import (
    AbortedError,
    BusyError,
    CheckFailedError,
    CheckpointError,
    ConflictError,
    EngineFailedError,
    NotFoundError,
    PlanDoesNotFitError,
    UsageError,
)
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.hardware import Gpu
from fp8ctl.manifest import dumps
from fp8ctl.patching import status
from fp8ctl.patching.names import RelPath, parse_relpath, parse_sha256, sha256_of
from fp8ctl.patching.status import FileStatus, PatchStatus, SeriesStatus
from fp8ctl.planning import make_plan
from fp8ctl.process import free_port
from fp8ctl.render import Reporter
from fp8ctl.supervisor import About, RunFiles, Watch, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAKE = Path(__file__).with_name("fake_engine.py")
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
    port = free_port("127.0.0.1")
    folder = registry.servers_dir() / name
    return LaunchPlan(
        backend="sglang",
        argv=(sys.executable, str(FAKE), "--port", str(port), *arguments),
        env=(("FP8CTL_RUN_DIR", str(folder)), ("PYTHONUNBUFFERED", "1")),
        env_from=(),
        host="127.0.0.1",
        port=port,
        run_dir=folder,
        model="tiny",
        await_push=await_push,
    )


def reporter() -> tuple[Reporter, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Reporter(out=out, err=err), out, err


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
        serve(report, plan_of("--delay", "60"), ABOUT, replace(DETACH, timeout=1.0))
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
    plan = plan_of("--die-after", "1.0")
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


# --- what `run` decides, without starting anything ---


def write_model(folder: Path, hidden: int = 128, dtype: str = "BF16", **config: object) -> Path:
    """Write a one-layer Llama of zeros: enough for everything that reads no values.

    `dtype` is that of the layer's Linears.
    """
    folder.mkdir(parents=True)
    base = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(base | config))
    layer = "model.layers.0."
    sizes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [64, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [64, hidden],
        layer + "input_layernorm.weight": [hidden],
        layer + "post_attention_layernorm.weight": [hidden],
        **{f"{layer}self_attn.{p}_proj.weight": [hidden, hidden] for p in "qkvo"},
        layer + "mlp.gate_proj.weight": [2 * hidden, hidden],
        layer + "mlp.up_proj.weight": [2 * hidden, hidden],
        layer + "mlp.down_proj.weight": [hidden, 2 * hidden],
    }
    header: dict[str, object] = {}
    offset = 0
    for name, shape in sizes.items():
        stored = dtype if "_proj." in name else "BF16"
        count = (1 if stored == "F8_E4M3" else 2) * math.prod(shape)
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    return folder


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make an environment that holds an engine by metadata; returns the options that name it.

    What is patched in it is told, since there are no files; what GPUs there are too.
    """

    def make(backend: str, *applied: str, gpu: tuple[int, int] | None = None) -> list[str]:
        version = "0.4.8" if backend == "sglang" else "0.9.1"
        site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
        info = site / f"{backend}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {backend}\nVersion: {version}\n"
        )
        (info / "RECORD").write_text("")
        (site / backend).mkdir()
        (site / backend / "__init__.py").write_text("")
        (tmp_path / "venv" / "bin").mkdir()
        (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
        patches = tuple(PatchStatus(one, one, "applied") for one in applied)
        state = SeriesStatus(backend, "series", version, (), patches, interrupted=False)
        monkeypatch.setattr(status, "inspect", lambda *_: state)
        gpus = () if gpu is None else (Gpu("Test GPU", gpu, 80 << 30),)
        find = environment.find

        def found(*arguments: Any) -> environment.Environment:
            return replace(find(*arguments), gpus=gpus)

        monkeypatch.setattr(environment, "find", found)
        return ["--backend", backend, "--site-packages", str(site)]

    return make


def dry_run(options: list[str], **more: Any) -> dict[str, Any]:
    """Run `launch --dry-run`; assert that it made nothing."""
    _, backend, _, site = options
    report, out, _ = reporter()
    data = launching.run(report, backend=backend, site_packages=Path(site), dry_run=True, **more)
    assert list(registry.servers_dir().iterdir()) == []
    launch = data["launch"]
    assert isinstance(launch, dict)
    assert launch["command_line"] in out.getvalue()
    return data


def flag(data: dict[str, Any], name: str) -> str:
    argv: list[str] = data["launch"]["argv"]
    return argv[argv.index(name) + 1]


def test_dry_run_shows_the_line_and_the_folder_and_makes_neither(
    engine: Callable[..., list[str]], tmp_path: Path, isolated_home: Path
) -> None:
    model = write_model(tmp_path / "tiny")
    data = dry_run(engine("sglang", "refit", "cpu-fp8"), model=str(model))
    served = Path(flag(data, "--model-path"))
    assert served == Path(data["served"])
    assert served.parent == isolated_home / "cache" / "quantized"
    assert not served.exists()
    assert data["weights"] == "checkpoint"
    assert flag(data, "--served-model-name") == "tiny"
    # The cached checkpoint carries its own configuration.
    assert "--quantization" not in data["launch"]["argv"]
    assert "--json-model-override-args" not in data["launch"]["argv"]
    assert data["launch"]["env"]["PYTHONPATH"].startswith(str(isolated_home / "cache" / "hook"))
    assert data["check_level"] == "live"


@pytest.mark.parametrize(
    ("options", "level", "said"),
    [
        ({"check": "weights"}, "weights", "ends with a check, --level weights\n"),
        ({"no_check": True}, None, "ends with no check\n"),
        ({"wait": False, "detach": True}, None, "ends with no check\n"),
        ({}, "live", ""),
    ],
)
def test_dry_run_shows_how_it_would_end(
    options: dict[str, Any],
    level: str | None,
    said: str,
    engine: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    site = Path(engine("sglang", "refit", "cpu-fp8")[-1])
    report, _, err = reporter()
    model = str(write_model(tmp_path / "tiny"))
    data = launching.run(
        report, backend="sglang", site_packages=site, dry_run=True, model=model, **options
    )
    assert data["check_level"] == level
    assert ("ends with" in err.getvalue(), said in err.getvalue()) == (bool(said), True)


def test_await_push_puts_the_plans_configuration_over_the_16_bit_folder(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny", hidden=192)
    data = dry_run(engine("sglang", "refit", "cpu-fp8"), model=str(model), await_push=True)
    assert data["weights"] == "override"
    assert flag(data, "--model-path") == str(model)
    assert flag(data, "--quantization") == "fp8"
    assert flag(data, "--load-format") == "auto"
    config = json.loads(flag(data, "--json-model-override-args"))["quantization_config"]
    # 192 does not divide by 128.
    assert config["weight_block_size"] == [64, 64]
    assert config["quant_method"] == "fp8"
    assert data["launch"]["env"]["FP8CTL_AWAIT_PUSH"] == "1"


def test_per_tensor_mode_has_no_blocks(engine: Callable[..., list[str]], tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("sglang", "refit", "cpu-fp8")
    data = dry_run(options, model=str(model), mode="per-tensor", await_push=True)
    config = json.loads(flag(data, "--json-model-override-args"))["quantization_config"]
    assert "weight_block_size" not in config


def test_online_mode_asks_for_fp8_and_nothing_else(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny")
    data = dry_run(engine("sglang", "cpu-fp8"), model=str(model), mode="online")
    assert (flag(data, "--model-path"), flag(data, "--quantization")) == (str(model), "fp8")
    assert "--json-model-override-args" not in data["launch"]["argv"]


def test_an_fp8_checkpoint_is_served_as_it_is(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = write_model(tmp_path / "tiny", quantization_config=config)
    options = engine("sglang", "refit", "cpu-fp8")
    data = dry_run(options, model=str(model))
    assert (data["weights"], data["plan"]) == ("checkpoint", None)
    assert flag(data, "--model-path") == str(model)
    with pytest.raises(ConflictError, match="FP8 checkpoint already, block"):
        dry_run(options, model=str(model), mode="per-tensor")
    with pytest.raises(ConflictError, match="FP8 checkpoint already, block"):
        dry_run(options, model=str(model), mode="online")


def test_a_checkpoint_of_another_method_is_not_called_fp8(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny", quantization_config={"quant_method": "awq"})
    with pytest.raises(ConflictError, match="quantised with 'awq'"):
        dry_run(engine("sglang", "refit", "cpu-fp8"), model=str(model))


def test_marlin_on_a_16_bit_model_is_refused_with_the_reason(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny")
    with pytest.raises(PlanDoesNotFitError, match=r"marlin loads .* is a 16-bit checkpoint"):
        dry_run(engine("sglang", gpu=(9, 0)), model=str(model), quantization="marlin")


def test_vllm_online_on_a_forced_tree_is_refused_with_the_revert_command(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("vllm", "force-fp8-serialized", "refit", gpu=(9, 0))
    with pytest.raises(ConflictError) as caught:
        dry_run(options, model=str(model), mode="online")
    assert caught.value.exit_code == 5
    assert "--backend vllm --patch force-fp8-serialized" in str(caught.value.hint)
    assert str(caught.value.hint).startswith("fp8ctl revert")
    assert dry_run(options, model=str(model))["weights"] == "checkpoint"


def test_an_editable_install_that_lacks_a_patch_is_told_why_it_gets_none(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("sglang")
    find = environment.find

    def editable(*arguments: Any) -> environment.Environment:
        found = find(*arguments)
        [one] = found.engines
        return replace(found, engines=(replace(one, kind="editable"),))

    with pytest.raises(ConflictError, match="patch cpu-fp8 of sglang is not applied"):
        dry_run(options, model=str(model))
    monkeypatch.setattr(environment, "find", editable)
    with pytest.raises(ConflictError, match="is an editable install") as caught:
        dry_run(options, model=str(model))
    assert "fp8ctl patch --backend" not in str(caught.value.hint), "which is refused there"
    # What its work tree has already is no one's to apply.
    patches = tuple(PatchStatus(one, one, "applied") for one in ("cpu-fp8", "refit"))
    state = SeriesStatus("sglang", "series", "0.4.8", (), patches, interrupted=False)
    monkeypatch.setattr(status, "inspect", lambda *_: state)
    dry_run(options, model=str(model))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_launch_leaves_the_hashes_of_the_patched_files_unless_they_are_a_work_trees(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, backend, _, site = engine("sglang")
    find = environment.find

    def of_kind(*arguments: Any) -> environment.Environment:
        found = find(*arguments)
        [one] = found.engines
        return replace(found, engines=(replace(one, kind=kind),))  # type: ignore[arg-type]

    sha, path = parse_sha256("a" * 64), parse_relpath("sglang/srt/utils.py")
    held = frozenset({"cpu-fp8"})
    file = FileStatus(path, "applied", sha, sha, held, sha, matches_record=False)
    gone = replace(file, path=parse_relpath("sglang/srt/new.py"), state="missing", sha=None)
    patches = tuple(PatchStatus(one, one, "applied") for one in ("cpu-fp8", "refit"))
    state = SeriesStatus("sglang", "series", "0.4.8", (file, gone), patches, interrupted=False)
    monkeypatch.setattr(environment, "find", of_kind)
    monkeypatch.setattr(status, "inspect", lambda *_: state)
    left: list[RunFiles] = []

    def serve(*given: Any) -> dict[str, object]:
        left.append(given[-1])
        return {}

    monkeypatch.setattr(supervisor, "serve", serve)
    launching.run(
        reporter()[0],
        backend=backend,
        site_packages=Path(site),
        model=str(write_model(tmp_path / "tiny")),
        mode="online",
        port=free_port("127.0.0.1"),
    )
    [files] = left
    if kind == "editable":
        assert files.code is None
        return
    assert json.loads(files.code or "") == {
        "schema": 1,
        "root": site,
        "series": "series",
        "patches": ["cpu-fp8", "refit"],
        "files": {path: sha, gone.path: None},
    }


def test_a_push_onto_an_fp8_checkpoint_is_refused_since_no_plan_counts_it(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = write_model(tmp_path / "tiny", quantization_config=config)
    options = engine("sglang", "refit", "cpu-fp8")
    with pytest.raises(ConflictError, match="--await-push starts from the 16-bit checkpoint") as e:
        dry_run(options, model=str(model), await_push=True)
    assert str(model) in e.value.message
    assert e.value.exit_code == 5
    dry_run(options, model=str(model))


@pytest.mark.parametrize(
    ("asked", "quantised", "proves"),
    [
        ({}, False, {"weights", "logprobs"}),
        ({"mode": "online"}, False, {"weights", "logprobs"}),
        ({"quantization": "fp8"}, False, {"weights", "logprobs"}),
        ({"torchao_config": "int8wo"}, False, {"logprobs"}),
        ({}, True, set()),
    ],
)
def test_a_check_that_would_prove_nothing_is_refused_before_anything_is_started(
    asked: dict[str, Any],
    quantised: bool,
    proves: set[str],
    engine: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    more: dict[str, Any] = {"quantization_config": config} if quantised else {}
    model = write_model(tmp_path / "tiny", **more)
    options = engine("sglang", "refit", "cpu-fp8", gpu=(9, 0))
    for level in ("live", "weights", "logprobs"):
        if level == "live" or level in proves:
            dry_run(options, model=str(model), check=level, **asked)
        else:
            with pytest.raises(UsageError, match=f"--check {level} compares with"):
                dry_run(options, model=str(model), check=level, **asked)


def test_a_dry_run_fetches_no_model(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    fetched: list[object] = []

    def worker(*given: object) -> dict[str, object]:
        fetched.append(given)
        return {"path": str(write_model(tmp_path / "fetched"))}

    monkeypatch.setattr(interpreter, "run_worker", worker)
    options = engine("sglang", "refit", "cpu-fp8")
    with pytest.raises(NotFoundError, match="owner/name is not in the local cache") as caught:
        dry_run(options, model="owner/name")
    assert caught.value.exit_code == 3
    assert fetched == []
    # Positive control: without --dry-run it would be fetched.
    assert interpreter.resolve_model(reporter()[0], "owner/name") == tmp_path / "fetched"
    assert len(fetched) == 1


def test_plan_and_launch_say_the_same_of_the_kernel_for_128(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny", hidden=256)
    options = engine("vllm", "refit", gpu=(9, 0))
    [problem] = make_plan(model, "vllm", Mode.BLOCK, 1, BlockSize(64, 64)).problems
    with pytest.raises(PlanDoesNotFitError, match="its kernel for 128x128 blocks") as caught:
        dry_run(options, model=str(model), block_size="64,64")
    assert "down_proj (256x512 per GPU)" in problem.message
    assert problem.message in caught.value.message
    assert caught.value.hint == "--block-size 128,128"
    # An FP8 checkpoint that somebody else made, seen as it lies on the disk.
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    fp8 = write_model(tmp_path / "fp8", hidden=256, dtype="F8_E4M3", quantization_config=config)
    with pytest.raises(PlanDoesNotFitError, match=r"would compute \w+_proj \("):
        dry_run(options, model=str(fp8))
    # Every module has a side that 128 does not divide: the kernel takes none, and both say so.
    narrow = write_model(tmp_path / "narrow", hidden=64)
    assert make_plan(narrow, "vllm", Mode.BLOCK, 1, BlockSize(64, 64)).fits
    dry_run(options, model=str(narrow), block_size="64,64")
    fp8 = write_model(tmp_path / "f8", hidden=64, dtype="F8_E4M3", quantization_config=config)
    dry_run(options, model=str(fp8))


def test_a_plan_that_was_written_is_followed(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny", hidden=256)
    options = engine("sglang", "refit", "cpu-fp8")
    plan = make_plan(model, "sglang", Mode.BLOCK, 1, BlockSize(64, 64), keep=["*.o_proj"])
    path = tmp_path / "plan.json"
    path.write_text(dumps(plan.to_json()))
    data = dry_run(options, plan_file=path)
    assert data["plan"]["digest"] == plan.digest
    # The same options typed out make another plan only in the GPU that they are for.
    typed = dry_run(options, model=str(model), block_size="64,64", keep=["*.o_proj"])
    assert typed["plan"]["keep"] == ["*.o_proj"]
    assert typed["plan"]["gpu"] is None
    for more in ({"tp": 2}, {"mode": "per-tensor"}, {"mode": "online"}, {"quantization": "fp8"}):
        with pytest.raises(UsageError, match="--plan"):
            dry_run(options, plan_file=path, **more)
    other = write_model(tmp_path / "other", hidden=64)
    with pytest.raises(CheckpointError, match="is not the model of"):
        dry_run(options, plan_file=path, model=str(other))


@pytest.mark.parametrize("more", [{"mode": "online"}, {"quantization": "fp8"}])
def test_rules_are_for_what_fp8ctl_plans(
    engine: Callable[..., list[str]], tmp_path: Path, more: dict[str, str]
) -> None:
    model = write_model(tmp_path / "tiny")
    with pytest.raises(UsageError, match="--keep is for a plan"):
        dry_run(engine("sglang", "refit", "cpu-fp8"), model=str(model), keep=["lm_head"], **more)


def test_vllm_compiles_apart_for_each_state_of_its_patches(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("vllm", "refit", gpu=(9, 0))
    roots: dict[object, set[str]] = {}
    # The same ids on other text, as a newer fp8ctl or another build has it, are another state.
    cases = [((), ""), (("refit",), "a"), (("refit",), "b"), (("refit", "unscaled-guard"), "a")]
    for applied, text in cases * 2:
        held = frozenset(applied)
        file = FileStatus(
            RelPath("vllm/x.py"), "applied", sha256_of(text.encode()), None, held, None, None
        )
        patches = tuple(PatchStatus(one, one, "applied") for one in applied)
        state = SeriesStatus("vllm", "series", "0.9.1", (file,), patches, interrupted=False)
        monkeypatch.setattr(status, "inspect", lambda *_, state=state: state)
        data = dry_run(options, model=str(model))
        roots.setdefault((applied, text), set()).add(data["launch"]["env"]["VLLM_CACHE_ROOT"])
    assert [len(found) for found in roots.values()] == [1] * len(cases)
    assert len(set().union(*roots.values())) == len(cases)


def test_a_half_patched_tree_is_refused(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("sglang", "refit", "cpu-fp8")
    torn = SeriesStatus("sglang", "series", "0.4.8", (), (), interrupted=True)
    monkeypatch.setattr(status, "inspect", lambda *_: torn)
    with pytest.raises(ConflictError, match="partly patched"):
        dry_run(options, model=str(model))


def test_a_tree_that_is_not_imported_is_refused(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("sglang", "refit", "cpu-fp8")
    find = environment.find

    def shadowed(*arguments: Any) -> environment.Environment:
        found = find(*arguments)
        [one] = found.engines
        return replace(found, engines=(replace(one, shadowed_by=Path("/elsewhere/sglang")),))

    monkeypatch.setattr(environment, "find", shadowed)
    with pytest.raises(ConflictError, match="imports /elsewhere/sglang"):
        dry_run(options, model=str(model))


def test_a_bare_folder_has_nothing_to_start(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = engine("sglang", "refit", "cpu-fp8")
    (tmp_path / "venv" / "bin" / "python").unlink()
    with pytest.raises(UsageError, match="no interpreter beside it"):
        dry_run(options, model=str(write_model(tmp_path / "tiny")))


def test_vllm_needs_a_model(engine: Callable[..., list[str]]) -> None:
    with pytest.raises(UsageError, match="--model is missing"):
        dry_run(engine("vllm", gpu=(9, 0)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "int4"}, "'int4' is not a mode; there is block, per-tensor, online"),
        ({"quantization": "fp8", "torchao_config": "int8wo"}, "exclude each other"),
        ({"quantization": "fp8", "mode": "per-tensor"}, "exclude each other"),
        ({"torchao_config": "int8wo", "block_size": "64,64"}, "--block-size is for"),
        ({"mode": "online", "block_size": "64,64"}, "--block-size is for"),
        ({"wait": False}, "--no-wait"),
        ({"check": "deep"}, "'deep' is not a level; there is live, weights and logprobs"),
        ({"check": "live", "no_check": True}, "--check live and --no-check exclude each other"),
        ({"check": "weights", "detach": True, "wait": False}, "--no-wait returns before"),
        ({"check": "logprobs", "await_push": True}, "with --await-push they come later"),
        ({"trace": "nonsense"}, "is not MODULE:FUNCTION"),
        ({"backend": "tgi"}, "vllm or sglang"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_looked_at(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        launching.run(reporter()[0], **{"backend": "sglang", "model": "/nowhere", **options})
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_gpu_counts_only_for_an_environment_with_a_cuda_torch() -> None:
    gpus = (Gpu("A", (9, 0), 1), Gpu("B", (8, 0), 1))
    found = environment.Environment(
        None, (3, 11), Path("/s"), "", (), {"torch": "2.7.1+cu126"}, writable=True, gpus=gpus
    )
    device = launching.device_of(found)
    # The weakest one decides.
    assert (device.kind, device.capability, device.count) == ("cuda", (8, 0), 2)
    assert launching.device_of(replace(found, packages={"torch": "2.7.1+cpu"})).kind == "cpu"
    assert launching.device_of(replace(found, gpus=())).kind == "cpu"


def test_launch_of_a_taken_port_fails_before_quantising(
    engine: Callable[..., list[str]], tmp_path: Path, isolated_home: Path
) -> None:
    import socket

    model = write_model(tmp_path / "tiny")
    _, backend, _, site = engine("sglang", "refit", "cpu-fp8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with pytest.raises(BusyError):
            launching.run(
                reporter()[0],
                backend=backend,
                site_packages=Path(site),
                model=str(model),
                port=listener.getsockname()[1],
            )
    assert not (isolated_home / "cache" / "quantized").exists()


def test_the_printed_line_gives_a_shell_the_same_words_and_variables() -> None:
    plan = replace(plan_of("--quantization", "fp8"), env=(("A_JSON", '{"a": [1, "b c"]}'),))
    tell = 'import os, sys, json; print(json.dumps([os.environ["A_JSON"], sys.argv[1:]]))'
    plan = replace(plan, argv=(sys.executable, "-c", tell, *plan.argv[2:]))
    done = subprocess.run(
        ["sh", "-c", plan.command_line()], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ['{"a": [1, "b c"]}', list(plan.argv[3:])]


# --- the likeliest cause, on lines of real logs ---

LOGS = {
    "unscaled": "RuntimeError: fp8ctl unscaled-guard: model.layers.0.mlp.experts.w13_weight_scale",
    "graph-capture": "RuntimeError: CUDA error: operation not permitted when stream is capturing",
    "block-size": "ValueError: Weight output_partition_size = 576 is not divisible by weight "
    "quantization block_n = 128.",
    "port-taken": "ERROR:    [Errno 98] error while attempting to bind on address "
    "('127.0.0.1', 30000): address already in use",
    "no-cuda": "AssertionError: Torch not compiled with CUDA enabled",
    "old-gpu": "AssertionError: fp8e4nv data type is not supported on CUDA arch < 89",
    "memory-gpu": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 "
    "has a total capacity of 79.10 GiB of which 1.19 GiB is free.",
    "memory-host": "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. "
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes.",
    "memory-pool": "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
    "shared-memory": "OSError: [Errno 28] No space left on device: '/dev/shm/psm_1234'",
    "argument": "launch_server.py: error: unrecognized arguments: --no-such-flag",
    "no-model-class": "ValueError: Model architectures ['FooForCausalLM'] are not supported for "
    "now. Supported architectures: dict_keys(['LlamaForCausalLM'])",
    "loader-lost": "AttributeError: 'Parameter' object has no attribute 'weight_loader'",
    "unpatched-cpu": "AttributeError: module 'torch._C._cpu' has no attribute "
    "'_is_amx_tile_supported'",
    "import": "ImportError: cannot import name 'default_cache_dir' from 'triton.runtime.cache'",
}


@pytest.mark.parametrize("cause", LOGS)
def test_the_likeliest_cause_of_a_real_line(cause: str) -> None:
    noise = [
        "[2025-06-25 12:00:00] server_args=ServerArgs(model_path='/m', quantization='fp8')",
        "Traceback (most recent call last):",
        '  File "/site-packages/sglang/srt/managers/scheduler.py", line 2506, in run',
    ]
    found = likeliest([*noise, LOGS[cause], "[2025-06-25 12:00:09] Killed"], 1)
    assert found.id == cause
    assert found.line == LOGS[cause]
    assert found.words
    assert found.hint


def test_a_log_without_a_known_line_says_so() -> None:
    assert likeliest([], 1).id == "unknown"
    assert likeliest(["all is well"], -9).id == "killed"
    # SGLang's server ends itself so when a scheduler has died, and the log says of what.
    log = ["KeyError: 'model.layers.0'", "Received sigquit from a child process. It usually means"]
    assert likeliest(log, -9).line == "KeyError: 'model.layers.0'"
    found = likeliest(["x", "KeyError: 'model.layers.0'", "[rank0] bye"], 1)
    assert (found.id, found.line) == ("unknown", "KeyError: 'model.layers.0'")


def test_a_healthy_log_names_no_cause() -> None:
    healthy = [
        "Cuda graph is disabled because of using torch native attention backend",
        "Failed to import deep_gemm, disable ENABLE_JIT_DEEPGEMM.",
        "mem_fraction_static=0.8, max_total_num_tokens=8192",
        "The server is fired up and ready to roll!",
    ]
    assert likeliest(healthy, 1).id == "unknown"
