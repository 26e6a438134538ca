"""NCCL: what is compared before a group is made, anywhere; the group itself, on two GPUs.

python -m pytest -m gpu tests/carriers
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.carriers import ends, nccl, peer
from fp8ctl.carriers.group import GroupSender
from fp8ctl.errors import CarrierError, ConflictError
from tests.carriers.processes import alive
from tests.carriers.test_cuda import fill

if TYPE_CHECKING:
    from tests.carriers.processes import Pool, Process

NBYTES = 50_000_011
OURS = {"nccl": 22605, nccl.CUMEM: "0", "device": "aa"}
THEIRS = {**OURS, "device": "bb"}

on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


def test_ranks_that_are_alike_pass() -> None:
    nccl.refuse_unlike(OURS, THEIRS, "rank 0 of server 0")


def test_another_nccl_is_refused_and_named() -> None:
    with pytest.raises(CarrierError, match="rank 1 of server 0 has NCCL 22907, the trainer 22605"):
        nccl.refuse_unlike(OURS, {**THEIRS, "nccl": 22907}, "rank 1 of server 0")


def test_a_rank_on_the_trainers_own_gpu_is_refused() -> None:
    with pytest.raises(CarrierError, match="is on the trainer's GPU aa") as e:
        nccl.refuse_unlike(OURS, OURS, "rank 0 of server 0")
    assert e.value.hint == 'via="ipc"'


@pytest.mark.parametrize(("ours", "theirs", "hint"), [("", "0", "=0 "), ("0", "1", "=1 ")])
def test_ranks_that_would_share_memory_otherwise_are_refused(
    ours: str, theirs: str, hint: str
) -> None:
    trainer = {**OURS, nccl.CUMEM: ours}
    with pytest.raises(CarrierError, match=f"has {nccl.CUMEM}='{theirs}'") as e:
        nccl.refuse_unlike(trainer, {**THEIRS, nccl.CUMEM: theirs}, "rank 0 of server 0")
    assert f"{nccl.CUMEM}{hint}" in str(e.value.hint)


def test_the_configuration_is_that_of_nccl_2_14() -> None:
    """Later releases read as many bytes as `size` says."""
    assert ctypes.sizeof(nccl._Config) == 24
    assert (nccl._Config.magic.offset, nccl._Config.blocking.offset) == (8, 16)
    assert ctypes.sizeof(nccl._UniqueId) == 128


def test_a_process_without_nccl_says_so() -> None:
    try:
        ctypes.CDLL(nccl.LIBRARY)
    except OSError:
        with pytest.raises(CarrierError, match="no NCCL in this process"):
            nccl.about(torch.device("cuda:0"))
    else:
        pytest.skip("this process has NCCL")


class Library:
    """NCCL's calls, with the states that a communicator is in when it is asked."""

    def __init__(self, *states: int) -> None:
        self.states = [*states]

    def ncclBroadcast(self, *_: object) -> int:
        return 7

    def ncclCommGetAsyncError(self, _: object, state: Any) -> int:
        state._obj.value = self.states.pop(0)
        return 0

    def ncclGetErrorString(self, code: int) -> bytes:
        return f"error {code}".encode()

    def ncclCommAbort(self, _: object) -> None:
        pass


class Event:
    """An event that the device has reached, or not yet."""

    def __init__(self) -> None:
        self.reached = False

    def record(self, _: object) -> None:
        pass

    def query(self) -> bool:
        return self.reached


def launched(library: Library, monkeypatch: pytest.MonkeyPatch) -> tuple[Event, Any]:
    """Launch a broadcast over a library; return its event, and what says whether it is over."""
    event = Event()
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    one: Any = object.__new__(nccl.Nccl)
    one._library, one._device, one._communicator = library, None, None
    one._stream = SimpleNamespace(cuda_stream=0)
    found = one.broadcast(torch.zeros(4), None, time.monotonic() + 5, lambda: None)
    assert found.done is event
    return event, found.over


def test_a_broadcast_is_over_when_the_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(7, 7, 0, 0, 0)  # it is launched in the background
    event, over = launched(library, monkeypatch)
    assert library.states == [0, 0]
    assert not over()
    event.reached = True
    assert over()


def test_nccls_own_error_is_heard_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device may never say anything again."""
    _, over = launched(Library(0, 0, 6), monkeypatch)
    assert not over()
    with pytest.raises(ConflictError, match="until the broadcast has ended: error 6"):
        over()


# --- on two GPUs ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it in a group of two, which would do without."""
    monkeypatch.setenv(peer.NCCL_ONLY, "1")


def start(timeout: float = 120.0) -> ends.Sender:
    return ends.sender("group", NBYTES, device="cuda:0", ranks=[1], timeout=timeout)


def come(sender: ends.Sender, process: Process) -> None:
    process.say(join=sender.offer(), rank=0, device="cuda:1")
    sender.join()
    assert process.answer(120) == {"ok": "joined"}


def closes(sender: ends.Sender) -> None:
    """Close it, and see that its device goes on."""
    sender.close()
    assert float(torch.ones(10, device="cuda:0").sum()) == 10.0


def given(sender: ends.Sender, slot: int, nbytes: int) -> None:
    sent = sender.send(slot, nbytes)
    assert sent is not None
    sent.arrived.result(120)


def brought(
    sender: ends.Sender, process: Process, slot: int, nbytes: int, seed: int, *, early: bool = False
) -> None:
    """Bring a bucket that the rank has asked for before it is given, and see that it is whole."""
    wanted = fill(sender, slot, nbytes, seed=seed)
    process.say(bucket=[slot, nbytes], early=early)
    given(sender, slot, nbytes)
    assert process.answer() == {"ok": wanted}


