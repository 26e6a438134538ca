"""Buckets by a broadcast: a trainer and all ranks of all servers, over NCCL or gloo.

Where a trainer has one rank, on another GPU of its host, that one pulls them instead (`peer`).

The trainer is rank 0 and holds a connection to each rank (`hub`). A broadcast begins when every
rank has said that it has room for the bucket, so that nobody is left in one that another never
enters, and who is missing has a name. A thread of the trainer gives the buckets (`giving`), one
of each rank takes them (`ahead`). After a failure the group is ended, and made anew.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import torch

from fp8ctl.carriers import gloo, link, nccl, offers, peer
from fp8ctl.carriers.ahead import Ahead
from fp8ctl.carriers.giving import Giver
from fp8ctl.carriers.hub import Hub
from fp8ctl.carriers.sent import Carrier, Sent
from fp8ctl.errors import CarrierError, ConflictError
from fp8ctl.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fp8ctl.carriers.ahead import Backend
    from fp8ctl.wire import Kind


_LATER = 5.0
#: Seconds that a rank gets to stop reading the trainer's slots.
_LEAVING = 2.0


class GroupSender:
    """The trainer's end; see `ends.Sender`."""

    kind: Kind = "group"

    def __init__(
        self,
        nbytes: int,
        slots: int,
        device: torch.device,
        ranks: Sequence[int],
        host: str,
        timeout: float,
    ) -> None:
        self.alive = True
        self._host, self._timeout = host, float(timeout)
        self._device = device
        self._backend_name: Literal["nccl", "gloo"] = "nccl" if device.type == "cuda" else "gloo"
        self._first = [1 + sum(ranks[:i]) for i in range(len(ranks))]
        self._world = 1 + sum(ranks)
        self._nbytes = nbytes
        count = offers.fitting([nbytes] * slots, device)
        lent = peer.lender(nbytes, count, device, self._world)
        self._lender: peer.Lender | None = None
        if isinstance(lent, str):
            self._slots = offers.allocate([nbytes] * count, device)
            self.carrier = Carrier(self._backend_name, lent)
        else:
            self._lender, self._slots = lent, lent.slots
            self.carrier = Carrier("copies")
        self.slots = len(self._slots)
        #: What the device does before a slot may be read.
        self._written: list[Any] = [None] * self.slots
        self._backend: Backend | None = None
        self._giver: Giver | None = None
        # One thread at a time joins or closes; `cancel` reaches it through the hub.
        self._busy = threading.Lock()
        names = [
            f"rank {rank} of server {server}"
            for server, count in enumerate(ranks)
            for rank in range(count)
        ]
        self._hub = Hub(host, names)

    def offer(self, server: int = 0) -> dict[str, Any]:
        """Return where a server finds this trainer, and which ranks of the group are its own."""
        return {
            "kind": self.kind,
            "backend": self._backend_name,
            "host": self._host,
            "port": self._hub.port,
            "key": self._hub.key,
            "world": self._world,
            "first_rank": self._first[server],
            # Longer than here: who has waited too long for others names them to all.
            "timeout": self._timeout + _LATER,
            "slots": [{"nbytes": self._nbytes}] * self.slots,
            # Who does not know it takes what NCCL brings.
            **({} if self._lender is None else {"peer": self._lender.offer()}),
        }

    def join(self) -> None:
        """Wait for all ranks, then open the group."""
        deadline = time.monotonic() + self._timeout
        with self._busy:
            try:
                self._hub.check()
                told = self._hub.gather(deadline)
                # As many as all have room for.
                held = [offers.count_in(message) for message in told.values()]
                self.slots = min([self.slots, *held])
                offers.keep(self._slots, self.slots)
                self._backend = self._open(told, deadline)
                self._hub.collect(deadline)
                ranks = range(1, self._world)
                self._giver = Giver(
                    self._hub,
                    self._backend,
                    self._slots,
                    ranks,
                    timeout=self._timeout,
                    ended=self._break,
                    soon=all(message.get("soon") is True for message in told.values()),
                )
            except BaseException as e:
                self._break(str(e))
                raise

    def _open(self, told: Mapping[int, link.Message], deadline: float) -> Backend:
        if self._backend_name == "gloo":
            store, port = gloo.open_store(self._host, self._hub.key, self._timeout)
            self._hub.tell(go=port, slots=self.slots)
            left = max(0.001, deadline - time.monotonic())
            return gloo.Gloo(store, 0, self._world, self._host, left, self._hub.check)
        if self._lender is not None:
            said = told[1].get("peer")
            if said is True:
                self._hub.tell(go=peer.GO, slots=self.slots)
                return self._lender
            self.carrier = Carrier("nccl", said if isinstance(said, str) else "")
        ours = nccl.about(self._device)
        for rank, message in told.items():
            nccl.refuse_unlike(ours, message, self._hub.name(rank))
        unique = nccl.unique_id()
        self._hub.tell(go=unique.hex(), slots=self.slots)
        return nccl.Nccl(unique, 0, self._world, self._device, deadline, self._hub.check)

    def look(self) -> None:
        """Leave the group if a rank has: it was started anew, or met another client.

        The others are told that an update begins.
        """
        # The thread that gives buckets hears of it, too, but perhaps a moment later.
        if self.alive and (gone := self._hub.gone()):
            self.cancel(f"{gone[0]} has left the group")
        elif self.alive and self._giver is not None:
            self._giver.expect()

    def buffer(self, slot: int) -> torch.Tensor:
        """Return the slot."""
        return self._slots[slot]

    def ready(self, slot: int) -> None:
        """Note what was launched until now: `send` comes after that, and nobody waits here."""
        self._written[slot] = _reached(self._device)

    def settle(self, slot: int) -> None:
        """Do nothing: the broadcast comes after it, on the device."""

    def send(self, slot: int, nbytes: int) -> Sent:
        """Have the bucket given when every rank has room for it; return at once."""
        giver = self._giver
        if giver is None:
            why = "the group is not there: it was not joined, or has ended"
            refused = Sent(Future(), Future())
            for future in refused:
                future.set_exception(ConflictError(why))
            return refused
        if self._slots:  # not closed
            offers.part(self._slots, slot, nbytes)
        return giver.give(slot, nbytes, self._written[slot])

    def cancel(self, why: str) -> None:
        """End the group, and with it what waits."""
        self.alive = False
        self._hub.cancel(why)

    def close(self) -> None:
        """Leave the group, close every connection and give the slots back."""
        self.cancel("the trainer has closed the group")
        with self._busy:
            if self._giver is not None:
                self._giver.join()
            self._break("")
            self._slots.clear()

    def _break(self, why: str) -> None:
        self.alive = False
        backend, self._backend = self._backend, None
        # The ranks first: who waits in the same broadcast is told why, who pulls is to stop.
        pulled = backend is not None and backend.pulled
        left = self._hub.close(why, _LEAVING if pulled else 0.0)
        if pulled and not left and self._lender is not None:
            self._lender.keep()
        if backend is not None:
            backend.close()


