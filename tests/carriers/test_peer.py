"""A rank that pulls: who may, anywhere; the group around it on GPUs that are played, and on two.

python -m pytest -m gpu tests/carriers
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.carriers import ends, exported, nccl, offers, peer
from fp8ctl.carriers import group as carriers_group
from fp8ctl.carriers.group import GroupReceiver, GroupSender
from fp8ctl.errors import CarrierError, ConflictError
from fp8ctl.wire import WireError
from tests.carriers import devices, processes
from tests.carriers.devices import FIRST, SECOND, UUIDS, Devices
from tests.carriers.processes import alive
from tests.carriers.test_cuda import fill, used
from tests.carriers.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.carriers.processes import Pool, Process

NBYTES = 1000
PATIENCE = 30.0
#: Seconds in which what must not happen would happen.
WHILE = 0.2
LENT = {"device": "aa", "boot_id": "here"}

on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


# --- who may --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boot_id", "visible", "own", "reaches", "why"),
    [
        ("here", ["aa", "bb"], 1, True, ""),
        ("here", ["bb", "aa"], 0, True, ""),
        ("here", ["bb"], 0, False, ""),  # the driver knows, when the handle is opened
        ("here", ["aa", "bb"], 1, False, "does not reach the memory"),
        ("here", ["aa", "bb"], 0, True, "on the trainer's own GPU"),
        ("there", ["aa", "bb"], 1, True, "on another host"),
        ("there", ["bb"], 0, True, "on another host"),
    ],
)
def test_a_rank_pulls_from_another_device_of_its_host_that_it_reaches(
    boot_id: str, visible: list[str], own: int, reaches: bool, why: str
) -> None:
    asked: list[int] = []

    def ask(index: int) -> bool:
        asked.append(index)
        return reaches

    found = peer.hindrance(LENT, boot_id, visible, own, ask)
    assert why in found
    assert bool(found) == bool(why)
    assert all(visible[index] == "aa" and index != own for index in asked)


@pytest.mark.parametrize("change", [{"device": 1}, {"boot_id": None}])
def test_what_is_lent_is_said_as_it_should_be(change: dict[str, object]) -> None:
    with pytest.raises(WireError):
        peer.hindrance({**LENT, **change}, "here", ["bb"], 0, lambda _: True)


# --- on GPUs that are played ----------------------------------------------------------------------


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Devices:
    return devices.play(monkeypatch)


@pytest.fixture
def by_nccl(played: Devices, monkeypatch: pytest.MonkeyPatch) -> Transport:
    """Have an NCCL in this process."""
    transport = Transport()
    transport.done.update({0: 99, 1: 99, 2: 99})

    def about(device: torch.device) -> dict[str, object]:
        return {"nccl": 22605, nccl.CUMEM: "0", "device": UUIDS[device.index]}

    monkeypatch.setattr(nccl, "about", about)
    monkeypatch.setattr(nccl, "unique_id", lambda: b"\x01" * 128)
    monkeypatch.setattr(nccl, "Nccl", transport.backend)
    return transport


@pytest.fixture
def without_nccl(played: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    def about(_: torch.device) -> dict[str, object]:
        raise CarrierError("no NCCL in this process")

    monkeypatch.setattr(nccl, "about", about)


def elsewhere(offer: dict[str, Any], **changes: object) -> dict[str, Any]:
    """Return an offer as it comes from another process."""
    if "peer" not in offer:
        return offer
    return {**offer, "peer": {**offer["peer"], "process": "other", **changes}}


@contextlib.contextmanager
def group(
    device: torch.device = SECOND, slots: int | None = None, **changes: object
) -> Iterator[tuple[GroupSender, ends.Receiver]]:
    """Yield both ends, closed afterwards, the trainer's last."""
    sender = ends.sender("group", NBYTES, device=FIRST, ranks=[1], timeout=PATIENCE, slots=slots)
    assert isinstance(sender, GroupSender)
    rank = None
    try:
        with ThreadPoolExecutor(2) as threads:
            joining = threads.submit(sender.join)
            coming = threads.submit(ends.receive, elsewhere(sender.offer(), **changes), 0, device)
            joining.result(PATIENCE)
            rank = coming.result(PATIENCE)
        yield sender, rank
    finally:
        if rank is not None:
            rank.close()
        sender.close()


