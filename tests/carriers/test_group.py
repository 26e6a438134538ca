"""A group over gloo: one trainer, ranks of several servers, all real processes."""

from __future__ import annotations

import contextlib
import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from fp8ctl.carriers import ends, gloo, link
from fp8ctl.carriers.group import GroupSender
from fp8ctl.errors import CarrierError, ConflictError, UsageError
from fp8ctl.wire import WireError
from tests.carriers.freed import count_freed
from tests.carriers.processes import alive
from tests.carriers.rank import weighted
from tests.carriers.transport import becomes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.carriers.processes import Pool, Process

CPU = torch.device("cpu")
NBYTES = 300_007
PATIENCE = 60.0  # nobody is waited for so long: the machine may be busy
SHORT = 3.0  # who is gone, or does not come

pytestmark = pytest.mark.usefixtures("nothing_left")


def one_is_there(sender: ends.Sender) -> None:
    assert isinstance(sender, GroupSender)
    lines = sender._hub._lines
    becomes(lambda: len(lines), 1)


@contextlib.contextmanager
def group(*ranks: int, timeout: float = PATIENCE) -> Iterator[ends.Sender]:
    """Yield the trainer's end, closed afterwards."""
    sender = ends.sender("group", NBYTES, ranks=ranks, timeout=timeout)
    try:
        yield sender
    finally:
        sender.close()


def come(sender: ends.Sender, processes: list[Process], *ranks: int) -> None:
    """Let the processes join as all ranks of all servers, and the trainer with them."""
    left_over = iter(processes)
    for server, count in enumerate(ranks):
        for rank in range(count):
            next(left_over).say(join=sender.offer(server), rank=rank)
    sender.join()
    assert [process.answer() for process in processes] == [{"ok": "joined"}] * len(processes)


def give(sender: ends.Sender, slot: int, nbytes: int) -> Future[None]:
    """Have a bucket given; return what ends when the trainer may write the slot again."""
    sent = sender.send(slot, nbytes)
    assert sent is not None
    return sent.left


def given(sender: ends.Sender, slot: int, nbytes: int) -> None:
    """Have a bucket given, and wait until it is."""
    give(sender, slot, nbytes).result(PATIENCE)


def settled(process: Process, wanted: dict[str, int]) -> None:
    """Assert that a process holds no more than this, once its threads have ended."""
    end = time.monotonic() + 10
    while (found := process.ok(left=True)) != wanted and time.monotonic() < end:
        time.sleep(0.05)
    assert found == wanted


def fill(sender: ends.Sender, slot: int, nbytes: int, seed: int) -> int:
    generator = torch.Generator().manual_seed(seed)
    bucket = sender.buffer(slot)[:nbytes]
    bucket.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator))
    sender.ready(slot)
    return weighted(bucket)


