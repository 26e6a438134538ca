"""CUDA memory of one host: what an offer says, anywhere; the memory itself, on a GPU.

python -m pytest -m gpu tests/carriers
"""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.carriers import cuda, driver, ends, exported
from fp8ctl.carriers.driver import HANDLE
from fp8ctl.errors import CarrierError
from fp8ctl.wire import WireError
from tests.carriers.processes import alive
from tests.carriers.rank import weighted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.carriers.processes import Pool

CPU = torch.device("cpu")
NBYTES = 5_000_011

on_one = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


def offer(**changes: object) -> dict[str, Any]:
    """Return an offer as another process makes it."""
    slot = {"handle": "ab" * HANDLE, "nbytes": 1000, "nonce": "00" * 32}
    one = {"kind": "ipc", "version": 1, "process": "other", "device": "0" * 32}
    return {**one, "slots": [slot, {**slot, "nbytes": 2000}], **changes}


# --- what an offer says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 2}, CarrierError, "in version 2, this server reads 1"),
        ({"version": "1"}, WireError, "version is '1'"),
        ({"process": exported.PROCESS}, CarrierError, "trainer and server are one"),
        ({"device": None}, WireError, "device is None"),
        ({"slots": []}, WireError, "slots"),
        ({"slots": [{"handle": "ab" * HANDLE, "nbytes": 0, "nonce": ""}]}, WireError, "0 bytes"),
        ({"slots": [{"handle": "ab", "nbytes": 1, "nonce": ""}]}, WireError, "expected 64 bytes"),
        ({"slots": [{"handle": "xy", "nbytes": 1, "nonce": ""}]}, WireError, "expected 64 bytes"),
        ({"slots": [{"handle": "ab" * HANDLE, "nbytes": 1}]}, WireError, "nonce is None"),
    ],
)
def test_an_offer_that_says_something_else_is_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ends.receive(offer(**change), 0, CPU)


def test_a_server_on_a_cpu_does_not_take_cuda_memory() -> None:
    with pytest.raises(CarrierError, match="weights of this server are on cpu"):
        ends.receive(offer(), 0, CPU)


def test_the_slots_are_opened_on_the_ranks_own_device_where_they_are_its_own() -> None:
    assert cuda.whose("bb", ["aa", "bb"], 1) == 1
    assert cuda.whose("aa", ["aa", "bb"], 1) == 0
    # Parts of a device may have its UUID; a rank's own is its own.
    assert cuda.whose("aa", ["aa", "aa"], 1) == 1


def test_a_device_that_the_server_does_not_see_is_refused() -> None:
    with pytest.raises(CarrierError, match="GPU cc is none of this server's: aa, bb") as e:
        cuda.whose("cc", ["aa", "bb"], 0)
    assert "CUDA_VISIBLE_DEVICES" in str(e.value.hint)


def test_a_host_without_a_driver_says_so() -> None:
    try:
        ctypes.CDLL(driver.LIBRARY)
    except OSError:
        with pytest.raises(CarrierError, match=r"no CUDA driver on this host: libcuda\.so\.1"):
            driver.uuids()
    else:
        pytest.skip("this host has a CUDA driver")


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def sender() -> Iterator[ends.Sender]:
    made = ends.sender("ipc", NBYTES, device="cuda:0")
    yield made
    made.close()


def fill(sender: ends.Sender, slot: int, nbytes: int, seed: int) -> int:
    bucket = sender.buffer(slot)[:nbytes]
    generator = torch.Generator(bucket.device).manual_seed(seed)
    bucket.copy_(
        torch.randint(
            *(0, 256, (nbytes,)), dtype=torch.uint8, generator=generator, device=bucket.device
        )
    )
    sender.ready(slot)
    return weighted(bucket)


