"""Begin, end and abort of an update, at all servers."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any

from fp8ctl.errors import AbortedError, Fp8ctlError
from fp8ctl.push.fleet import answers
from fp8ctl.wire import Begin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from fp8ctl.push.client import Server
    from fp8ctl.push.fleet import Fleet
    from fp8ctl.push.folder import ByFolder
    from fp8ctl.push.link import Link
    from fp8ctl.push.update import Wish

#: Seconds without a word after which a server takes the trainer for dead.
LEASE = 120.0


class Session:
    """One update as the servers have it."""

    def __init__(
        self, fleet: Fleet, link: Link, push: str, version: str, wish: Wish, *, complete: bool
    ) -> None:
        self._fleet, self._link = fleet, link
        self._push, self._version, self._wish = push, version, wish
        self._complete = complete
        self._asked: list[Future[dict[str, Any]]] = []
        self._told: list[dict[str, Any]] = []
        self._ending: list[Future[dict[str, Any]]] = []

    def begin(self) -> None:
        """Ask all servers to begin, once, and keep them from giving up; returns at once."""
        if self._asked:
            return
        numbers = {server: i for i, server in enumerate(self._fleet.servers)}
        self._asked = self._fleet.start(self._begin_first)
        self._fleet.keep_alive(lambda server: self._begin_one(numbers[server], server), LEASE / 4)

    def begun(self) -> list[dict[str, Any]]:
        """Have all begin, and wait until they have; return what each answered."""
        if not self._told:
            self.begin()
            try:
                self._told = answers(self._asked)
            except Fp8ctlError as e:
                if e.data.get("reply") != "FP8-CONNECTION" or self._link.kind == "group":
                    raise
                self._told = self._begun_anew()
        return self._told

    def load_folder(self, folder: ByFolder) -> int:
        """Have all servers load a folder; return how many buckets that is."""
        self.begun()
        path, entries = str(folder.path), folder.entries
        if not entries:
            return 0
        answers(self._fleet.start(lambda _, server: server.folder(self._push, path, entries)))
        return 1

    def end(self, buckets: int, skipped: Sequence[str], failed: Callable[[], bool]) -> None:
        """Ask all servers to have the update take force; returns before they have.

        Args:
            buckets: that were asked for; the last may be on its way.
            skipped: names that the servers hold already.
            failed: says, in any thread, whether one is known to have failed.
        """
        self.begun()
        verify = self._wish.verify

        def one(_: int, server: Server) -> dict[str, Any]:
            # A server may have taken a bucket whose answer was lost: it must not serve what is
            # given up here.
            if failed():
                raise AbortedError(f"{server.url} did not take all buckets")
            return server.end(self._push, buckets, skipped, verify)

        # As the bucket that would be next: beside the last, and behind the one before that.
        self._ending = self._fleet.start(one, beside=bool(buckets % 2))

    def ended(self) -> list[dict[str, Any]]:
        """Wait until the update has taken force; return what each server answered.

        Raises:
            Fp8ctlError: a server could not; the message says which others serve it already.
        """
        try:
            return answers(self._ending)
        except Fp8ctlError as e:
            done = [
                server.url
                for server, future in zip(self._fleet.servers, self._ending, strict=True)
                if future.exception() is None  # it waits, so that the message is true
            ]
            self._say_applied(e, done)
            raise

    def abort(self, reason: str, error: BaseException) -> None:
        """End what is under way.

        Args:
            reason: why, for the servers.
            error: gets, in its data, who could not be told, and who serves the update all the same:
                one may have ended it, and nobody have heard.
        """
        begun, applied = bool(self._asked), list[str]()
        if begun:
            self._link.served = None

        def one(server: Server) -> None:
            if begun and server.abort(self._push, reason).get("outcome") == "applied":
                applied.append(server.url)

        lost = self._fleet.give_up(one)
        if isinstance(error, Fp8ctlError):
            if lost:
                error.data["not told"] = lost
            if "applied" not in error.data:
                self._say_applied(error, applied)

    def _say_applied(self, error: Fp8ctlError, urls: list[str]) -> None:
        if urls:
            error.data["applied"] = urls
            error.message += f"; {', '.join(urls)} serve version {self._version} already"
            error.args = (error.message,)

    def _begin_first(self, i: int, server: Server) -> dict[str, Any]:
        if self._link.kind == "group":
            # Of another host, perhaps, which may be gone without a word: BEGIN itself may take as
            # long as requests in flight do.
            server.state()
        return self._begin_one(i, server)

    def _begin_one(self, i: int, server: Server) -> dict[str, Any]:
        wish = self._wish
        begin = Begin(
            push=self._push,
            connection=self._link.connections[i],
            version=self._version,
            manifest=wish.manifest,
            in_flight=wish.in_flight,
            within=wish.timeout,
            lease=LEASE,
            complete=self._complete,
            digests=wish.delta,
        )
        return server.begin(begin)

    def _begun_anew(self) -> list[dict[str, Any]]:
        """Connect servers again that were started anew since, or that met another client."""
        concurrent.futures.wait(self._asked)
        lost = []
        for i, future in enumerate(self._asked):
            error = future.exception()
            if error is None:
                continue
            if not isinstance(error, Fp8ctlError) or error.data.get("reply") != "FP8-CONNECTION":
                raise error
            lost.append(i)
        self._link.connect(self._fleet, lost)
        return answers(self._fleet.start(self._begin_one))
