"""Broadcasts between processes on CPUs, by torch's gloo, apart from any default group."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers.link import listen
from fp8ctl.carriers.sent import Launched
from fp8ctl.errors import ConflictError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


_distributed: Any = torch.distributed
#: Seconds between two looks whether a group is still wanted that is being made.
_LOOK = 0.05


def open_store(host: str, key: str, timeout: float) -> tuple[Any, int]:
    """Return a store for the ranks to find each other, in this process, and its port.

    It listens on this address alone; torch's own choice would be all of them.
    """
    listener = listen(host)
    port: int = listener.getsockname()[1]
    listener.setblocking(True)
    store = _distributed.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout),
        master_listen_fd=listener.detach(),  # the store closes it
        use_libuv=False,  # in torch 2.7 that one takes no socket
    )
    return _distributed.PrefixStore(key, store), port


def reach_store(host: str, port: int, key: str, timeout: float) -> Any:
    """Return the trainer's store, in a rank."""
    store = _distributed.TCPStore(
        host,
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout),
    )
    return _distributed.PrefixStore(key, store)


class Gloo:
    """One rank of a group; rank 0 is who gives.

    Making it waits for all other ranks.
    """

    pulled = False

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        address: str,
        timeout: float,
        check: Callable[[], None],
    ) -> None:
        """Meet the others.

        Args:
            store: where they find each other.
            rank, world: of this process, and how many there are.
            address: of this host.
            timeout: seconds.
            check: is asked while they are waited for; what it raises ends that.
        """
        made = _distributed.ProcessGroupGloo
        options = made._Options()
        # By its address: a host's name may resolve to one that the others do not reach.
        options._devices = [made.create_device(hostname=address)]
        options._timeout = datetime.timedelta(seconds=timeout)
        options._threads = 1
        meeting: Future[Any] = Future()

        def meet() -> None:
            try:
                meeting.set_result(made(store, rank, world, options))
            except BaseException as e:  # noqa: BLE001 - it is raised below, if anybody waits
                meeting.set_exception(e)

        # Gloo listens to nobody meanwhile: who gives up leaves it to its time-out.
        threading.Thread(target=meet, name="fp8ctl-gloo", daemon=True).start()
        while not meeting.done():
            with contextlib.suppress(concurrent.futures.TimeoutError):
                meeting.exception(_LOOK)
            check()
        try:
            self._group: Any = meeting.result()
        except RuntimeError as e:
            raise ConflictError(f"gloo: {_first_line(e)}") from e

    def broadcast(
        self,
        tensor: torch.Tensor,
        _after: Any,
        deadline: float,
        check: Callable[[], None],
    ) -> Launched:
        """Give the tensor, or get it, all of it; gone peers end that.

        A CPU has done what comes before.

        Raises:
            TimeoutError: it took too long.
            ConflictError: a peer is gone.
        """
        check()
        options = _distributed.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = datetime.timedelta(seconds=max(0.001, deadline - time.monotonic()))
        try:
            self._group.broadcast([tensor], options).wait()
        except RuntimeError as e:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"gloo: {_first_line(e)}") from e
            raise ConflictError(f"gloo: {_first_line(e)}") from e
        return Launched(_over)

    def warm(self) -> None:
        """Do nothing: a CPU is."""

    def close(self) -> None:
        """End the group's threads and connections."""
        self._group = None


def address_of(connection: socket.socket) -> str:
    """Return the address by which this host reaches the other end."""
    address: str = connection.getsockname()[0]
    return address


def _over() -> bool:
    return True


def _first_line(e: BaseException) -> str:
    return str(e).strip().splitlines()[0]
