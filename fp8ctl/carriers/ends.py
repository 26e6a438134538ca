"""The two ends of what brings a bucket from a trainer to a server, and how to get one.

A carrier has a few slots, each as large as the largest bucket. The trainer's `Sender` says
in its offer how to reach them, each rank of each server makes a `Receiver` of the offer.
While the ranks load from one slot, the next is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8ctl.errors import UsageError
from fp8ctl.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.carriers.sent import Carrier, Sent
    from fp8ctl.wire import Kind

#: How many a carrier has whose ranks read the slots themselves.
SLOTS = 2
#: How many a group has, where all devices have room: one is written, two are on their way.
GROUP_SLOTS = 3


class Sender(Protocol):
    """The trainer's end.

    Attributes:
        kind: what servers are told that it is.
        carrier: what carries; of a group, known after `join`.
        alive: False once it is closed or broken; then both ends have to connect anew.
        slots: how many there are; of a group, known after `join`.
    """

    kind: Kind
    carrier: Carrier
    alive: bool
    slots: int

    def offer(self, server: int = 0) -> dict[str, Any]:
        """Return what `Connect` says to the server of this number, in JSON types."""

    def join(self) -> None:
        """Wait until every rank of every server is there, where the carrier is a group.

        The ranks come while their servers answer to the offer: send that from other threads.

        Raises:
            TimeoutError: some did not come; the message names them.
            ConflictError: `cancel` or `close` ended it.
        """

    def look(self) -> None:
        """Find out whether a rank has left a group: it is not `alive` any more then."""

    def buffer(self, slot: int) -> torch.Tensor:
        """Return where a bucket is written: uint8, all bytes of the slot.

        A slot may be written again when every server has answered for its last bucket; where
        the carrier is a group, when the bucket has `left`.
        """

    def ready(self, slot: int) -> None:
        """Say that all which writes the slot is launched, on the current stream."""

    def settle(self, slot: int) -> None:
        """Wait, where other processes read the slot itself, until what was `ready` is written."""

    def send(self, slot: int, nbytes: int) -> Sent | None:
        """Bring the first bytes of a slot to all ranks, where the carrier is a group.

        Returns at once what tells how far they are. They go in the order of the calls, to ranks
        that have room; a rank that has loaded what it got before takes the next one by itself.
        Where the ranks read the slot itself there is nothing to do: None. In what is returned may
        be:

        - TimeoutError: a rank had no room for it, or did not get it; the message names it.
        - ConflictError: `cancel` or `close` ended it, or a rank is gone. What came after it in
          the queue has the same reason.

        Raises:
            CarrierError: there is no such slot, or it is smaller.
        """

    def cancel(self, why: str) -> None:
        """End a `join` that waits in another thread, and all that `send` has not sent.

        Both with ConflictError.

        A group ends with it, and its ranks hear `why`; other carriers stay alive.
        """

    def close(self) -> None:
        """Give everything back; also after a failure, and a second time."""


class Receiver(Protocol):
    """The end in one rank of a server."""

    def bucket(self, slot: int, nbytes: int, *, here: bool = True) -> torch.Tensor:
        """Return the bytes of a bucket, uint8: to be read until `loaded`.

        What reads them on a GPU is launched on the current stream. Buckets are asked for in the
        order in which they are sent.

        Args:
            slot: where it lies.
            nbytes: of it.
            here: False: bytes may be on their way to a GPU, and what is launched from now on
                waits for them. They may be lost all the same: `arrived` tells.

        Raises:
            CarrierError: there is no such slot, or it is smaller.
            TimeoutError: the trainer did not send it; `ConflictError`: it withdrew it.
        """

    def arrived(self) -> None:
        """Wait until the bytes of every bucket that was asked for are here.

        Raises:
            TimeoutError: the trainer did not send some; `ConflictError`: it withdrew them.
        """

    def loaded(self) -> None:
        """Say that all which reads the buckets until now is launched, on the current stream.

        Whoever reads on another stream has the current one wait for that before. Where the
        trainer writes the slot itself, this waits until the device has read it: after this the
        server answers, and the trainer writes.
        """

    def close(self) -> None:
        """Give everything back; also after a failure, and a second time."""


def sender(
    kind: Kind,
    nbytes: int,
    *,
    slots: int | None = None,
    device: torch.device | str | None = None,
    ranks: Sequence[int] = (),
    host: str = "127.0.0.1",
    timeout: float = 600.0,
) -> Sender:
    """Return the trainer's end of a new carrier.

    Args:
        kind: "memory", "ipc" or "group".
        nbytes: of a slot: the largest bucket.
        slots: how many buckets may be under way at once; None: `SLOTS`. For "group" more than
            two are had where every device has room for them; None: `GROUP_SLOTS`.
        device: where a bucket is written; for "ipc" a CUDA device (None: the current one), for
            "group" what decides between NCCL and gloo (None: the CPU).
        ranks: for "group": how many ranks each server has.
        host: for "group": an address of this host that the servers reach.
        timeout: for "group": seconds that joining, and one bucket, may take.

    Raises:
        UsageError: no carrier of this kind, or a size that is none.
        CarrierError: this process or host cannot have it.
    """
    if slots is None:
        slots = GROUP_SLOTS if kind == "group" else SLOTS
    if nbytes < 1 or slots < 1:
        raise UsageError(
            f"{slots} slots of {nbytes} bytes: expected one or more of each",
            hint="bucket_bytes=512 << 20",
        )
    if kind == "memory":
        from fp8ctl.carriers.memory import MemorySender

        return MemorySender(nbytes, slots)
    if kind == "ipc":
        from fp8ctl.carriers.cuda import CudaSender

        return CudaSender(nbytes, slots, torch.device("cuda" if device is None else device))
    if kind == "group":
        from fp8ctl.carriers.group import GroupSender

        if not ranks or min(ranks) < 1:
            raise UsageError(f"a group of {list(ranks)} ranks", hint="one number for each server")
        where = torch.device("cpu" if device is None else device)
        return GroupSender(nbytes, slots, where, ranks, host, timeout)
    raise UsageError(f"no carrier is called {kind!r}", hint="'memory', 'ipc' or 'group'")


def receive(offer: Mapping[str, Any], rank: int, device: torch.device) -> Receiver:
    """Return a rank's end of the carrier that a trainer offers.

    Args:
        offer: what the trainer's end said.
        rank: of this server, from 0.
        device: where this rank holds its weights.

    Raises:
        WireError: it is no offer.
        CarrierError: this rank cannot reach what is offered; the message says why.
        TimeoutError: the trainer or another rank did not come.
    """
    kind = offer.get("kind")
    if kind == "memory":
        from fp8ctl.carriers.memory import MemoryReceiver

        return MemoryReceiver(offer)
    if kind == "ipc":
        from fp8ctl.carriers.cuda import CudaReceiver

        return CudaReceiver(offer, device)
    if kind == "group":
        from fp8ctl.carriers.group import GroupReceiver

        return GroupReceiver(offer, rank, device)
    raise WireError(f"a carrier of kind {kind!r}; expected 'memory', 'ipc' or 'group'")
