"""One update, from the first tensor to the last server's answer; or nothing of it.

The same steps for a sync and an async source. Asynchronously, what blocks (kernels, waiting
for servers) is done aside; a cancellation ends what waits there before anything else happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import forms
from fp8ctl.push.aside import Aside
from fp8ctl.push.buckets import Filler
from fp8ctl.push.company import Company
from fp8ctl.push.delivery import ByCarrier, Clock
from fp8ctl.push.fleet import Fleet
from fp8ctl.push.folder import ByFolder
from fp8ctl.push.link import Served
from fp8ctl.push.recorder import Recorder
from fp8ctl.push.result import Update
from fp8ctl.push.session import Session
from fp8ctl.push.warm import warm
from fp8ctl.stream import placed_weights
from fp8ctl.wire import ALIGN

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from fp8ctl.errors import Fp8ctlError
    from fp8ctl.forms import Form
    from fp8ctl.manifest import Plan
    from fp8ctl.push.client import Server
    from fp8ctl.push.delivery import Delivery
    from fp8ctl.push.link import Link
    from fp8ctl.push.result import Progress
    from fp8ctl.ranks import Ranks
    from fp8ctl.stream import Stream
    from fp8ctl.wire import InFlight

    Named = tuple[str, torch.Tensor]


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
    record: Path | None
    folder: Path | None

    @functools.cached_property
    def sizes(self) -> tuple[int, tuple[int, int] | None]:
        """What the plan's largest tensor needs with its scales, and tensors and bytes of all."""
        return _sizes(self.plan)

    @functools.cached_property
    def form(self) -> Form:
        """What becomes of 16-bit weights."""
        return forms.of_push(self.plan, self.dtype)

    @functools.cached_property
    def made(self) -> Form:
        """What becomes of weights that are in the plan's FP8 form already."""
        return self.form if self.plan is None else forms.of_made(self.plan)

    @functools.cached_property
    def tie(self) -> tuple[str, str] | None:
        """Names of an output head that may come and is not sent, and of its embedding."""
        return None if self.plan is None else forms.tied_head(self.plan)


