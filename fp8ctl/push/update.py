"""One update, from the first tensor to the last server's answer; or nothing of it.

The same steps for a sync and an async source. Asynchronously, what blocks (kernels, waiting
for servers) is done by one thread, so that the event loop goes on; a cancellation ends what
waits there before anything else happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fp8ctl.errors import Fp8ctlError
from fp8ctl.push.buckets import Filler
from fp8ctl.push.delivery import ByCarrier, Clock
from fp8ctl.push.fleet import Fleet, answers
from fp8ctl.push.result import Update
from fp8ctl.stream import placed_weights, tied_head
from fp8ctl.wire import ALIGN, Begin

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from fp8ctl.manifest import Plan
    from fp8ctl.push.client import Server
    from fp8ctl.push.delivery import Delivery
    from fp8ctl.push.link import Link
    from fp8ctl.push.result import Progress
    from fp8ctl.stream import Ranks
    from fp8ctl.wire import InFlight

    Named = tuple[str, torch.Tensor]
    T = TypeVar("T")

#: Seconds without a word after which a server takes the trainer for dead.
LEASE = 120.0


@dataclass(frozen=True)
class Wish:
    """What is the same in all updates of a rollout; see `rollout.Rollout`."""

    plan: Plan | None
    manifest: str
    bucket_bytes: int
    in_flight: InFlight
    delta: bool
    verify: bool
    timeout: float
    dtype: torch.dtype | None


class Work:
    """An update on its way."""

    def __init__(
        self,
        wish: Wish,
        servers: Sequence[Server],
        link: Link,
        version: str,
        *,
        complete: bool,
        ranks: Ranks | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._wish, self._link, self._version = wish, link, version
        self._complete, self._ranks = complete, ranks
        self.push = uuid.uuid4().hex
        self._clock = Clock()
        self._fleet = Fleet(servers)
        self._begun: list[Future[dict[str, Any]]] = []
        self._told: list[dict[str, Any]] = []
        self._courier: ByCarrier | None = None
        self._stopped = False
        plan = wish.plan
        self._largest, totals = _sizes(plan)
        self._filler = Filler(
            self._slot_bytes(totals),
            self._deliver_by,
            lambda: link.device,
            self._clock,
            digest=wish.verify,
            held=self._held if wish.delta else None,
            tie=None if plan is None else tied_head(plan),
            on_progress=on_progress,
            totals=totals,
        )

    # ---- two ways through it ----

    def run(self, named_tensors: Iterable[Named]) -> Update:
        """Do it, from a sync source."""
        try:
            with self._stream(named_tensors) as stream:
                self._open(named_tensors)
                for pair in stream:
                    self._filler.add([pair])
            return self._finish()
        except BaseException as e:
            self._give_up(e)
            raise
        finally:
            self._close()

    async def arun(self, named_tensors: Iterable[Named] | AsyncIterable[Named]) -> Update:
        """Do it, from a source of either kind."""
        thread = _Thread(self._stop)
        self._filler.in_thread = lambda work: thread.do(lambda: self._added(work))  # type: ignore[method-assign]
        try:
            async with self._stream(named_tensors) as stream:
                await thread.do(lambda: self._open(named_tensors))
                async for _ in stream:
                    pass
            return await thread.do(self._finish)
        except BaseException as e:
            error = e
            await thread.do_at_last(lambda: self._give_up(error))
            raise
        finally:
            cancelled = await thread.do_at_last(self._close)
            thread.close()
            if cancelled:
                raise asyncio.CancelledError

    def _added(self, work: Callable[[], list[Named]]) -> list[Named]:
        self._filler.add(work())
        return []

    # ---- its steps ----

    def _stream(self, named_tensors: Any) -> Any:
        wish = self._wish
        return placed_weights(
            named_tensors,
            wish.plan,
            self._filler,
            dtype=wish.dtype,
            complete=self._complete,
            ranks=self._ranks,
        )

    def _open(self, named_tensors: object) -> None:
        """Find every server able to take this, before the source is asked for anything."""
        if self._wish.plan is None and isinstance(named_tensors, Collection):
            self._largest = max((t.numel() * t.element_size() for _, t in named_tensors), default=0)
        self._link.open(self._fleet, max(self._filler.limit, self._largest))

    def _deliver_by(self, nbytes: int) -> Delivery:
        """Return what takes the buckets; the servers begin while the first is written."""
        self._link.open(self._fleet, max(nbytes, self._filler.limit))
        self._begin()
        self._courier = ByCarrier(self._link, self._fleet, self.push, self._wait_begun, self._clock)
        return self._courier

    def _begin(self) -> None:
        wish = self._wish

        def one(i: int, server: Server) -> dict[str, Any]:
            return server.begin(begins[i])

        begins = [
            Begin(
                push=self.push,
                connection=connection,
                version=self._version,
                manifest=wish.manifest,
                in_flight=wish.in_flight,
                within=wish.timeout,
                lease=LEASE,
                complete=self._complete,
                digests=wish.delta,
            )
            for connection in self._link.connections
        ]
        self._begun = self._fleet.start(one)
        numbers = {server: i for i, server in enumerate(self._fleet.servers)}
        self._fleet.keep_alive(lambda server: one(numbers[server], server), LEASE / 4)

    def _wait_begun(self) -> list[dict[str, Any]]:
        if not self._told:
            self._told = answers(self._begun)
        return self._told

    def _held(self) -> list[Mapping[str, str]]:
        """Return the digests of what each server holds; empty where all must be sent."""
        with self._clock.stage("wait"):
            return [told.get("digests") or {} for told in self._wait_begun()]

    def _finish(self) -> Update:
        """Have all servers serve the new weights, when all have all of them."""
        filler, fleet = self._filler, self._fleet
        filler.finish()
        if not self._begun:
            self._deliver_by(0)  # an update of nothing
        self._wait_begun()
        with self._clock.stage("end"):
            ended = self._ended()
        courier = self._courier
        verified = [one["verified"] for one in ended if one.get("verified") is not None]
        return (
            Update(
                version=self._version,
                push=self.push,
                servers=tuple(server.url for server in fleet.servers),
                buckets=filler.buckets,
                sent=filler.sent,
                skipped=len(filler.skipped),
                bytes_sent=filler.bytes_sent,
                bytes_skipped=filler.bytes_skipped,
                stages=self._clock.seconds(),
                loading={
                    server.url: {k: float(v) for k, v in dict(one.get("seconds") or {}).items()}
                    for server, one in zip(fleet.servers, ended, strict=True)
                },
                verified=min(verified) if len(verified) == len(ended) else None,
            )
            if courier is not None
            else Update(self._version)
        )

    def _ended(self) -> list[dict[str, Any]]:
        filler, wish = self._filler, self._wish
        futures = self._fleet.start(
            lambda _, server: server.end(self.push, filler.buckets, filler.skipped, wish.verify)
        )
        try:
            return answers(futures)
        except Fp8ctlError as e:
            done = [
                server.url
                for server, future in zip(self._fleet.servers, futures, strict=True)
                if future.done() and not future.cancelled() and future.exception() is None
            ]
            if done:
                e.data["applied"] = done
                e.message += f"; {', '.join(done)} serve version {self._version} already"
                e.args = (e.message,)
            raise

    # ---- when it fails ----

    def _stop(self) -> None:
        """End what waits, from another thread."""
        self._stopped = True
        for server in self._fleet.servers:
            server.cut()
        if self._courier is not None:
            self._courier.cancel("the update was cancelled")

    def _give_up(self, error: BaseException) -> None:
        """Tell all servers that nothing comes of it."""
        reason = f"{type(error).__name__}: {error}"
        if self._courier is not None:
            self._courier.cancel(reason)
        begun = self._begun
        lost = self._fleet.give_up(
            lambda server: server.abort(self.push, reason) if begun else None
        )
        if isinstance(error, Fp8ctlError) and lost:
            error.data["not told"] = lost

    def _close(self) -> None:
        self._fleet.close()
        if self._courier is not None:
            self._courier.close()
        sender = self._link.sender
        if sender is not None and not sender.alive:
            self._link.drop()

    def _slot_bytes(self, totals: tuple[int, int] | None) -> int:
        """Return the size of a bucket: as asked, at most all, at least the largest tensor."""
        if totals is None:
            return self._wish.bucket_bytes
        tensors, nbytes = totals
        return max(self._largest, min(self._wish.bucket_bytes, nbytes + tensors * ALIGN))


class _Thread:
    """The one thread in which an asynchronous update blocks."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._pool = ThreadPoolExecutor(1, "fp8ctl-push")
        cuda: Any = torch.cuda
        # What the caller queued on its stream comes first.
        self._stream = cuda.current_stream() if cuda.is_initialized() else None

    async def do(self, work: Callable[[], T]) -> T:
        """Do something there; when cancelled, first end it."""
        future = self._start(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._stop()
            await _end_of(future)
            raise

    async def do_at_last(self, work: Callable[[], None]) -> bool:
        """Do what has to be done, cancelled or not; say whether that was asked meanwhile."""
        future = self._start(work)
        cancelled = await _end_of(future)
        future.result()
        return cancelled

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True)

    def _start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        def there() -> T:
            with (
                contextlib.nullcontext()
                if self._stream is None
                else torch.cuda.stream(self._stream)
            ):
                return work()

        return asyncio.get_running_loop().run_in_executor(self._pool, there)


async def _end_of(future: asyncio.Future[Any]) -> bool:
    """Wait until something has ended, whatever is asked meanwhile; say whether one was."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    if not future.cancelled():
        future.exception()
    return cancelled


def _sizes(plan: Plan | None) -> tuple[int, tuple[int, int] | None]:
    """Return what the largest tensor of a plan needs with its scales, and tensors and bytes."""
    if plan is None:
        return 0, None
    largest = tensors = 0
    for tensor in plan.tensors:
        nbytes = plan.bytes_of(tensor)
        tensors += 2 if tensor.quantize else 1
        largest = max(largest, -(-nbytes // ALIGN) * ALIGN + ALIGN)
    return largest, (tensors, plan.bytes_after)
