"""All servers of a rollout as one: two threads each, and the first failure is everyone's."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fp8ctl.errors import AbortedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fp8ctl.push.client import Server

    T = TypeVar("T")


class Fleet:
    """The servers, while an update runs.

    What is asked of one server is asked in order, but for every other bucket, which is asked beside
    the one before, as END is beside the last; servers do not wait for each other.

    Attributes:
        servers: in the order in which they were given.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = tuple(servers)
        self._pools, self._beside = (
            [
                ThreadPoolExecutor(1, thread_name_prefix=f"fp8ctl-push-{i}{which}")
                for i in range(len(servers))
            ]
            for which in ("", "-beside")
        )
        #: Of each server, what was asked last of either thread.
        self._last: list[dict[bool, Future[Any]]] = [{} for _ in servers]
        self._hearts: list[Heart] = []

    def start(
        self,
        ask: Callable[[int, Server], T],
        those: Iterable[int] | None = None,
        *,
        beside: bool = False,
    ) -> list[Future[T]]:
        """Ask every server something, or some by their numbers; returns at once.

        Args:
            ask: is given a server and its number.
            those: their numbers; None for all.
            beside: at the same time as what was asked before without this.
        """
        pools = self._beside if beside else self._pools
        futures = []
        for i in range(len(self.servers)) if those is None else those:
            future = pools[i].submit(ask, i, self.servers[i])
            self._last[i][beside] = future
            futures.append(future)
        return futures

    def all(self, ask: Callable[[int, Server], T]) -> list[T]:
        """Ask every server something and wait for the answers."""
        return answers(self.start(ask))

    def idle(self, ask: Callable[[Server], object]) -> None:
        """Ask something of the servers that have nothing to do; answers are not looked at."""
        for last, pool, server in zip(self._last, self._pools, self.servers, strict=True):
            if last and all(future.done() for future in last.values()):
                last[False] = pool.submit(_quietly, ask, server)

    def keep_alive(self, ask: Callable[[Server], object], every: float) -> None:
        """Ask this of idle servers again and again, until the update ends."""
        self._hearts.append(Heart(lambda: self.idle(ask), every))

    def give_up(self, ask: Callable[[Server], object]) -> list[str]:
        """End what is under way, then ask every server this once; never raises for a server.

        Returns:
            What went wrong, in words, for each server where something did.
        """
        self.rest()
        for server in self.servers:
            server.cut()
        for pool in (*self._pools, *self._beside):
            pool.shutdown(wait=True, cancel_futures=True)
        failed: list[str] = []

        def one(server: Server) -> None:
            try:
                server.mend()
                ask(server)
            except Exception as e:  # noqa: BLE001 - the update's own error is what is raised
                failed.append(f"{server.url}: {e}")

        threads = [threading.Thread(target=one, args=(server,)) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return failed

    def close(self) -> None:
        """End the threads; connections stay for the next update, and no thread uses one then."""
        self.rest()
        for last, *pools in zip(self._last, self._pools, self._beside, strict=True):
            # A sign of life may be on its way; for what was given up `wait` waits for ever.
            concurrent.futures.wait([future for future in last.values() if not future.done()])
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)
        for server in self.servers:
            if server.is_cut:
                server.mend()

    def rest(self) -> None:
        """End the signs of life; what is asked from here on is one itself, while it is answered."""
        while self._hearts:
            self._hearts.pop().stop()


class Heart:
    """Does something every so many seconds, in a thread."""

    def __init__(self, beat: Callable[[], None], every: float) -> None:
        self._beat, self._every = beat, every
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fp8ctl-push-heart", daemon=True)
        self._thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """End it, and wait for that, unless what it does may take long."""
        self._stopped.set()
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            self._beat()


def answers(futures: Sequence[Future[T]]) -> list[T]:
    """Wait for all answers, or for the first failure, which is raised.

    One that was given up because of another failure is not the one to tell.
    """
    done, _ = concurrent.futures.wait(futures, return_when=FIRST_EXCEPTION)
    errors = [e for f in futures if f in done and (e := f.exception()) is not None]
    for error in errors:
        if not isinstance(error, AbortedError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def _quietly(ask: Callable[[Server], object], server: Server) -> None:
    with contextlib.suppress(Exception):  # the next request to this server tells it
        ask(server)