class Work:
    """An update on its way.

    Attributes:
        push: its own name.
    """

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
        quantized: bool = False,
    ) -> None:
        self.push = uuid.uuid4().hex
        self._wish, self._link, self._version = wish, link, version
        self._complete, self._ranks, self._quantized = complete, ranks, quantized
        self._company = Company(ranks, self.push, wish.timeout)
        self._clock = Clock()
        self._fleet = Fleet(servers)
        self._session = Session(self._fleet, link, self.push, version, wish, complete=complete)
        self._delivery: Delivery | None = None
        self._recorder: Recorder | None = None
        self._read: Stream | None = None
        largest, totals = wish.sizes
        if totals is None:
            self._slot = wish.bucket_bytes
        else:
            # As asked; no more than all of it, no less than the largest tensor.
            self._slot = max(largest, min(wish.bucket_bytes, totals[1] + totals[0] * ALIGN))
        self._filler = Filler(
            self._slot,
            wish.timeout,
            self._deliver_by,
            lambda: link.device,
            self._clock,
            digest=wish.verify or wish.record is not None,
            course=link.course,
            held=self._held if wish.delta else None,
            tie=wish.tie,
            facts=self._facts if wish.record is not None else None,
            note=self._note if wish.record is not None else None,
            on_progress=on_progress,
            totals=totals,
            made=quantized,
        )

    # ---- two ways through it ----

    def run(self, named_tensors: Iterable[Named]) -> Update:
        """Do it, from a sync source."""
        try:
            with self._stream(named_tensors) as stream:
                self._prepare(named_tensors)
                for _ in stream:
                    pass  # the filler takes them
            return self._conclude()
        except BaseException as e:
            self._give_up(e)
            raise
        finally:
            self._close()

    async def arun(self, named_tensors: Iterable[Named] | AsyncIterable[Named]) -> Update:
        """Do it, from a source of either kind."""
        aside = Aside(self._stop)
        self._filler.aside = aside
        try:
            async with self._stream(named_tensors) as stream:
                await aside.do(lambda: self._prepare(named_tensors))
                async for _ in stream:
                    pass  # aside
            return await aside.do(self._conclude)
        except BaseException as e:
            error = e
            await aside.do_at_last(lambda: self._give_up(error))
            raise
        finally:
            try:
                cancelled = await aside.do_at_last(self._close)
            finally:
                aside.close()
            if cancelled:
                raise asyncio.CancelledError

    # ---- its steps ----

    def _stream(self, named_tensors: Any) -> Stream:
        wish = self._wish
        self._read = placed_weights(
            named_tensors,
            wish.made if self._quantized else wish.form,
            self._filler,
            complete=self._complete,
            ranks=self._ranks,
            leaving=self._company.call_off,
        )
        return self._read

    def _prepare(self, named_tensors: object) -> None:
        """Find every server able to take this, before the source is asked for anything."""
        company = self._company
        if not company.gives:
            company.follow()
            return
        try:
            if self._wish.plan is None and isinstance(named_tensors, Collection):
                # What is no pair of a name and a tensor, the stream refuses.
                pairs = (one for one in named_tensors if isinstance(one, tuple) and len(one) == 2)
                tensors = (t for _, t in pairs if isinstance(t, torch.Tensor))
                sizes = (t.numel() * t.element_size() + ALIGN for t in tensors)
                self._slot = max([self._slot, *sizes])
            self._link.look(self._fleet)
            self._link.open(self._fleet, self._slot, self._warm)
            if self._wish.record is not None:
                self._recorder = Recorder(
                    self._wish.record, self._wish.plan, self._version, self.push, self._before
                )
        except BaseException as e:
            company.unable(e)
            raise
        company.begin(self._stop)

    def _warm(self) -> None:
        """Compile kernels, where there are any to compile; what is wrong shows when they run."""
        plan, device = self._wish.plan, self._link.device
        if plan is not None and device.type == "cuda":
            with contextlib.suppress(Exception):
                warm(plan, self._wish.dtype, device)

    def _deliver_by(self, nbytes: int) -> Delivery:
        """Return what takes the buckets; it has the servers begin while the first is written."""
        link, wish = self._link, self._wish
        self._slot = max(self._slot, nbytes)
        if link.kind == "disk":
            self._delivery = ByFolder(wish.folder, wish.plan, self._slot, link.device, self._clock)
        else:
            link.open(self._fleet, self._slot)
            self._delivery = ByCarrier(link, self._fleet, self.push, self._session, self._clock)
        return self._delivery

    def _conclude(self) -> Update:
        """Have all servers serve the new weights, when all have all of them."""
        company = self._company
        company.conclude()
        if not company.gives:
            company.hear()
            self._link.course = self._filler.course
            return Update(self._version)
        try:
            done = self._finish()
        except BaseException as e:
            company.tell(e)
            raise
        company.tell()
        return done

    def _finish(self) -> Update:
        filler = self._filler
        filler.finish()
        delivery = self._delivery or self._deliver_by(0)  # an update may be of nothing
        if isinstance(delivery, ByCarrier) and len(self._fleet.servers) == 1:
            # The one server need not wait for a request when it has its last bucket. Of several
            # none is asked before all have all: one that has ended serves the new weights, and
            # another may still fail to load them.
            filler.tell()  # what raises there is in time to end it
            self._end(delivery)
            delivery.drain()  # why a bucket failed comes before what its end makes of that
        else:
            delivery.drain()
            filler.tell()
            self._end(delivery)
        with self._clock.stage("end"):
            # While they are at it: this, too, would be time after their answer.
            self._fleet.rest()
            self._clock.settle()
            ended = self._session.ended()
        link = self._link
        kept = link.served.digests if link.served is not None and not self._complete else {}
        link.served = Served(self._version, {**kept, **filler.digests})
        link.course = filler.course
        verified = [one["verified"] for one in ended if one.get("verified") is not None]
        done = self._told(
            loading={
                server.url: {k: float(v) for k, v in dict(one.get("seconds") or {}).items()}
                for server, one in zip(self._fleet.servers, ended, strict=True)
            },
            verified=min(verified) if len(verified) == len(ended) else None,
        )
        if self._recorder is not None:
            self._recorder.end(done, "applied")
        return done

    def _end(self, delivery: Delivery) -> None:
        """Ask the servers to end; from here on it is too late for other ranks to call it off."""
        filler, session = self._filler, self._session
        buckets = filler.buckets
        if isinstance(delivery, ByFolder):
            session.begin()
            with self._clock.stage("wait"):
                buckets = session.load_folder(delivery)
        self._company.require_all()
        with self._clock.stage("end"):
            session.end(buckets, filler.skipped, delivery.failed)

    def _told(self, **more: Any) -> Update:
        filler = self._filler
        return Update(
            version=self._version,
            push=self.push,
            servers=tuple(server.url for server in self._fleet.servers),
            buckets=filler.buckets,
            sent=filler.sent,
            skipped=len(filler.skipped),
            bytes_sent=filler.bytes_sent,
            bytes_skipped=filler.bytes_skipped,
            carrier=self._link.carrier,
            stages=self._clock.seconds(),
            **more,
        )

    # ---- what the filler asks ----

    def _held(self) -> list[Mapping[str, str]]:
        """Return the digests of what each server holds; empty where all must be sent."""
        with self._clock.stage("wait"):
            return [told.get("digests") or {} for told in self._session.begun()]

    def _before(self) -> Mapping[str, str]:
        """Return the digests of what the servers held before, as far as they are known."""
        served = self._link.served
        if self._link.kind == "disk":
            return {} if served is None else served.digests
        told = self._session.begun()[0]
        if told.get("digests"):
            return dict(told["digests"])
        if served is None or told.get("state") != "ready" or told.get("version") != served.version:
            return {}
        return served.digests

    def _facts(self, *asked: Any) -> list[dict[str, float]]:
        assert self._recorder is not None
        return self._recorder.facts(*asked)

    def _note(self, *noted: Any) -> None:
        assert self._recorder is not None
        self._recorder.note(*noted)

    # ---- when it fails ----

    def _stop(self, why: Fp8ctlError | None = None) -> None:
        """End what waits, from another thread; on the source, or there by way of another rank."""
        if not self._company.gives:
            self._company.call_off(asyncio.CancelledError("the update was cancelled there"))
            return
        for server in self._fleet.servers:
            server.cut(why)
        if self._delivery is not None:
            self._delivery.cancel("the update was cancelled" if why is None else why.message)

    def _give_up(self, error: BaseException) -> None:
        """Tell all servers that nothing comes of it."""
        reason = f"{type(error).__name__}: {error}"
        # First of all: what a group has given, and no server was asked to load, goes with it.
        if self._delivery is not None:
            self._delivery.cancel(reason)
        if self._read is not None and self._read.met:
            self._company.part(error)
        elif self._read is not None and not self._read.over:
            self._company.leave(error)  # nobody has begun to read it
        if not self._company.gives:
            return
        self._company.deafen()  # or what it hears would cut what tells the servers
        self._session.abort(reason, error)
        if self._recorder is not None:
            self._recorder.end(self._told(), "failed", reason)

    def _close(self) -> None:
        self._company.deafen()
        self._fleet.close()
        if self._delivery is not None:
            self._delivery.close()
        if self._recorder is not None:
            self._recorder.close()
        link = self._link
        link.places.keep(link.course)
        sender = link.sender
        if sender is not None and not sender.alive:
            link.drop()


def _sizes(plan: Plan | None) -> tuple[int, tuple[int, int] | None]:
    """Return what the largest tensor of a plan needs with its scales, and tensors and bytes."""
    if plan is None:
        return 0, None
    largest = tensors = 0
    for tensor in plan.tensors:
        tensors += 2 if tensor.quantize else 1
        largest = max(largest, -(-plan.bytes_of(tensor) // ALIGN) * ALIGN + ALIGN)
    return largest, (tensors, plan.bytes_after)