def listening() -> set[str]:
    """Return the addresses at which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}


# --- what is carried ------------------------------------------------------------------------------


def test_all_ranks_of_two_servers_get_every_bucket(pool: Pool) -> None:
    processes = pool.take(3)
    held = [process.ok(left=True) for process in processes]
    with group(1, 2) as sender:
        come(sender, processes, 1, 2)
        for bucket in range(6):
            slot, nbytes = bucket % 2, NBYTES - bucket * 1000
            wanted = fill(sender, slot, nbytes, seed=bucket)
            for process in processes:
                process.say(bucket=[slot, nbytes])
            given(sender, slot, nbytes)
            assert [process.answer() for process in processes] == [{"ok": wanted}] * 3
        assert sender.alive
    for process, wanted_left in zip(processes, held, strict=True):
        process.ok(close=True)
        settled(process, wanted_left)
    assert not listening()


def test_ranks_take_what_they_have_room_for_before_they_are_asked(pool: Pool) -> None:
    processes = pool.take(1)
    with group(1) as sender:
        come(sender, processes, 1)
        wanted = [fill(sender, slot, NBYTES, seed=slot) for slot in range(2)]
        for slot in range(2):
            given(sender, slot, NBYTES)
        wanted.append(fill(sender, 0, NBYTES, seed=2))
        third = give(sender, 0, NBYTES)
        time.sleep(0.3)
        assert not third.done(), "the rank has read neither slot"
        assert processes[0].ok(bucket=[0, NBYTES], keep=True) == wanted[0]
        time.sleep(0.3)
        assert not third.done(), "it has, and may read it again"
        assert processes[0].ok(look=0) == wanted[0]
        assert processes[0].ok(bucket=[1, NBYTES]) == wanted[1]
        third.result(PATIENCE)
        assert processes[0].ok(bucket=[0, NBYTES]) == wanted[2]
        processes[0].ok(close=True)


def test_a_second_group_follows_the_first_at_once(pool: Pool) -> None:
    processes = pool.take(2)
    for seed in range(2):
        with group(2) as sender:
            come(sender, processes, 2)
            wanted = fill(sender, 1, 100, seed)
            for process in processes:
                process.say(bucket=[1, 100])
            given(sender, 1, 100)
            assert [process.answer() for process in processes] == [{"ok": wanted}] * 2
        for process in processes:
            process.ok(close=True)


# --- who does not come ----------------------------------------------------------------------------


def test_ranks_that_do_not_join_are_named(pool: Pool) -> None:
    [process] = pool.take(1)
    with group(1, 2, timeout=SHORT) as sender:
        process.say(join=sender.offer(1), rank=0)
        with pytest.raises(TimeoutError) as e:
            sender.join()
        assert "2 of 3 ranks" in str(e.value)
        assert "rank 0 of server 0, rank 1 of server 1" in str(e.value)
        assert not sender.alive
        # Who had come is told, too.
        answer = process.answer()
        assert (answer["error"], "did not come" in answer["message"]) == ("ConflictError", True)


def test_a_trainer_that_does_not_join_is_a_time_out(pool: Pool) -> None:
    [process] = pool.take(1)
    with group(1, timeout=SHORT) as sender:
        answer = process.ask(join={**sender.offer(), "timeout": 1.0}, rank=0)
    assert answer["error"] == "TimeoutError"
    assert "the trainer did not answer" in answer["message"]


def test_a_rank_that_dies_while_others_are_awaited_is_named_at_once(pool: Pool) -> None:
    first, second = pool.take(2)
    began = time.monotonic()
    with group(2) as sender, ThreadPoolExecutor(1) as threads:
        joining = threads.submit(sender.join)
        first.say(join=sender.offer(), rank=0)
        one_is_there(sender)
        first.kill()
        with pytest.raises(
            ConflictError, match=rf"rank 0 of server 0 .process {first.pid} .* gone"
        ):
            joining.result()
    assert time.monotonic() - began < PATIENCE / 2
    assert second.ok(left=True)


def test_a_rank_that_has_no_room_is_named(pool: Pool) -> None:
    first, second = processes = pool.take(2)
    with group(1, 1, timeout=SHORT) as sender:
        come(sender, processes, 1, 1)
        given(sender, 0, 100)
        first.ok(bucket=[0, 100])
        second.ok(bucket=[0, 100], keep=True)
        with pytest.raises(TimeoutError, match=rf"rank 0 of server 1 .process {second.pid} "):
            given(sender, 0, 100)
        assert not sender.alive
        answer = first.ask(bucket=[0, 100])
        assert answer["error"] == "ConflictError"
        assert "rank 0 of server 1" in answer["message"]
        assert second.ask(bucket=[0, 100])["error"] == "ConflictError"


def test_a_rank_killed_between_buckets_is_named_at_once(pool: Pool) -> None:
    first, second = processes = pool.take(2)
    with group(2) as sender:
        come(sender, processes, 2)
        second.kill()
        first.say(bucket=[0, 100])
        began = time.monotonic()
        with pytest.raises(ConflictError, match=rf"process {second.pid} on .* is gone"):
            given(sender, 0, 100)
        assert time.monotonic() - began < PATIENCE / 2
        assert first.answer()["error"] == "ConflictError"


def test_a_rank_that_stops_within_a_broadcast_is_named(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, not ended: no connection closes, only time tells."""
    processes = pool.take(2)
    second = processes[1]
    with group(2, timeout=SHORT) as sender:
        come(sender, processes, 2)
        real = gloo.Gloo.broadcast

        def stopped_first(*args: Any) -> Any:
            second.signal(signal.SIGSTOP)
            return real(*args)

        monkeypatch.setattr(gloo.Gloo, "broadcast", stopped_first)
        for process in processes:
            process.say(bucket=[0, NBYTES])
        # It may have all bytes in its socket's buffer: then it is the answer that is missing.
        sent = sender.send(0, NBYTES)
        assert sent is not None
        with pytest.raises((TimeoutError, ConflictError), match=f"process {second.pid} "):
            sent.arrived.result(PATIENCE)
        second.signal(signal.SIGCONT)
        for process in processes:
            process.answer()
            process.ok(close=True)