def give(sender: ends.Sender, slot: int, seed: int) -> Any:
    sender.buffer(slot).fill_(seed)
    sender.ready(slot)
    return sender.send(slot, NBYTES)


@pytest.mark.usefixtures("nothing_left", "without_nccl")
def test_buckets_are_pulled_in_order_over_all_slots_and_nothing_is_left(played: Devices) -> None:
    """NCCL need not be there on either side."""
    with group() as (sender, rank):
        assert isinstance(sender._backend, peer.Lender)
        assert sender.carrier == ("copies", "")
        assert len(played.opened) == sender.slots == 3
        sent: list[Any] = []
        for number in range(12):
            if number >= 3:
                sent[number - 3].left.result(PATIENCE)
            sent.append(give(sender, number % 3, seed=number))
            if number:
                assert rank.bucket((number - 1) % 3, NBYTES).tolist() == [number - 1] * NBYTES
                rank.loaded()
        assert rank.bucket(2, NBYTES).tolist() == [11] * NBYTES
        sent[-1].arrived.result(PATIENCE)
        assert played.calls.count("copy") == 12
    gc.collect()
    assert not played.opened
    assert not played.memory


@pytest.mark.usefixtures("without_nccl")
def test_a_bucket_of_fewer_bytes_and_of_none_are_pulled_as_they_are(played: Devices) -> None:
    with group() as (sender, rank):
        sender.buffer(1).fill_(5)
        for slot, nbytes in ((1, 10), (0, 0)):
            sent: Any = sender.send(slot, nbytes)
            sent.arrived.result(PATIENCE)
            assert rank.bucket(slot, nbytes).tolist() == [5] * nbytes
        assert played.calls.count("copy") == 1
    assert not played.opened


@pytest.mark.usefixtures("without_nccl")
def test_a_copy_waits_for_who_reads_the_slot_and_the_trainers_slot_for_the_copy(
    played: Devices,
) -> None:
    with group() as (sender, rank):
        give(sender, 0, seed=1).left.result(PATIENCE)
        assert int(rank.bucket(0, NBYTES)[0]) == 1
        engine: list[bool] = []
        played.current.then(lambda: None, lambda: bool(engine))  # it still reads
        rank.loaded()
        sender._written[0] = None
        sender.buffer(0).fill_(2)
        sent = sender.send(0, NBYTES)
        time.sleep(WHILE)
        assert int(rank._slots[0][0]) == 1  # type: ignore[attr-defined]
        played.copies = False
        engine.append(True)
        time.sleep(WHILE)
        assert not sent.left.done()
        played.copies = True
        sent.left.result(PATIENCE)
        assert int(rank.bucket(0, NBYTES)[0]) == 2