def used(device: int = 0) -> int:
    """Return the bytes that are in use on a device."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


@pytest.mark.gpu
@on_one
def test_two_servers_read_what_was_written_slot_after_slot(pool: Pool, sender: ends.Sender) -> None:
    ranks = pool.take(2)
    for number, rank in enumerate(ranks):
        rank.ok(join=sender.offer(number), rank=0, device="cuda:0")
    for bucket in range(6):
        slot, nbytes = bucket % 2, NBYTES - bucket * 1000
        wanted = fill(sender, slot, nbytes, seed=bucket)
        for rank in ranks:
            rank.say(bucket=[slot, nbytes])
        assert [rank.answer() for rank in ranks] == [{"ok": wanted}] * 2
    for rank in ranks:
        rank.ok(close=True)


@pytest.mark.gpu
@on_one
def test_a_rank_reads_the_trainers_memory_itself_and_the_other_slot_stays(
    pool: Pool, sender: ends.Sender
) -> None:
    [rank] = pool.take(1)
    rank.ok(join=sender.offer(), rank=0, device="cuda:0")
    other = fill(sender, 1, NBYTES, seed=9)
    assert rank.ok(bucket=[1, NBYTES], keep=True) == other
    fill(sender, 0, NBYTES, seed=1)
    rank.ok(bucket=[0, NBYTES], keep=True)
    wanted = fill(sender, 0, NBYTES, seed=3)
    assert rank.ok(look=0) == wanted
    assert rank.ok(look=1) == other
    rank.ok(close=True)


@pytest.mark.gpu
@on_one
def test_the_memory_is_given_back_with_its_last_tensor() -> None:
    nbytes = 64 << 20
    torch.zeros(1, device="cuda:0")
    before = used()
    sender = ends.sender("ipc", nbytes, device="cuda:0")
    assert used() >= before + 2 * nbytes
    kept = sender.buffer(0)[10:]
    assert alive(sender)
    sender.close()
    sender.close()
    assert not alive(sender)
    gc.collect()
    assert used() >= before + nbytes
    kept.fill_(1)
    torch.cuda.synchronize()
    del kept
    gc.collect()
    assert used() <= before + (4 << 20)


@pytest.mark.gpu
@on_one
def test_a_second_connection_follows_the_first(pool: Pool) -> None:
    [rank] = pool.take(1)
    for seed in range(3):
        sender = ends.sender("ipc", NBYTES, device="cuda:0")
        rank.ok(join=sender.offer(), rank=0, device="cuda:0")
        wanted = fill(sender, 0, NBYTES, seed)
        assert rank.ok(bucket=[0, NBYTES]) == wanted
        rank.ok(close=True)
        sender.close()


@pytest.mark.gpu
@on_one
def test_a_handle_is_not_opened_in_its_own_process(sender: ends.Sender) -> None:
    with pytest.raises(CarrierError, match="in the process that exports it"):
        ends.receive(sender.offer(), 0, torch.device("cuda:0"))


@pytest.mark.gpu
@on_one
def test_a_slot_that_is_not_what_was_offered_is_refused(pool: Pool, sender: ends.Sender) -> None:
    [rank] = pool.take(1)
    changed = sender.offer()
    changed["slots"][1]["nonce"] = "00" * 32
    answer = rank.ask(join=changed, rank=0, device="cuda:0")
    assert (answer["error"], "nonce differs" in answer["message"]) == ("CarrierError", True)
    changed = sender.offer()
    changed["slots"][0]["handle"] = "00" * HANDLE
    answer = rank.ask(join=changed, rank=0, device="cuda:0")
    assert (answer["error"], "CUDA_ERROR_" in answer["message"]) == ("CarrierError", True)
    rank.ok(join=sender.offer(), rank=0, device="cuda:0")
    rank.ok(close=True)


@pytest.mark.gpu
@on_one
def test_more_memory_than_the_device_has_is_refused_and_nothing_is_kept() -> None:
    torch.zeros(1, device="cuda:0")
    before = used()
    with pytest.raises(CarrierError, match="CUDA_ERROR_OUT_OF_MEMORY") as e:
        ends.sender("ipc", 1 << 42, device="cuda:0")
    assert "bucket_bytes" in str(e.value.hint)
    gc.collect()
    assert used() <= before + (4 << 20)


@pytest.mark.gpu
@on_one
def test_a_killed_server_leaves_the_trainers_memory_alone(pool: Pool, sender: ends.Sender) -> None:
    first, second = pool.take(2)
    for rank in (first, second):
        rank.ok(join=sender.offer(), rank=0, device="cuda:0")
    first.kill()
    wanted = fill(sender, 0, NBYTES, seed=5)
    assert second.ok(bucket=[0, NBYTES]) == wanted
    second.ok(close=True)


@pytest.mark.gpu
@on_two
def test_a_rank_on_a_peer_device_gets_a_copy_in_its_own_memory(
    pool: Pool, sender: ends.Sender
) -> None:
    [rank] = pool.take(1)
    rank.ok(join=sender.offer(), rank=1, device="cuda:1")
    wanted = fill(sender, 0, NBYTES, seed=1)
    assert rank.ok(bucket=[0, NBYTES], keep=True) == wanted
    fill(sender, 0, NBYTES, seed=2)
    assert rank.ok(look=0) == wanted
    rank.ok(close=True)