def test_a_trainer_that_is_killed_is_an_error_in_every_rank(pool: Pool) -> None:
    processes = pool.take(2)
    held = [process.ok(left=True) for process in processes]
    script = (
        "import json, os, sys, torch\n"
        "from fp8ctl.carriers import ends\n"
        "sender = ends.sender('group', 1000, ranks=[2], timeout=60)\n"
        "print(json.dumps(sender.offer()), flush=True)\n"
        "sender.join()\n"
        "sys.stdin.readline()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdin is not None
        offer = json.loads(trainer.stdout.readline())
        for rank, process in enumerate(processes):
            process.say(join=offer, rank=rank)
        assert [process.answer() for process in processes] == [{"ok": "joined"}] * 2
        for process in processes:
            process.say(bucket=[0, 1000])
        trainer.stdin.write(b"\n")
        trainer.stdin.close()
        for process in processes:
            answer = process.answer(PATIENCE / 2)
            assert answer["error"] == "ConflictError"
            assert answer["message"].startswith("the trainer is gone")
    for process, wanted in zip(processes, held, strict=True):
        process.ok(close=True)
        settled(process, wanted)


# --- who is not wanted ----------------------------------------------------------------------------


def test_a_stranger_is_refused_and_the_group_forms_without_it(pool: Pool) -> None:
    processes = pool.take(2)
    with group(1) as sender, ThreadPoolExecutor(1) as threads:
        joining = threads.submit(sender.join)
        offer = sender.offer()
        stranger = {**offer, "key": "00" * 32}
        answer = processes[0].ask(join=stranger, rank=0)
        assert answer["error"] == "ConflictError"
        assert "another group" in answer["message"]
        answer = processes[0].ask(join=offer, rank=5)
        assert "no rank 6 is expected" in answer["message"]
        with socket.create_connection((offer["host"], offer["port"])) as silent:
            with socket.create_connection((offer["host"], offer["port"])) as loud:
                loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
                processes[1].say(join=offer, rank=0)
                joining.result(PATIENCE)
                assert processes[1].answer() == {"ok": "joined"}
            assert silent.recv(1000)  # the question
            assert not silent.recv(1000)  # and the end
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((offer["host"], offer["port"]))
        processes[1].ok(close=True)


def test_a_rank_comes_once(pool: Pool) -> None:
    first, second = pool.take(2)
    with group(2) as sender, ThreadPoolExecutor(1) as threads:
        joining = threads.submit(sender.join)
        first.say(join=sender.offer(), rank=0)
        one_is_there(sender)
        answer = second.ask(join=sender.offer(), rank=0)
        assert "rank 0 of server 0 is there already" in answer["message"]
        second.say(join=sender.offer(), rank=1)
        joining.result(PATIENCE)
        assert [first.answer(), second.answer()] == [{"ok": "joined"}] * 2
        first.ok(close=True)
        second.ok(close=True)


def test_it_listens_on_the_address_that_was_given_alone(pool: Pool) -> None:
    """torch's own store listens on all of them."""
    processes = pool.take(1)
    with group(1) as sender:
        assert listening() == {"127.0.0.1"}
        come(sender, processes, 1)
        assert listening() == {"127.0.0.1"}
        processes[0].ok(close=True)


def test_a_rank_that_asks_for_another_bucket_is_named(pool: Pool) -> None:
    processes = pool.take(1)
    with group(1) as sender:
        come(sender, processes, 1)
        given(sender, 0, 100)
        answer = processes[0].ask(bucket=[1, 100])
        assert "asked for slot 1 with 100 bytes" in answer["message"]
        with pytest.raises(ConflictError, match=r"rank 0 of server 0 .* asked for slot 1"):
            given(sender, 1, 100)
        assert "has ended" in processes[0].ask(bucket=[1, 100])["message"]


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_what_waits_in_another_thread_is_ended(pool: Pool, end: str) -> None:
    processes = pool.take(2)
    with group(2) as sender, ThreadPoolExecutor(1) as threads:
        joining = threads.submit(sender.join)
        processes[0].say(join=sender.offer(), rank=0)
        one_is_there(sender)
        sender.cancel("server 1 said no") if end == "cancel" else sender.close()
        with pytest.raises(ConflictError, match=r"server 1 said no|has closed the group"):
            joining.result(10)
        assert processes[0].answer()["error"] == "ConflictError"


def test_a_group_that_is_being_made_is_given_up_at_once() -> None:
    """Gloo itself waits for a rank that does not come until its time is over."""
    with group(1, timeout=6.0) as sender, ThreadPoolExecutor(2) as threads:
        offer = sender.offer(0)
        deadline = time.monotonic() + PATIENCE
        joining = threads.submit(sender.join)
        about = {"slots": 2}
        rank = link.join(offer["host"], offer["port"], offer["key"], 1, about, deadline)
        with contextlib.closing(rank):
            assert "go" in link.agree(rank, deadline), "now the trainer makes it, and this does not"
            time.sleep(0.3)
            assert not joining.done()
            before = time.monotonic()
            sender.cancel("the update was cancelled")
            with pytest.raises(ConflictError, match="the update was cancelled"):
                joining.result(PATIENCE)
            assert time.monotonic() - before < 2.0


def test_a_send_that_waits_is_ended_and_the_ranks_hear_why(pool: Pool) -> None:
    processes = pool.take(2)
    with group(2) as sender:
        come(sender, processes, 2)
        given(sender, 0, 100)
        processes[0].ok(bucket=[0, 100])
        sending = give(sender, 0, 100)
        processes[0].say(bucket=[0, 100])
        time.sleep(0.3)
        assert not sending.done(), "the other rank has not read the slot"
        sender.cancel("server 0: q_proj.weight has the wrong shape")
        with pytest.raises(ConflictError, match=r"q_proj\.weight"):
            sending.result(10)
        assert "q_proj.weight" in processes[0].answer()["message"]
        with pytest.raises(ConflictError, match=r"has ended: server 0: q_proj\.weight"):
            given(sender, 0, 100)
        processes[1].ok(close=True)


@pytest.mark.parametrize("how", ["while it waits", "before it asks", "by another bucket"])
def test_a_group_that_failed_keeps_no_slot(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a GPU does not wait for Python to look for cycles: the next group needs it."""

    def ask(rank: ends.Receiver) -> None:
        with pytest.raises(ConflictError):
            rank.bucket(0, 100)
        rank.close()

    gc.collect()
    gc.disable()
    try:
        with group(1) as sender, ThreadPoolExecutor(1) as threads:
            freed = count_freed(monkeypatch)
            joining = threads.submit(sender.join)
            rank = ends.receive(sender.offer(), 0, CPU)
            joining.result(PATIENCE)
            if how == "while it waits":
                asking = threads.submit(ask, rank)
                time.sleep(0.2)
                sender.close()
                asking.result(PATIENCE)
                del asking
            elif how == "before it asks":
                sender.close()
                time.sleep(0.2)
                ask(rank)
            else:
                given(sender, 0, 99)
                ask(rank)
            del rank
        assert len(freed) == ends.GROUP_SLOTS
    finally:
        gc.enable()


def test_closing_before_anybody_came_leaves_nothing() -> None:
    with group(2) as sender:
        assert alive(sender)
        sender.close()
        assert not alive(sender)
        with pytest.raises(ConflictError, match="has closed the group"):
            sender.join()


def test_nobody_at_the_offers_address_is_said() -> None:
    with group(1) as sender:
        offer = sender.offer()
    with pytest.raises(CarrierError, match=r"no trainer at 127\.0\.0\.1:\d+: Connection refused"):
        ends.receive(offer, 0, CPU)


def test_an_address_of_another_host_is_refused_by_the_trainer() -> None:
    with pytest.raises(CarrierError, match=r"cannot listen on 192\.0\.2\.1"):
        ends.sender("group", 100, ranks=[1], host="192.0.2.1")


@pytest.mark.parametrize("ranks", [(), (0,), (1, -1)])
def test_a_group_without_ranks_is_refused(ranks: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        ends.sender("group", 100, ranks=ranks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "nccl"}, CarrierError, "speaks nccl, and this server's weights are on cpu"),
        ({"backend": "mpi"}, WireError, "backend 'mpi'"),
        ({"timeout": "1"}, WireError, "timeout is '1'"),
        ({"port": None}, WireError, "port is None"),
        ({"slots": [{"nbytes": 1 << 60}]}, CarrierError, "no 1 slots"),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with group(1) as sender, pytest.raises(error, match=message):
        ends.receive({**sender.offer(), **change}, 0, CPU)


def test_slots_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CarrierError, match="no 2 slots") as e:
        GroupSender(1 << 60, 2, CPU, [1], "127.0.0.1", 1.0)
    assert "bucket_bytes" in str(e.value.hint)


# --- lines ----------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[link.Line, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    line = link.Line(ours, "the other")
    yield line, theirs
    line.close()
    theirs.close()


def test_lines_come_whole_however_they_are_cut(pair: tuple[link.Line, socket.socket]) -> None:
    line, theirs = pair
    sent = b'{"a": 1}\n{"b": [2]}\n'
    for i in range(len(sent)):
        theirs.sendall(sent[i : i + 1])
        if sent[i : i + 1] != b"\n":
            assert line.heard() is None or i > sent.index(b"\n")
        elif i < len(sent) - 1:
            assert line.heard() == {"a": 1}
    assert line.hear(time.monotonic() + 1) == {"b": [2]}
    theirs.sendall(sent)
    assert [line.heard(), line.heard(), line.heard()] == [{"a": 1}, {"b": [2]}, None]


@pytest.mark.parametrize("said", [b"hello\n", b"[1]\n", b"\xff\n", b"x" * (link.LONGEST + 2)])
def test_what_is_no_message_is_an_error(pair: tuple[link.Line, socket.socket], said: bytes) -> None:
    line, theirs = pair
    theirs.setblocking(True)
    sending = threading.Thread(target=theirs.sendall, args=(said,))
    sending.start()
    with pytest.raises(ConflictError, match="no message"):
        line.hear(time.monotonic() + 5)
    line.close()
    theirs.close()
    sending.join()


def test_silence_is_a_time_out_and_an_end_is_not(pair: tuple[link.Line, socket.socket]) -> None:
    line, theirs = pair
    with pytest.raises(TimeoutError, match="the other did not answer"):
        line.hear(time.monotonic() + 0.05)
    theirs.close()
    with pytest.raises(ConflictError, match="the other is gone"):
        line.hear(time.monotonic() + 5)


@pytest.mark.parametrize("ends", ["shut", "closed", "here"])
def test_who_has_left_is_known_before_its_last_words_are_heard(
    pair: tuple[link.Line, socket.socket], ends: str
) -> None:
    line, other = pair
    seen = [line.gone]
    other.sendall(b'{"room": 1}\n')
    seen.append(line.gone)
    if ends == "shut":
        other.shutdown(socket.SHUT_RDWR)
    else:
        (other if ends == "closed" else line).close()
    assert [*seen, line.gone] == [False, False, True]
    if ends != "here":
        assert line.heard() == {"room": 1}


def test_only_the_key_answers_the_question() -> None:
    right = link.proof("ab" * 32, "q", 1)
    others = [("ac" * 32, "q", 1), ("ab" * 32, "r", 1), ("ab" * 32, "q", 2)]
    assert right not in {link.proof(*other) for other in others}
