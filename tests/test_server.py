"""Registry, processes, ps, logs and stop, against a stand-in that misbehaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8ctl import gate, process, registry, server
from fp8ctl.errors import BusyError, NotFoundError, UsageError
from fp8ctl.logtail import Tail, last_lines
from fp8ctl.process import Identity, free_port, identify, members, refuse_taken_port
from fp8ctl.registry import Record
from tests.reporting import reporter
from tests.starts import fake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Start = Callable[..., Record]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_ALL", 0.3)
    monkeypatch.setattr(process.stop_tree, "__kwdefaults__", {"grace": 0.6})
    monkeypatch.setenv("FP8CTL_TESTER", str(os.getpid()))


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a stand-in as `launch` would; whatever a test leaves is ended and must be gone."""
    started: list[Record] = []

    def begin(*arguments: str, name: str | None = None, wait: bool = True) -> Record:
        port = free_port("127.0.0.1")
        folder = registry.claim(name or registry.free_name("sglang", port))
        plan = fake(folder, port, *arguments)
        child = process.spawn(plan, folder / "server.log", os.environ)
        identity = identify(child.pid)
        assert identity is not None
        record = Record(
            name=folder.name,
            identity=identity,
            engine="fake 0",
            url=plan.url,
            model="tiny",
            source="/models/tiny",
            mode="block",
            await_push=False,
            python=sys.executable,
            site_packages="/nowhere",
            since=time.time(),
        )
        registry.write(record)
        started.append(record)
        if wait:
            until(lambda: gate.ask(plan.url).state != "starting")
        return record

    yield begin
    for record in started:
        server.stop(record)
        assert not marked(registry.folder(record.name))


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def marked(folder: Path) -> list[int]:
    """Return who carries a run folder in its environment; read here, not through fp8ctl."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"FP8CTL_RUN_DIR={folder}".encode() in environment:
                found.append(int(entry.name))
    return found


def test_ps_lists_a_running_server_and_its_state(start: Start) -> None:
    record = start("--state", "unpushed")
    report, out, _ = reporter()
    data = server.run_ps(report)
    assert data["servers"] == [
        {
            "name": record.name,
            "pid": record.identity.pid,
            "engine": "fake 0",
            "url": record.url,
            "state": "unpushed",
            "mode": "block",
            "model": "tiny",
            "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.since)),
        }
    ]
    assert record.name in out.getvalue()
    assert data["cleaned"] == []


def test_ps_tells_a_server_that_was_ready_and_answers_no_more(start: Start) -> None:
    record = start()
    os.kill(record.identity.pid, signal.SIGSTOP)
    try:
        registry.mark_ready(record)
        (_, state), *_ = server.running()[0]
    finally:
        os.kill(record.identity.pid, signal.SIGCONT)
    assert state == "silent"


def test_ps_does_not_take_another_servers_answer_for_its_own(start: Start) -> None:
    loading = start("--delay", "60", wait=False)
    other = start()
    mixed = replace(loading, url=other.url)
    registry.write(mixed)
    assert dict(server.running()[0]) == {mixed: "starting", other: "ready"}
    registry.mark_ready(mixed)
    assert dict(server.running()[0])[mixed] == "silent"


def test_ps_does_not_take_another_servers_lock_for_its_own(start: Start) -> None:
    loading = start("--delay", "60", wait=False)
    other = start("--key", "NO_SUCH_VARIABLE")
    mixed = replace(loading, url=other.url)
    registry.write(mixed)
    assert dict(server.running()[0]) == {mixed: "starting", other: "locked"}


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("::", "127.0.0.1", True),
        ("", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::1", False),
    ],
)
def test_which_addresses_share_a_port(one: str, other: str, both: bool) -> None:
    assert process.overlap(one, other) is process.overlap(other, one) is both


def test_ps_cleans_the_entry_of_a_dead_server_and_keeps_its_log(start: Start) -> None:
    record = start("--crash", "boom", wait=False)
    until(lambda: not record.identity.alive())
    report, _, err = reporter()
    assert server.run_ps(report)["cleaned"] == [record.name]
    assert not registry.folder(record.name).exists()
    assert f"fp8ctl logs {record.name}" in err.getvalue()
    report, out, _ = reporter()
    server.run_logs(report, name=record.name)
    assert "boom" in out.getvalue()
    # Cleaned once and for all.
    assert server.run_ps(reporter()[0])["cleaned"] == []


def test_ps_with_nothing_running_is_no_error() -> None:
    report, out, err = reporter()
    assert server.run_ps(report) == {"servers": [], "cleaned": []}
    assert out.getvalue() == ""
    assert "no server is running" in err.getvalue()


def test_stop_ends_a_server_that_ignores_sigterm(start: Start) -> None:
    record = start("--deaf")
    assert server.stop(record) == 1
    assert not record.identity.alive()
    assert not Path(f"/proc/{record.identity.pid}").exists(), "a zombie is left"


def test_stop_finds_a_child_that_left_session_group_and_parent(start: Start) -> None:
    record = start("--child")
    folder = registry.folder(record.name)
    until(lambda: len(marked(folder)) == 2)
    [escaped] = set(marked(folder)) - {record.identity.pid}
    assert os.getsid(escaped) == escaped != os.getsid(record.identity.pid)
    report, _, _ = reporter()
    data = server.run_stop(report, name=record.name)
    assert data == {"stopped": [{"name": record.name, "processes": 2}]}
    until(lambda: not Path(f"/proc/{escaped}").exists())


def test_a_server_without_its_first_process_is_orphaned_and_can_be_stopped(start: Start) -> None:
    record = start("--child")
    folder = registry.folder(record.name)
    until(lambda: len(marked(folder)) == 2)
    os.kill(record.identity.pid, signal.SIGKILL)
    until(lambda: not record.identity.alive())
    [(listed, state)], cleaned = server.running()
    assert (listed, state, cleaned) == (record, "orphaned", ())
    assert server.stop(record) == 1
    assert not marked(folder)


def test_stop_spares_a_process_that_has_the_pid_by_now(start: Start) -> None:
    record = start()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        mine = identify(bystander.pid)
        assert mine is not None
        stale = replace(mine, start_ticks=mine.start_ticks - 1)
        other_boot = replace(mine, boot_id="0" * 36)
        # Positive control: the true identity is alive.
        assert mine.alive()
        assert not stale.alive()
        assert not other_boot.alive()
        for identity in (stale, other_boot):
            stranger = replace(record, name="sglang-1", identity=identity)
            registry.claim("sglang-1")
            registry.write(stranger)
            assert server.stop(stranger) == 0
        assert mine.alive()
        bystander.kill()


def test_stop_spares_the_process_that_calls_it(start: Start) -> None:
    record = start()
    assert os.getpid() not in {one.pid for one in members(record.identity, Path("/nowhere"))}
    mine = identify(os.getpid())
    assert members(mine, Path("/nowhere")).isdisjoint({mine})


def test_stop_of_a_server_that_has_ended_is_done_already(start: Start) -> None:
    record = start("--crash", "boom", wait=False)
    until(lambda: not record.identity.alive())
    report, _, err = reporter()
    assert server.run_stop(report, name=record.name) == {
        "stopped": [{"name": record.name, "processes": 0}]
    }
    assert "had ended already" in err.getvalue()


def test_stop_all_stops_every_server(start: Start) -> None:
    records = [start(), start("--deaf")]
    data = server.run_stop(reporter()[0], everything=True)
    assert data["stopped"] == [
        {"name": one.name, "processes": 1} for one in sorted_by_name(records)
    ]
    assert not any(one.identity.alive() for one in records)


def sorted_by_name(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.name)


def test_stop_all_with_nothing_running_is_no_error() -> None:
    assert server.run_stop(reporter()[0], everything=True) == {"stopped": []}


def test_stop_of_an_unknown_name_is_not_found(start: Start) -> None:
    record = start()
    with pytest.raises(NotFoundError, match=f"'sglang-x'; there is {record.name}") as caught:
        server.run_stop(reporter()[0], name="sglang-x")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["../etc", "/tmp", "", "a/b", "..", ".hidden"])
def test_a_name_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not the name of a server"):
        server.run_stop(reporter()[0], name=name)
    with pytest.raises(UsageError):
        server.run_logs(reporter()[0], name=name)


@pytest.mark.parametrize(("name", "everything"), [(None, False), ("sglang-1", True)])
def test_stop_wants_a_name_or_all(name: str | None, everything: bool) -> None:
    with pytest.raises(UsageError):
        server.run_stop(reporter()[0], name=name, everything=everything)


def test_logs_of_a_rank_and_of_one_that_is_not_there(start: Start) -> None:
    record = start()
    folder = registry.folder(record.name)
    (folder / "rank-0.log").write_text("zero\n")
    (folder / "rank-1.log").write_text("one\ntwo")
    report, out, _ = reporter()
    server.run_logs(report, name=record.name, rank=1)
    assert out.getvalue() == "one\ntwo\n"
    with pytest.raises(NotFoundError, match="no log of rank 7; there is rank 0, 1"):
        server.run_logs(reporter()[0], name=record.name, rank=7)


def test_logs_as_json_is_data_and_cannot_follow(start: Start) -> None:
    record = start()
    report, out, _ = reporter(json_mode=True)
    data = server.run_logs(report, name=record.name)
    assert data["text"] == "loading\nlistening\n"
    assert out.getvalue() == ""
    with pytest.raises(UsageError, match="one document"):
        server.run_logs(report, name=record.name, follow=True)


def test_logs_follow_until_the_server_ends(start: Start) -> None:
    record = start("--die-after", "0.6")
    report, out, _ = reporter()
    begun = time.monotonic()
    server.run_logs(report, name=record.name, follow=True)
    assert time.monotonic() - begun < 10
    assert "listening" in out.getvalue()
    assert "out of memory" in out.getvalue(), "what it wrote last is missing"


def test_the_log_of_a_flood_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_bytes(b"x" * (1 << 20) + b"\n" + b"line\r\n" * 3 + b"half")
    with Tail(path) as tail:
        read: list[str] = []
        while lines := tail.lines():
            read += lines
        assert read[-3:] == ["line"] * 3
        assert sum(map(len, read)) == (1 << 20) + 12
        assert max(map(len, read)) <= 1 << 18, "a line without an end was kept whole"
        with path.open("ab") as file:
            file.write(b" and half\n")
        assert tail.lines() == ["half and half"]
        assert tail.lines() == []
    assert last_lines(path, 2) == ("line", "half and half")
    assert last_lines(tmp_path / "none.log", 2) == ()


def test_a_log_that_is_no_text_is_shown_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_bytes(b"\xff\xfe ok\n")
    with Tail(path) as tail:
        assert tail.lines() == ["�� ok"]


def test_the_folders_of_servers_are_private(start: Start, isolated_home: Path) -> None:
    record = start()
    folder = registry.folder(record.name)
    for path in (isolated_home / "state", folder.parent, folder, folder / "reports"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (folder / "server.log").stat().st_mode & 0o077 == 0


def test_names_are_unique_and_the_folder_is_claimed_once() -> None:
    assert registry.free_name("sglang", 30000) == "sglang-30000"
    registry.claim("sglang-30000")
    assert registry.free_name("sglang", 30000) == "sglang-30000-2"
    with pytest.raises(BusyError):
        registry.claim("sglang-30000")


def test_a_launch_that_is_just_under_way_is_not_cleaned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.claim("sglang-30000")
    assert server.running() == ((), ())
    assert registry.folder("sglang-30000").exists()
    monkeypatch.setattr(registry, "_UNBORN", -1.0)
    server.running()
    assert not registry.folder("sglang-30000").exists()


def test_archiving_spares_a_new_server_of_the_same_name(start: Start) -> None:
    record = start(name="sglang-30000")
    old = replace(record, since=record.since - 10)
    registry.archive(old)
    assert registry.read("sglang-30000") == record


def test_only_so_many_folders_of_ended_servers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KEEP_ENDED", 2)
    for number in range(4):
        name = f"sglang-{number}"
        record = Record(
            name, Identity(0, 0, ""), "fake", "http://x", "m", "s", "block", False, "p", "s", 0.0
        )
        folder = registry.claim(name)
        registry.write(record)
        os.utime(folder, (number, number))
        registry.archive(record)
        os.utime(registry.ended_dir() / name, (number, number))
    assert sorted(p.name for p in registry.ended_dir().iterdir()) in (
        ["sglang-2", "sglang-3"],
        ["sglang-1", "sglang-3"],
    )


def test_a_record_that_is_damaged_is_as_good_as_none() -> None:
    folder = registry.claim("sglang-1")
    for text in ("", "{", "[]", "{}", '{"identity": {"pid": 1}}', '{"identity": 3}'):
        (folder / "server.json").write_text(text)
        assert registry.read("sglang-1") is None
    with pytest.raises(NotFoundError):
        server.run_stop(reporter()[0], name="sglang-1")


def test_a_taken_port_is_busy_and_its_holder_is_named(start: Start) -> None:
    record = start()
    port = int(record.url.rsplit(":", 1)[1])
    with pytest.raises(BusyError, match=f"port {port} on 127.0.0.1 is taken by pid") as caught:
        refuse_taken_port("127.0.0.1", port)
    assert str(record.identity.pid) in caught.value.message
    assert caught.value.exit_code == 7
    refuse_taken_port("127.0.0.1", free_port("127.0.0.1"))


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_a_host_that_is_not_of_this_machine_is_a_usage_error(host: str) -> None:
    with pytest.raises(UsageError, match=host):
        refuse_taken_port(host, 30000)


def test_secrets_reach_the_server_and_no_file(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8CTL_API_KEY", "s3cret-key")
    port = free_port("127.0.0.1")
    folder = registry.claim("vllm-1")
    plan = replace(
        fake(folder, port, "--key", "VLLM_API_KEY"),
        env_from=(("VLLM_API_KEY", "FP8CTL_API_KEY"),),
    )
    child = process.spawn(plan, folder / "server.log", os.environ)
    try:
        until(lambda: gate.ask(plan.url, "s3cret-key").state == "ready")
        # Without it the state is not told, rather than told wrong.
        assert gate.ask(plan.url).state == "locked"
        import httpx

        wanted = {"Authorization": "Bearer s3cret-key"}
        url = f"{plan.url}/v1/models"
        assert httpx.get(url, trust_env=False).status_code == 401
        assert httpx.get(url, trust_env=False, headers=wanted).status_code == 200
    finally:
        process.stop_tree(identify(child.pid), folder)
    assert b"s3cret" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert "s3cret" not in plan.command_line()


def test_a_silent_port_is_a_starting_server() -> None:
    answer = gate.ask(f"http://127.0.0.1:{free_port('127.0.0.1')}")
    assert answer.state == "starting"
    assert "refused" in answer.message.lower()


def test_a_hung_server_does_not_hang_the_question(start: Start) -> None:
    record = start()
    os.kill(record.identity.pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        answer = gate.ask(record.url, timeout=0.3)
        assert time.monotonic() - begun < 3
    finally:
        os.kill(record.identity.pid, signal.SIGCONT)
    assert answer.state == "starting"


def test_two_stops_at_once_both_return(start: Start) -> None:
    record = start("--deaf")
    threads = [threading.Thread(target=server.stop, args=(record,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not record.identity.alive()