class GroupReceiver:
    """One rank of a server; see `ends.Receiver`. Making it waits for all other ranks."""

    def __init__(self, offer: Mapping[str, Any], rank: int, device: torch.device) -> None:
        backend = offers.take(offer, "backend", str)
        if backend not in ("nccl", "gloo"):
            raise WireError(f"carrier: backend {backend!r}; expected 'nccl' or 'gloo'")
        if (backend == "nccl") != (device.type == "cuda"):
            raise CarrierError(
                f"the trainer speaks {backend}, and this server's weights are on {device}",
                hint="trainer and servers all on GPUs, or all on CPUs",
            )
        timeout = offers.take(offer, "timeout", float)
        self._device = device
        sizes = [one["nbytes"] for one in offers.slots_of(offer)]
        # Before the group is joined: who has no memory keeps nobody waiting.
        self._slots = offers.allocate(sizes[: offers.fitting(sizes, device)], device)
        #: Slots that were handed out and are read.
        self._read: list[int] = []
        self._ahead: Ahead | None = None
        mine = offers.take(offer, "first_rank", int) + rank
        deadline = time.monotonic() + timeout
        host, key = offers.take(offer, "host", str), offers.take(offer, "key", str)
        world, port = offers.take(offer, "world", int), offers.take(offer, "port", int)
        pulls = peer.puller(offer, self._slots, device)
        puller = None if isinstance(pulls, str) else pulls
        line = link.join(host, port, key, mine, self._about(backend, pulls), deadline)
        check = functools.partial(link.expect_nothing, line)
        joined: Backend | None = puller
        try:
            agreed = link.agree(line, deadline)
            go = agreed["go"]
            offers.keep(self._slots, offers.count_in(agreed))
            if backend == "gloo":
                left = max(0.001, deadline - time.monotonic())
                store = gloo.reach_store(host, int(go), key, left)
                address = gloo.address_of(line.connection)
                joined = gloo.Gloo(store, mine, world, address, left, check)
            elif puller is None or go != peer.GO:  # the trainer has the last word
                if puller is not None:
                    puller.close()
                joined = nccl.Nccl(bytes.fromhex(go), mine, world, device, deadline, check)
            assert joined is not None
            line.say(there=mine)
        except BaseException as e:
            with contextlib.suppress(ConflictError):  # it knows
                line.say(failed=f"{type(e).__name__}: {e}")
            if joined is not None:
                joined.close()
            line.close()
            self._slots.clear()
            raise
        # The memory may have been another tensor's, which something on this stream still uses.
        self._ahead = Ahead(line, joined, self._slots, _reached(self._device), timeout)

    def _about(self, backend: str, pulls: peer.Puller | str) -> dict[str, object]:
        """Return what the trainer is told, to choose what carries the bytes."""
        about: dict[str, object] = {"slots": len(self._slots), "soon": True}
        if backend == "gloo":
            return about
        if isinstance(pulls, str):
            return about | nccl.about(self._device) | {"peer": pulls}
        with contextlib.suppress(CarrierError):  # it needs no NCCL
            about |= nccl.about(self._device)
        return about | {"peer": True}

    def bucket(self, slot: int, nbytes: int, *, here: bool = True) -> torch.Tensor:
        """Wait for the bucket, which may be there; or have the current stream do it."""
        ahead = self._open()
        offers.part(self._slots, slot, nbytes)  # not held: an error would keep it
        with self._or_ends():
            done = ahead.take(slot, nbytes, here=here)
        if done is not None:
            _wait_on_device(self._device, done)
        self._read.append(slot)
        return offers.part(self._slots, slot, nbytes)

    def arrived(self) -> None:
        """Wait for what was on its way."""
        ahead = self._open()
        with self._or_ends():
            ahead.arrived()

    def loaded(self) -> None:
        """Let the slots be written again, after what was launched until now."""
        if self._ahead is not None:
            for slot in self._read:
                self._ahead.free(slot, _reached(self._device))
        self._read.clear()

    def close(self) -> None:
        """Leave the group and give the slots back."""
        self._end(None)

    def _open(self) -> Ahead:
        if self._ahead is None:
            raise ConflictError("the group has ended: connect anew")
        return self._ahead

    @contextlib.contextmanager
    def _or_ends(self) -> Iterator[None]:
        try:
            yield
        except BaseException as e:
            self._end(e)
            raise

    def _end(self, error: BaseException | None) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close(error)
        self._slots.clear()


def _reached(device: torch.device) -> Any:
    """Return an event of what was launched on the current stream until now; None on a CPU."""
    if device.type == "cpu":
        return None
    cuda: Any = torch.cuda
    event = cuda.Event()
    event.record(cuda.current_stream(device))
    return event


def _wait_on_device(device: torch.device, event: Any) -> None:
    """Have what is launched on the current stream from now on come after the event."""
    cuda: Any = torch.cuda
    cuda.current_stream(device).wait_event(event)
