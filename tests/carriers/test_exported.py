"""What an offer of a GPU's memory says, and that it is what is opened."""

from __future__ import annotations

import gc

import pytest

from fp8ctl.carriers import exported
from fp8ctl.carriers.driver import HANDLE
from fp8ctl.carriers.exported import Exported, Opened
from fp8ctl.errors import CarrierError
from tests.carriers import devices
from tests.carriers.devices import FIRST, SECOND, Devices
from tests.carriers.test_cuda import offer

NBYTES = 1000


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Devices:
    return devices.play(monkeypatch)


def read(slots: Exported) -> list[tuple[bytes, int, str]]:
    """Return what another process reads of the offer."""
    return exported.offered({**slots.offer(), "process": "other"})


def test_an_offer_names_each_slot_by_its_handle() -> None:
    handle = bytes.fromhex("ab" * HANDLE)
    assert exported.offered(offer()) == [(handle, 1000, "00" * 32), (handle, 2000, "00" * 32)]


def test_what_is_opened_is_what_was_exported_and_both_are_given_back(played: Devices) -> None:
    slots = Exported(NBYTES, 2, FIRST)
    opened = Opened(read(slots), SECOND)
    assert [one.address for one in opened.slots] == [one.data_ptr() for one in slots.slots]
    assert len(slots.slots[1]) == NBYTES
    kept = slots.slots[1][10:]
    opened.close()
    slots.close()
    assert not played.opened
    assert [*played.memory] == [kept.data_ptr() - 10], "a tensor uses it"
    del kept
    assert not played.memory


@pytest.mark.parametrize("why", ["nonce differs", "open: CUDA_ERROR"])
def test_a_slot_that_is_not_what_was_offered_is_not_opened(why: str, played: Devices) -> None:
    slots = Exported(NBYTES, 2, FIRST)
    if why == "nonce differs":
        played.memory[slots.slots[1].data_ptr()][NBYTES] ^= 1
    else:
        played.refused.add("open")
    with pytest.raises(CarrierError, match=why):
        Opened(read(slots), SECOND)
    gc.collect()
    assert not played.opened


@pytest.mark.parametrize("call", ["allocate", "write", "export"])
def test_what_cannot_be_exported_is_given_back(call: str, played: Devices) -> None:
    played.refused.add(call)
    with pytest.raises(CarrierError, match=f"no 2 slots of 1000 bytes on cuda:0: {call}: CUDA"):
        Exported(NBYTES, 2, FIRST)
    gc.collect()
    assert not played.memory
