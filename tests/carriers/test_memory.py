"""Shared memory: what the trainer writes is what each rank reads, where it lies."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.carriers import ends, memory
from fp8ctl.carriers.memory import NONCE
from fp8ctl.errors import CarrierError, UsageError
from fp8ctl.wire import WireError
from tests.carriers.processes import alive
from tests.carriers.rank import left, weighted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.carriers.processes import Pool

CPU = torch.device("cpu")
NBYTES = 1_000_003  # neither a page nor an alignment


@pytest.fixture
def sender() -> Iterator[ends.Sender]:
    made = ends.sender("memory", NBYTES)
    yield made
    made.close()


def fill(sender: ends.Sender, slot: int, nbytes: int, seed: int) -> int:
    """Write a bucket as a trainer does; return the sum that a rank must find."""
    generator = torch.Generator().manual_seed(seed)
    bucket = sender.buffer(slot)[:nbytes]
    bucket.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator))
    sender.ready(slot)
    return weighted(bucket)


# --- what is carried ------------------------------------------------------------------------------


def test_two_servers_read_what_was_written_slot_after_slot(pool: Pool) -> None:
    before = left()
    sender = ends.sender("memory", NBYTES)
    ranks = pool.take(2)
    held = [rank.ok(left=True) for rank in ranks]
    for number, rank in enumerate(ranks):
        rank.ok(join=sender.offer(number), rank=0)
    sender.join()
    for bucket in range(6):
        slot, nbytes = bucket % 2, NBYTES - bucket * 1000
        wanted = fill(sender, slot, nbytes, seed=bucket)
        for rank in ranks:
            rank.say(bucket=[slot, nbytes])
        sender.send(slot, nbytes)
        assert [rank.answer() for rank in ranks] == [{"ok": wanted}] * 2
    assert [rank.ok(close=True) for rank in ranks] == held
    sender.close()
    assert left() == before


def test_a_slot_that_is_written_leaves_the_other_alone(sender: ends.Sender, pool: Pool) -> None:
    [rank] = pool.take(1)
    rank.ok(join=sender.offer(), rank=0)
    first = fill(sender, 0, NBYTES, seed=1)
    assert rank.ok(bucket=[0, NBYTES], keep=True) == first
    second = fill(sender, 1, NBYTES, seed=2)
    assert rank.ok(look=0) == first
    assert rank.ok(bucket=[1, NBYTES]) == second != first
    rank.ok(close=True)


def test_a_rank_reads_the_trainers_memory_itself(sender: ends.Sender, pool: Pool) -> None:
    """Nothing is copied: what is written later is seen by a tensor from before."""
    [rank] = pool.take(1)
    rank.ok(join=sender.offer(), rank=0)
    fill(sender, 0, NBYTES, seed=1)
    rank.ok(bucket=[0, NBYTES], keep=True)
    wanted = fill(sender, 0, NBYTES, seed=3)
    assert rank.ok(look=0) == wanted
    rank.ok(close=True)


def test_a_tensor_outlives_the_carrier(sender: ends.Sender) -> None:
    """Unmapped under a tensor that somebody still has would end the engine."""
    receiver = ends.receive(sender.offer(), 0, CPU)
    wanted = fill(sender, 0, NBYTES, seed=4)
    part = receiver.bucket(0, NBYTES)[5:]
    receiver.close()
    sender.close()
    gc.collect()
    assert weighted(torch.cat([torch.zeros(5, dtype=torch.uint8), part])) > 0
    assert wanted
    assert left()["mapped"] == 1
    del part
    assert left()["mapped"] == 0


def test_a_rank_cannot_write_the_bucket() -> None:
    """A write would reach the trainer and the other ranks; here it ends the one who writes."""
    script = (
        "import torch\n"
        "from fp8ctl.carriers import ends\n"
        "sender = ends.sender('memory', 4096)\n"
        "receiver = ends.receive(sender.offer(), 0, torch.device('cpu'))\n"
        "print('read', int(receiver.bucket(0, 10).sum()), flush=True)\n"
        "receiver.bucket(0, 10)[0] = 1\n"
        "print('written', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "read 0\n", done.stderr
    assert done.returncode == -11


# --- what is refused ------------------------------------------------------------------------------


def another(sender: ends.Sender, **changes: object) -> dict[str, Any]:
    """Return an offer whose first slot, or itself, says something else."""
    offer = sender.offer()
    for key, value in changes.items():
        (offer["slots"][0] if key in offer["slots"][0] else offer)[key] = value
    return offer


def test_a_process_that_has_ended_is_named(sender: ends.Sender) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(CarrierError, match=rf"/proc/{gone.pid}/fd/\d+: no such process") as e:
        ends.receive(another(sender, pid=gone.pid), 0, CPU)
    assert 'via="disk"' in str(e.value.hint)


def test_a_host_that_is_another_is_refused(sender: ends.Sender) -> None:
    with pytest.raises(CarrierError, match="another host"):
        ends.receive(another(sender, boot_id="0" * 36), 0, CPU)


def test_another_users_process_is_refused(sender: ends.Sender) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    script = (
        "import json, os, sys, torch\n"
        "from fp8ctl.carriers import ends, memory\n"
        "open('/dev/null', encoding='ascii').close()\n"  # what Python imports late
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "ends.receive(json.load(sys.stdin), 0, torch.device('cpu'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(sender.offer()),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "CarrierError" in done.stderr
    assert "another user's process" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonce": "00" * NONCE}, "its nonce differs"),
        ({"nbytes": NBYTES - 1}, f"has {NBYTES + NONCE} bytes, offered were {NBYTES - 1}"),
        ({"nbytes": NBYTES + 1}, f"has {NBYTES + NONCE} bytes, offered were {NBYTES + 1}"),
        ({"fd": 0}, "not a trainer's bucket"),
        ({"fd": 987_654}, "no such process or file"),
    ],
)
def test_a_file_that_is_not_what_was_offered_is_refused(
    sender: ends.Sender, changes: dict[str, object], message: str
) -> None:
    before = left()
    with pytest.raises(CarrierError, match=message):
        ends.receive(another(sender, **changes), 0, CPU)
    assert left() == before


def test_a_file_that_could_shrink_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no longer there end the process that reads them."""
    monkeypatch.setattr(memory, "_SEALS", 0)
    sender = ends.sender("memory", 4096)
    monkeypatch.undo()
    with pytest.raises(CarrierError, match="not sealed"):
        ends.receive(sender.offer(), 0, CPU)
    sender.close()