def spoiled(name: str, played: Devices, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put something in the way of a rank that pulls; return how the offer changes by it."""
    if name in (peer.NCCL_ONLY, peer.NO_PEERS):
        monkeypatch.setenv(name, "1")
    elif name in ("allocate", "export", "open", "read"):
        played.refused.add(name)
    elif name == "no peers":
        played.peers = False
    elif name == "boot_id":
        monkeypatch.setattr(offers, "_BOOT_ID", Path("/nowhere/boot_id"))
    changes: dict[str, dict[str, Any]] = {
        "another host": {"boot_id": "there"},
        "another version": {"version": 2},
        "one process": {"process": exported.PROCESS},
    }
    return changes.get(name, {})


#: Why a trainer lends nothing, and what its user is told.
UNLENT = {
    peer.NCCL_ONLY: "FP8CTL_PUSH_NCCL=1 in the trainer's environment",
    peer.NO_PEERS: "NCCL_P2P_DISABLE=1 in the trainer's environment",
    "allocate": "cannot be lent: .*allocate: CUDA_ERROR",
    "export": "cannot be lent: .*export: CUDA_ERROR",
    "boot_id": "cannot be lent: .*boot_id",
}
#: Why a rank does not open what is lent.
UNOPENED = {
    "open": "cannot open the trainer's memory: open: CUDA_ERROR",
    "read": "cannot open the trainer's memory: read: CUDA_ERROR",
    "no peers": "does not reach the memory of the trainer's",
    "another host": "on another host",
    "another version": "cannot open the trainer's memory: .*version",
    "one process": "cannot open the trainer's memory: .*process",
    "nonce": "cannot open the trainer's memory: .*",
}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("why", [*UNLENT, *UNOPENED])
def test_what_stands_in_the_way_leaves_it_to_nccl_and_is_told(
    why: str, played: Devices, by_nccl: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = spoiled(why, played, monkeypatch)
    if why == "nonce":
        monkeypatch.setattr(devices.Driver, "read", lambda *_: bytes(exported.NONCE))
    with group(**changes) as (sender, rank):
        lends = why not in UNLENT
        assert ("peer" in sender.offer()) is lends
        assert sender.carrier.name == "nccl"
        assert re.search((UNLENT | UNOPENED)[why], sender.carrier.why), sender.carrier
        assert not isinstance(sender._backend, peer.Lender)
        gc.collect()
        assert not played.opened
        assert sender.slots == 3
        give(sender, 2, seed=7).arrived.result(PATIENCE)
        assert rank.bucket(2, NBYTES).tolist() == [7] * NBYTES
    assert "copy" not in played.calls
    by_nccl.bytes.clear()
    gc.collect()
    assert not played.memory


def test_a_group_of_three_has_nothing_to_pull(played: Devices, by_nccl: Transport) -> None:
    for ranks in ([2], [1, 1]):
        sender = ends.sender("group", NBYTES, device=FIRST, ranks=ranks)
        with contextlib.closing(sender):
            assert all("peer" not in sender.offer(i) for i in range(len(ranks)))
            assert sender.carrier == ("nccl", "")
    assert not played.calls


def test_a_rank_on_the_trainers_own_gpu_is_told_another_way(
    played: Devices, by_nccl: Transport
) -> None:
    with pytest.raises(CarrierError, match="is on the trainer's GPU") as e, group(FIRST):
        pass
    assert e.value.hint == 'via="ipc"'
    assert not played.opened


def test_the_trainer_has_the_last_word(
    played: Devices, by_nccl: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = GroupSender._open
    found: list[list[int]] = []

    def changed(self: GroupSender, *args: Any) -> Any:
        self._lender = None
        return opens(self, *args)

    def made(*args: Any) -> Any:
        found.append([*played.opened])
        return by_nccl.backend(*args)

    monkeypatch.setattr(GroupSender, "_open", changed)
    monkeypatch.setattr(nccl, "Nccl", made)
    with group() as (sender, rank):
        assert played.calls.count("open") == 3
        assert [] in found, "the rank has closed what it does not need"
        assert not played.opened
        give(sender, 0, seed=7).arrived.result(PATIENCE)
        assert rank.bucket(0, NBYTES).tolist() == [7] * NBYTES


def test_what_a_rank_has_no_room_for_it_does_not_open(
    played: Devices, without_nccl: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer gives that slot back, and nobody may have it open then."""
    counts = iter([3, 2])
    monkeypatch.setattr(offers, "fitting", lambda *_: next(counts))
    with group() as (sender, rank):
        gc.collect()
        assert sender.slots == len(played.memory) == len(played.opened) == 2
        give(sender, 1, seed=4).arrived.result(PATIENCE)
        assert int(rank.bucket(1, NBYTES)[0]) == 4


def test_a_server_that_is_not_to_pull_says_by_what(
    played: Devices, by_nccl: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = peer.puller

    def unwanted(*args: Any) -> object:
        with monkeypatch.context() as patch:  # it has the environment of another process
            patch.setenv(peer.NO_PEERS, "1")
            return opens(*args)

    monkeypatch.setattr(peer, "puller", unwanted)
    with group() as (sender, _):
        assert sender.carrier == ("nccl", "NCCL_P2P_DISABLE=1 in the server's environment")
    assert "open" not in played.calls


def test_a_server_that_knows_of_no_copies_takes_what_nccl_brings(
    played: Devices, by_nccl: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def about(self: GroupReceiver, *_: object) -> dict[str, object]:
        return {"slots": 3, **nccl.about(self._device)}

    monkeypatch.setattr(GroupReceiver, "_about", about)
    with group() as (sender, _):
        assert sender.carrier == ("nccl", "")


def test_slots_of_other_sizes_are_left_alone(played: Devices, by_nccl: Transport) -> None:
    sender = ends.sender("group", NBYTES, device=FIRST, ranks=[1])
    with contextlib.closing(sender):
        slots = [torch.zeros(NBYTES + 1, dtype=torch.uint8)] * 3
        found = peer.puller(elsewhere(sender.offer()), slots, SECOND)
        assert found == "the server's slots have other sizes"
        assert "open" not in played.calls
        with pytest.raises(WireError, match="peer is 1"):
            peer.puller({"peer": 1}, slots, SECOND)


def becomes(found: Callable[[], object], wanted: object) -> None:
    end = time.monotonic() + PATIENCE
    while found() != wanted and time.monotonic() < end:
        time.sleep(0.005)
    assert found() == wanted


@pytest.mark.usefixtures("without_nccl")
def test_a_trainer_that_gives_up_frees_nothing_that_is_being_read(played: Devices) -> None:
    """What CUDA does then, it does not say; it may end the engine."""
    with group() as (sender, rank), ThreadPoolExecutor(1) as threads:
        played.copies = False
        sent = [give(sender, slot, seed=slot) for slot in range(2)]
        becomes(lambda: played.calls.count("copy"), 2)
        closing = threads.submit(sender.close)
        time.sleep(WHILE)
        assert len(played.memory) == 3
        assert len(played.opened) == 3
        played.copies = True
        closing.result(PATIENCE)
        for one in sent:
            assert isinstance(one.arrived.exception(PATIENCE), ConflictError)
        gc.collect()
        ended = [call for call in played.calls if call in ("close", "free")]
        assert ended == ["close"] * 3 + ["free"] * 3
        with pytest.raises(ConflictError):
            rank.bucket(2, NBYTES)


@pytest.mark.usefixtures("without_nccl")
def test_a_rank_that_leaves_is_heard_of_when_it_reads_nothing_any_more(played: Devices) -> None:
    """It could not load what came before, or another client came."""
    with group() as (sender, rank), ThreadPoolExecutor(1) as threads:
        played.copies = False
        sent = [give(sender, slot, seed=slot) for slot in range(2)]
        becomes(lambda: played.calls.count("copy"), 2)
        leaving = threads.submit(rank.close)
        time.sleep(WHILE)
        assert not any(one.arrived.done() for one in sent)
        assert len(played.opened) == 3
        played.copies = True
        leaving.result(PATIENCE)
        for one in sent:
            one.arrived.exception(PATIENCE)
        assert not alive(sender)
        sender.close()
        gc.collect()
        ended = [call for call in played.calls if call in ("close", "free")]
        assert ended == ["close"] * 3 + ["free"] * 3


@pytest.mark.usefixtures("without_nccl")
def test_memory_that_a_rank_may_still_read_is_not_given_back(
    played: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still, or what comes before its copies does."""
    monkeypatch.setattr(carriers_group, "_LEAVING", 0.1)
    kept: list[Any] = []
    monkeypatch.setattr(peer, "_KEPT", kept)
    with group() as (sender, _), ThreadPoolExecutor(1) as threads:
        played.copies = False
        give(sender, 0, seed=1)
        becomes(lambda: played.calls.count("copy"), 1)
        threads.submit(sender.close).result(PATIENCE)
        gc.collect()
        assert len(played.memory) == len(played.opened) == 3
        assert len(kept) == 1
        played.copies = True
        becomes(lambda: len(played.opened), 0)
    kept.clear()
    gc.collect()
    assert not played.memory


@pytest.mark.usefixtures("without_nccl")
def test_a_copy_that_the_driver_refuses_has_the_ranks_name(played: Devices) -> None:
    with group() as (sender, rank):
        played.refused.add("copy")
        with pytest.raises(ConflictError) as e:
            give(sender, 0, seed=1).arrived.result(PATIENCE)
        assert str(e.value).startswith("rank 0 of server 0 (process ")
        assert "ConflictError: the copy from the trainer's GPU: copy: CUDA_ERROR" in str(e.value)
        with pytest.raises(ConflictError, match="the copy from the trainer's GPU"):
            rank.bucket(0, NBYTES)
        assert not played.opened


@pytest.mark.parametrize("driver", ["works", "refuses"])
def test_a_rank_warms_up_when_an_update_begins(driver: str, played: Devices) -> None:
    """By a copy of bytes that nobody reads; a driver that refuses says so with the first bucket."""
    with group() as (sender, rank):
        if driver == "refuses":
            played.refused.add("copy")
        sender.look()
        end = time.monotonic() + PATIENCE
        while played.calls.count("copy") < 1 and driver == "works" and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(WHILE)
        assert played.calls.count("copy") == (driver == "works")
        played.refused.clear()
        for number in range(2):
            give(sender, number, seed=number + 1).arrived.result(PATIENCE)
            assert rank.bucket(number, NBYTES).tolist() == [number + 1] * NBYTES
            rank.loaded()
            sender.look()


# --- on two GPUs ----------------------------------------------------------------------------------

LARGE = 50_000_011

TRAINER = """
import json, os, sys, torch
from fp8ctl.carriers import ends
sender = ends.sender("group", 50_000_011, device="cuda:0", ranks=[1], timeout=60)
print(json.dumps(sender.offer()), flush=True)
sender.join()
print(type(sender._backend).__name__, flush=True)
sys.stdin.readline()
for slot in range(2):
    sender.send(slot, 50_000_011)
os.kill(os.getpid(), 9)
"""


def start(timeout: float = 120.0) -> GroupSender:
    made = ends.sender("group", LARGE, device="cuda:0", ranks=[1], timeout=timeout)
    assert isinstance(made, GroupSender)
    return made


def come(sender: GroupSender, process: Process, device: str = "cuda:1") -> None:
    process.say(join=sender.offer(), rank=0, device=device)
    sender.join()
    assert process.answer(120) == {"ok": "joined"}


def closes(sender: ends.Sender) -> None:
    """Close it, and see that its device goes on."""
    sender.close()
    assert float(torch.ones(10, device="cuda:0").sum()) == 10.0


def updated(sender: GroupSender, process: Process, turns: int, *, early: bool = False) -> None:
    """Bring buckets over all slots, several at a time, and see that they are whole."""
    for turn in range(turns):
        sizes = [LARGE - slot - turn for slot in range(3)]
        wanted = [fill(sender, slot, sizes[slot], seed=3 * turn + slot) for slot in range(3)]
        sent: list[Any] = [sender.send(slot, sizes[slot]) for slot in range(3)]
        found = [process.ok(bucket=[slot, sizes[slot]], early=early) for slot in range(3)]
        assert found == wanted
        process.ok(arrived=True)
        assert [one.arrived.result(120) for one in sent] == [None] * 3


@pytest.mark.gpu
@on_two
@pytest.mark.parametrize("early", [False, True], ids=["here", "on its way"])
def test_a_rank_on_a_peer_device_pulls_every_bucket(early: bool, pool: Pool) -> None:
    [process] = pool.take(1)
    for _ in range(2):  # the second group is made as the first was
        sender = start()
        come(sender, process)
        assert isinstance(sender._backend, peer.Lender)
        assert sender.slots == ends.GROUP_SLOTS, "two GPUs with room for 200 MB"
        updated(sender, process, 4, early=early)
        process.ok(close=True)
        sender.close()


@pytest.mark.gpu
@on_two
def test_a_bucket_is_pulled_when_it_is_written_and_not_before(pool: Pool) -> None:
    """What writes it runs long after it was given."""
    [process] = pool.take(1)
    sender = start()
    come(sender, process)
    for seed in range(3):
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        sender.buffer(0).fill_(seed + 1)
        sender.ready(0)
        sent: Any = sender.send(0, 1000)
        assert (
            process.ok(bucket=[0, 1000])
            == (seed + 1) * sum(at % 1009 + 1 for at in range(1000)) + 1000
        )
        sent.left.result(120)
    process.ok(close=True)
    sender.close()


@pytest.mark.gpu
@on_two
def test_a_user_who_wants_nccl_has_it(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peer.NCCL_ONLY, "1")
    [process] = pool.take(1)
    sender = start()
    come(sender, process)
    assert isinstance(sender._backend, nccl.Nccl)
    updated(sender, process, 1)
    process.ok(close=True)
    sender.close()


@pytest.mark.gpu
@on_two
@pytest.mark.parametrize("spoiled", ["nonce", "handle", "boot_id"])
def test_slots_that_cannot_be_opened_leave_it_to_nccl(spoiled: str, pool: Pool) -> None:
    [process] = pool.take(1)
    sender = start()
    offer = sender.offer()
    if spoiled == "boot_id":
        offer["peer"]["boot_id"] = "there"
    else:
        offer["peer"]["slots"][1][spoiled] = "00" * (32 if spoiled == "nonce" else 64)
    process.say(join=offer, rank=0, device="cuda:1")
    sender.join()
    assert process.answer(120) == {"ok": "joined"}
    assert isinstance(sender._backend, nccl.Nccl)
    updated(sender, process, 1)
    process.ok(close=True)
    sender.close()


@pytest.mark.gpu
@on_two
def test_a_rank_that_sees_its_own_gpu_alone_gets_every_bucket() -> None:
    """By whichever way: the driver says whether it opens memory of a device that is not seen."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    process = processes.Process(CUDA_VISIBLE_DEVICES=seen[1])
    try:
        sender = start()
        come(sender, process, "cuda:0")
        updated(sender, process, 2)
        process.ok(close=True)
        sender.close()
    finally:
        process.end()


@pytest.mark.gpu
@on_two
@pytest.mark.parametrize("when", ["between buckets", "with two on their way"])
def test_a_killed_rank_is_named(when: str, pool: Pool) -> None:
    [process] = pool.take(1)
    sender = start()
    come(sender, process)
    if when == "with two on their way":
        process.signal(signal.SIGSTOP)
    else:
        process.kill()
    sent: list[Any] = [sender.send(slot, LARGE) for slot in range(2)]
    if when == "with two on their way":
        time.sleep(0.5)
        process.kill()
    for one in sent:
        with pytest.raises(ConflictError, match=rf"process {process.pid} on .* is gone"):
            one.arrived.result(30)
    assert not alive(sender)
    closes(sender)


@pytest.mark.gpu
@on_two
def test_a_rank_that_never_says_that_it_has_a_bucket_is_named(pool: Pool) -> None:
    [process] = pool.take(1)
    sender = start(timeout=5.0)
    come(sender, process)
    process.signal(signal.SIGSTOP)
    began = time.monotonic()
    sent: Any = sender.send(0, LARGE)
    with pytest.raises(TimeoutError, match=rf"process {process.pid} "):
        sent.arrived.result(60)
    assert time.monotonic() - began < 30
    process.kill()
    closes(sender)


@pytest.mark.gpu
@on_two
def test_a_killed_trainer_ends_the_group_and_the_ranks_gpu_goes_on(pool: Pool) -> None:
    [process] = pool.take(1)
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdin is not None
        process.say(join=json.loads(trainer.stdout.readline()), rank=0, device="cuda:1")
        assert process.answer(120) == {"ok": "joined"}
        assert trainer.stdout.readline() == b"Lender\n"
        trainer.stdin.write(b"\n")
        trainer.stdin.close()
        trainer.wait(60)
    end = time.monotonic() + 30
    for slot in (0, 1, 2):  # those that had come are there
        answer = process.ask(bucket=[slot, LARGE])
        assert time.monotonic() < end
    assert answer["error"] == "ConflictError"
    assert "trainer is gone" in answer["message"] or "has ended" in answer["message"]
    process.ok(close=True)
    sender = start()  # the rank's device is as it was
    come(sender, process)
    updated(sender, process, 1)
    process.ok(close=True)
    sender.close()


@pytest.mark.gpu
@on_two
def test_the_memory_is_given_back(pool: Pool) -> None:
    [process] = pool.take(1)
    for _ in range(2):
        sender = start()
        come(sender, process)
        updated(sender, process, 1)
        process.ok(close=True)
        sender.close()
    del sender
    gc.collect()
    before, threads = used(0), threading.active_count()
    sender = start()
    come(sender, process)
    assert used(0) >= before + 3 * LARGE
    updated(sender, process, 1)
    process.ok(close=True)
    sender.close()
    del sender
    gc.collect()
    assert used(0) <= before + (4 << 20)
    assert threading.active_count() == threads