@pytest.mark.gpu
@on_two
@pytest.mark.parametrize("early", [False, True], ids=["here", "on its way"])
def test_buckets_that_are_given_at_once_arrive_in_order(early: bool, pool: Pool) -> None:
    """Two are launched when the first is under way; what fills slots has the device's rest."""
    [process] = pool.take(1)
    sender = start()
    come(sender, process)
    assert isinstance(sender, GroupSender)
    assert isinstance(sender._backend, nccl.Nccl)
    assert sender._backend._stream.priority < 0
    assert sender.slots == ends.GROUP_SLOTS, "two GPUs with room for 200 MB"
    for _ in range(5):
        wanted = [fill(sender, slot, NBYTES - slot, seed=slot) for slot in range(3)]
        sent = [sender.send(slot, NBYTES - slot) for slot in range(3)]
        found = [process.ok(bucket=[slot, NBYTES - slot], early=early) for slot in range(3)]
        assert found == wanted
        process.ok(arrived=True)
        assert [one.arrived.result(120) for one in sent if one is not None] == [None] * 3
    process.ok(close=True)
    sender.close()


@pytest.mark.gpu
@on_two
def test_a_device_that_waits_for_what_is_withdrawn_goes_on(pool: Pool) -> None:
    """The rank's broadcast waits for the trainer's, and what reads the bucket for that."""
    [process] = pool.take(1)
    sender = start()
    come(sender, process)
    torch.cuda._sleep(3_000_000_000)  # type: ignore[no-untyped-call]
    sender.buffer(0).fill_(1)
    sender.ready(0)
    sender.send(0, NBYTES)
    process.say(bucket=[0, NBYTES], early=True)
    time.sleep(0.3)
    sender.cancel("it was withdrawn")
    assert "ok" in process.answer(), "whatever lay there: nobody may count it"
    answer = process.ask(arrived=True)
    assert (answer["error"], "it was withdrawn" in answer["message"]) == ("ConflictError", True)
    process.ok(close=True)
    closes(sender)
    sender = start()
    come(sender, process)
    brought(sender, process, 0, NBYTES, seed=1, early=True)
    process.ok(close=True)
    sender.close()


@pytest.mark.gpu
@on_two
def test_a_rank_killed_with_two_in_flight_is_named(pool: Pool) -> None:
    [process] = pool.take(1)
    sender = start()
    come(sender, process)
    process.signal(signal.SIGSTOP)
    sent = [sender.send(slot, NBYTES) for slot in range(2)]
    time.sleep(0.5)
    process.kill()
    for one in sent:
        assert one is not None
        with pytest.raises(ConflictError, match=rf"process {process.pid} on .* is gone"):
            one.arrived.result(30)
    assert not alive(sender)
    closes(sender)


@pytest.mark.gpu
@on_two
def test_a_rank_on_another_gpu_gets_every_bucket(pool: Pool) -> None:
    [process] = pool.take(1)
    for _ in range(2):  # the second group is made as the first was
        sender = start()
        come(sender, process)
        for bucket in range(6):
            slot, nbytes = bucket % 2, NBYTES - bucket * 1000
            brought(sender, process, slot, nbytes, seed=bucket)
        process.ok(close=True)
        sender.close()


@pytest.mark.gpu
@on_two
def test_a_rank_killed_between_buckets_is_named(pool: Pool) -> None:
    [process] = pool.take(1)
    sender = start()
    come(sender, process)
    process.kill()
    with pytest.raises(ConflictError, match=rf"process {process.pid} on .* is gone"):
        given(sender, 0, 100)
    assert not alive(sender)
    closes(sender)


@pytest.mark.gpu
@on_two
def test_a_rank_that_stops_within_a_broadcast_is_a_time_out(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its half of the broadcast never runs: ours is aborted, and the device goes on."""
    [process] = pool.take(1)
    sender = start(timeout=5.0)
    come(sender, process)
    real = nccl.Nccl.broadcast

    def alone(*args: Any) -> Any:
        process.signal(signal.SIGSTOP)
        return real(*args)

    monkeypatch.setattr(nccl.Nccl, "broadcast", alone)
    process.say(bucket=[0, NBYTES])
    began = time.monotonic()
    with pytest.raises((TimeoutError, ConflictError), match=f"process {process.pid} "):
        given(sender, 0, NBYTES)
    assert time.monotonic() - began < 30
    process.kill()
    closes(sender)


@pytest.mark.gpu
@on_two
def test_a_rank_killed_while_the_group_is_made_is_named(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL itself waits for it without end."""
    [process] = pool.take(1)
    sender = start(timeout=20.0)
    real = nccl.unique_id

    def named_too_late() -> bytes:
        process.kill()
        return real()

    monkeypatch.setattr(nccl, "unique_id", named_too_late)
    process.say(join=sender.offer(), rank=0, device="cuda:1")
    with pytest.raises((TimeoutError, ConflictError)):
        sender.join()
    assert not alive(sender)
    closes(sender)


@pytest.mark.gpu
@on_two
def test_nothing_is_left(pool: Pool) -> None:
    [process] = pool.take(1)
    for _ in range(2):
        sender = start()
        come(sender, process)
        process.ok(close=True)
        sender.close()
    threads = threading.active_count()
    memory = torch.cuda.memory_allocated("cuda:0")
    sender = start()
    come(sender, process)
    process.ok(close=True)
    sender.close()
    del sender
    assert threading.active_count() == threads
    assert torch.cuda.memory_allocated("cuda:0") == memory