def test_the_trainers_file_cannot_shrink(sender: ends.Sender) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(sender.offer()["slots"][0]["fd"], 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda offer: offer.pop("pid"),
        lambda offer: offer.update(pid="1"),
        lambda offer: offer.update(pid=True),
        lambda offer: offer.update(slots=[]),
        lambda offer: offer.update(slots=[1]),
        lambda offer: offer["slots"][0].update(nbytes=0),
        lambda offer: offer["slots"][0].pop("nonce"),
        lambda offer: offer.update(kind="pigeon"),
    ],
)
def test_what_is_no_offer_is_refused(
    sender: ends.Sender, change: Callable[[dict[str, Any]], object]
) -> None:
    offer = sender.offer()
    change(offer)
    with pytest.raises(WireError, match="carrier"):
        ends.receive(offer, 0, CPU)


@pytest.mark.parametrize(("slot", "nbytes"), [(2, 1), (-1, 1), (0, NBYTES + 1), (0, -1)])
def test_a_bucket_outside_of_its_slot_is_refused(
    sender: ends.Sender, slot: int, nbytes: int
) -> None:
    receiver = ends.receive(sender.offer(), 0, CPU)
    with pytest.raises(CarrierError, match=rf"slot {slot} |a bucket of {nbytes} bytes"):
        receiver.bucket(slot, nbytes)
    receiver.close()
    with pytest.raises(CarrierError, match="a carrier that has 0"):
        receiver.bucket(0, 1)


@pytest.mark.parametrize(("nbytes", "slots"), [(0, 2), (-1, 2), (10, 0)])
def test_slots_that_hold_nothing_are_refused(nbytes: int, slots: int) -> None:
    with pytest.raises(UsageError):
        ends.sender("memory", nbytes, slots=slots)


def test_more_memory_than_there_can_be_is_refused_and_nothing_is_kept() -> None:
    before = left()
    with pytest.raises(CarrierError, match="shared memory") as e:
        ends.sender("memory", 1 << 60)
    assert "bucket_bytes" in str(e.value.hint)
    assert left() == before


# --- what is left ---------------------------------------------------------------------------------


def test_a_trainer_that_is_killed_leaves_nothing(pool: Pool) -> None:
    """The ranks keep what they mapped, until they close."""
    script = (
        "import json, sys, time\n"
        "from fp8ctl.carriers import ends\n"
        "sender = ends.sender('memory', 4096)\n"
        "sender.buffer(0).fill_(7)\n"
        "print(json.dumps(sender.offer()), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        offer = json.loads(trainer.stdout.readline())
        [rank] = pool.take(1)
        before = rank.ok(left=True)
        rank.ok(join=offer, rank=0)
        held = Path(f"/proc/{trainer.pid}/maps").read_text(encoding="utf-8")
        assert "/memfd:fp8ctl" in held
        assert "/dev/shm" not in held  # a file there would stay
        trainer.kill()
        trainer.wait()
    assert rank.ok(bucket=[0, 4096]) == weighted(torch.full((4096,), 7, dtype=torch.uint8))
    assert rank.ok(close=True) == before


def test_closing_twice_is_closing_once(sender: ends.Sender) -> None:
    assert alive(sender)
    sender.cancel("nothing waits here")
    assert alive(sender)
    sender.close()
    sender.close()
    assert not alive(sender)
    with pytest.raises(CarrierError, match="closed"):
        sender.offer()
