"""Buckets by a broadcast: a trainer and all ranks of all servers, over NCCL or gloo.

The trainer is rank 0 and holds a connection to each rank (`link`). A broadcast begins when
every rank has asked for the bucket, so that nobody is left in one that another never enters,
and who is missing has a name. After a failure the group is ended, and made anew.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8ctl.carriers import gloo, link, nccl, offers
from fp8ctl.errors import CarrierError, ConflictError
from fp8ctl.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8ctl.wire import Kind


_LATER = 5.0


class _Backend(Protocol):
    def broadcast(
        self, tensor: torch.Tensor, deadline: float, check: Callable[[], None]
    ) -> None: ...

    def close(self) -> None: ...


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
        self._backend_name = "nccl" if device.type == "cuda" else "gloo"
        self._first = [1 + sum(ranks[:i]) for i in range(len(ranks))]
        self._world = 1 + sum(ranks)
        self._nbytes = [nbytes] * slots
        self._slots = offers.allocate(self._nbytes, device)
        self._backend: _Backend | None = None
        # One thread at a time joins or sends; `cancel` reaches it through the hub.
        self._busy = threading.Lock()
        names = [
            f"rank {rank} of server {server}"
            for server, count in enumerate(ranks)
            for rank in range(count)
        ]
        self._hub = link.Hub(host, names)

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
            "slots": [{"nbytes": nbytes} for nbytes in self._nbytes],
        }

    def join(self) -> None:
        """Wait for all ranks, then open the group."""
        deadline = time.monotonic() + self._timeout
        with self._busy:
            try:
                self._hub.check()
                told = self._hub.gather(deadline)
                self._backend = self._open(told, deadline)
                self._hub.collect(deadline)
            except BaseException as e:
                self._break(str(e))
                raise

    def _open(self, told: Mapping[int, link.Message], deadline: float) -> _Backend:
        if self._backend_name == "gloo":
            store, port = gloo.open_store(self._host, self._hub.key, self._timeout)
            self._hub.tell(go=port)
            left = max(0.001, deadline - time.monotonic())
            return gloo.Gloo(store, 0, self._world, self._host, left, self._hub.check)
        ours = nccl.about(self._device)
        for rank, message in told.items():
            nccl.refuse_unlike(ours, message, self._hub.name(rank))
        unique = nccl.unique_id()
        self._hub.tell(go=unique.hex())
        return nccl.Nccl(unique, 0, self._world, self._device, deadline, self._hub.check)

    def buffer(self, slot: int) -> torch.Tensor:
        """Return the slot."""
        return self._slots[slot]

    def ready(self, slot: int) -> None:
        """Wait until the device has written."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def send(self, slot: int, nbytes: int) -> None:
        """Wait until every rank asks for the bucket, give it, wait until every rank has it."""
        deadline = time.monotonic() + self._timeout
        with self._busy:
            if self._backend is None:
                raise ConflictError("the group is not there: it was not joined, or has ended")
            try:
                self._hub.check()
                asked = self._hub.collect(deadline)
                for rank, message in asked.items():
                    if message.get("take") != [slot, nbytes]:
                        raise ConflictError(
                            f"{self._hub.name(rank)} asks for {message.get('take')},"
                            f" not for slot {slot} with {nbytes} bytes"
                        )
                self._hub.tell(go=slot)
                self._give(slot, nbytes, deadline)
                self._hub.collect(deadline)
            except BaseException as e:
                self._break(str(e))
                raise

    def _give(self, slot: int, nbytes: int, deadline: float) -> None:
        assert self._backend is not None
        try:
            self._backend.broadcast(self._slots[slot][:nbytes], deadline, self._hub.check)
        except (TimeoutError, ConflictError) as e:
            # The transport names addresses at best. Who has not said that it has the bucket?
            try:
                self._hub.collect(time.monotonic() + 1.0)
            except (TimeoutError, ConflictError) as who:
                raise type(e)(f"{e}; {who}") from e
            raise

    def cancel(self, why: str) -> None:
        """End the group; what waits in another thread raises."""
        self.alive = False
        self._hub.cancel(why)

    def close(self) -> None:
        """Leave the group, close every connection and give the slots back."""
        self.cancel("the trainer has closed the group")
        with self._busy:
            self._break("")
            self._slots.clear()

    def _break(self, why: str) -> None:
        self.alive = False
        # The ranks first: who waits in the same broadcast is told why.
        self._hub.close(why)
        if self._backend is not None:
            self._backend.close()
        self._backend = None


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
        self._timeout = offers.take(offer, "timeout", float)
        self._device = device
        self._backend: _Backend | None = None
        self._slots = offers.allocate([one["nbytes"] for one in offers.slots_of(offer)], device)
        mine = offers.take(offer, "first_rank", int) + rank
        deadline = time.monotonic() + self._timeout
        host, key = offers.take(offer, "host", str), offers.take(offer, "key", str)
        self._line = link.join(
            host,
            offers.take(offer, "port", int),
            key,
            mine,
            nccl.about(device) if backend == "nccl" else {},
            deadline,
        )
        world = offers.take(offer, "world", int)
        try:
            go = link.agree(self._line, deadline)["go"]
            if backend == "gloo":
                left = max(0.001, deadline - time.monotonic())
                store = gloo.reach_store(host, int(go), key, left)
                address = gloo.address_of(self._line.connection)
                self._backend = gloo.Gloo(store, mine, world, address, left, self._check)
            else:
                unique = bytes.fromhex(go)
                self._backend = nccl.Nccl(unique, mine, world, device, deadline, self._check)
            self._line.say(there=mine)
        except BaseException as e:
            self._fail(e)
            raise

    def bucket(self, slot: int, nbytes: int) -> torch.Tensor:
        """Ask for the bucket and wait for it."""
        part = offers.part(self._slots, slot, nbytes)
        if self._backend is None:
            raise ConflictError("the group has ended: connect anew")
        deadline = time.monotonic() + self._timeout
        try:
            self._line.say(take=[slot, nbytes])
            link.agree(self._line, deadline)
            self._backend.broadcast(part, deadline, self._check)
            self._line.say(got=slot)
        except BaseException as e:
            self._fail(e)
            raise
        return part

    def _check(self) -> None:
        """Raise where the trainer is gone, or has ended the group; nothing else is due."""
        message = self._line.heard()
        if message is not None:
            raise ConflictError(f"the trainer says: {message.get('no', message)}")

    def _fail(self, error: BaseException) -> None:
        with contextlib.suppress(ConflictError):  # it knows
            self._line.say(failed=f"{type(error).__name__}: {error}")
        self.close()

    def close(self) -> None:
        """Leave the group and give the slots back."""
        self._line.close()
        if self._backend is not None:
            self._backend.close()
        self._backend = None
        self._slots.clear()
