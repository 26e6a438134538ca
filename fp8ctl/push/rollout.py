"""`Rollout`: a trainer's servers, and how they get its weights.

rollout = Rollout(["http://127.0.0.1:30000"], plan)
for step in range(1000):
    ...
    rollout.update(model.named_parameters(), version=str(step))
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from fp8ctl import wire
from fp8ctl.errors import BusyError, UsageError
from fp8ctl.manifest import Plan
from fp8ctl.push.client import Server
from fp8ctl.push.fleet import Fleet
from fp8ctl.push.link import Link, Via
from fp8ctl.push.update import Wish, Work

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Sequence

    from fp8ctl.push.result import Progress, Update
    from fp8ctl.stream import Ranks
    from fp8ctl.wire import InFlight

    Named = tuple[str, torch.Tensor]

API_KEY_VARIABLE = "FP8CTL_API_KEY"
BUCKET_BYTES = 512 << 20


class Rollout:
    """One or many servers that are to serve a trainer's weights.

    Nothing is connected before the first update; what is connected then stays until `close`.
    One update at a time.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        plan: Plan | Mapping[str, Any] | None,
        *,
        via: Via = "ipc",
        api_key: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        device: torch.device | str | None = None,
        in_flight: InFlight = "finish",
        delta: bool = False,
        verify: bool = True,
        record: Path | str | None = None,
        folder: Path | str | None = None,
        timeout: float = 600.0,
        master: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Say which servers, and how.

        Args:
            urls: address of each server, of either engine; a tensor-parallel one has one.
            plan: the plan that the servers were started with, or its manifest; None: 16-bit
                weights to servers that quantise themselves.
            via: "ipc": memory of this host, of the GPU where the servers are on GPUs. "nccl": a
                process group, gloo where they are on CPUs. "disk": a folder.
            api_key: of the servers; None: `FP8CTL_API_KEY` of the environment.
            bucket_bytes: of a bucket; two are kept, as long as the rollout. Via "nccl" three, on
                the trainer and in every rank, where all their devices have room for four.
            device: whose GPU has the buckets, where weights are quantised; None: the current one.
                For servers on CPUs that is the CPU, whatever is said here.
            in_flight: what becomes of requests that run when an update begins: "finish" waits
                for them, "abort" ends them, "pause" has them go on with the new weights.
            delta: send only tensors whose codes or scales differ from what the servers hold.
            verify: have the servers prove by digests that they hold what was sent.
            record: file to which each update adds a JSON line for every tensor, and one for itself.
            folder: for "disk": where each update makes a folder and removes it; None: fp8ctl's
                cache. The servers read it there.
            timeout: seconds that any request, or waiting for requests in flight, may take.
            master: address of this host that the servers reach; for "nccl". None: the one by
                which this host reaches them.
            dtype: what weights are rounded to before they are quantised; None: the dtypes of the
                plan, since the codes must be those of that checkpoint.

        Raises:
            UsageError: something of this cannot be meant.
        """
        addresses = [urls] if isinstance(urls, str) else [*urls]
        if not addresses:
            raise UsageError("no server", hint='Rollout("http://127.0.0.1:30000", plan)')
        if via not in get_args(Via):
            raise UsageError(f"via={via!r}", hint='via="ipc", "nccl" or "disk"')
        if in_flight not in get_args(wire.InFlight):
            raise UsageError(f"in_flight={in_flight!r}", hint='"finish", "abort" or "pause"')
        if via == "disk" and delta:
            raise UsageError(
                'delta=True with via="disk": an engine\'s own reload takes whole checkpoints',
                hint='via="ipc" or via="nccl"',
            )
        if bucket_bytes < 1:
            raise UsageError(f"a bucket of {bucket_bytes} bytes", hint="bucket_bytes=512 << 20")
        if not 0 < timeout < math.inf:
            raise UsageError(f"timeout={timeout}", hint="timeout=600.0")
        self._plan = _read(plan)
        backend = None if self._plan is None else self._plan.backend
        key = api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE) or None
        self._servers = [Server(url, key, timeout, backend) for url in addresses]
        if len({server.url for server in self._servers}) < len(self._servers):
            raise UsageError("a server comes twice", hint="give each address once")
        manifest = "" if self._plan is None else self._plan.digest
        self._wish = Wish(
            self._plan,
            manifest,
            bucket_bytes,
            in_flight,
            delta,
            verify,
            timeout,
            dtype,
            None if record is None else Path(record),
            None if folder is None else Path(folder),
        )
        self._link = Link(
            via,
            manifest,
            device=None if device is None else torch.device(device),
            host=master,
            timeout=timeout,
        )
        self._one_at_a_time = threading.Lock()

    def update(
        self,
        named_tensors: Iterable[Named],
        version: str | int,
        *,
        complete: bool = True,
        ranks: Ranks | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        quantized: bool = False,
    ) -> Update:
        """Have all servers serve these weights, or the ones that they served before.

        Args:
            named_tensors: names as in the checkpoint; of any device, strides and dtype; DTensors
                are gathered. It is closed at the end, whatever the end.
            version: what the trainer calls these weights.
            complete: False: a part of the weights may come; the others stay as they are.
            ranks: all ranks of the trainer call this, where each holds parts; only the source
                talks to servers, and all return or raise together.
            on_progress: called after every bucket.
            quantized: they are in the plan's FP8 form already: codes, each followed by its scale.

        Returns:
            What was sent, and in which time.

        Raises:
            Fp8ctlError: it failed, and the message names the server or the tensor. Servers
                serve the old weights, or answer 503 until an update succeeds.
            TimeoutError: a rank or a carrier did not come.
            BusyError: another update of this rollout runs.
        """
        if hasattr(named_tensors, "__aiter__"):
            raise TypeError("the source is asynchronous: use `await rollout.aupdate(...)`")
        with self._alone():
            work = self._work(version, complete, ranks, on_progress, quantized)
            return work.run(named_tensors)

    async def aupdate(
        self,
        named_tensors: Iterable[Named] | AsyncIterable[Named],
        version: str | int,
        *,
        complete: bool = True,
        ranks: Ranks | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        quantized: bool = False,
    ) -> Update:
        """Do as `update`, with a source of either kind, while the event loop goes on.

        A cancellation gives the update up: servers are told, the source is closed.
        `on_progress` is called in another thread.
        """
        with self._alone():
            work = self._work(version, complete, ranks, on_progress, quantized)
            return await work.arun(named_tensors)

    def close(self) -> None:
        """Say goodbye to the servers and give back the carrier; a next update connects anew."""
        with self._alone():
            fleet = Fleet(self._servers)
            try:
                self._link.close(fleet)
            finally:
                fleet.close()
                for server in self._servers:
                    server.close()

    def __enter__(self) -> Rollout:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    async def __aenter__(self) -> Rollout:
        """Return itself."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close it."""
        await asyncio.to_thread(self.close)

    def _work(
        self,
        version: str | int,
        complete: bool,
        ranks: Ranks | None,
        on_progress: Callable[[Progress], None] | None,
        quantized: bool,
    ) -> Work:
        return Work(
            self._wish,
            self._servers,
            self._link,
            str(version),
            complete=complete,
            ranks=ranks,
            on_progress=on_progress,
            quantized=quantized,
        )

    def _alone(self) -> _Alone:
        return _Alone(self._one_at_a_time)


class _Alone:
    """Refuses what would come while something else is on its way."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "another update of this rollout is on its way", hint="await the one before"
            )

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _read(plan: Plan | Mapping[str, Any] | None) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping) and "quantization_config" not in plan:
        return Plan.from_json(plan)
    raise UsageError(
        f"{type(plan).__name__} where a plan was expected: a server takes the weights of its plan",
        hint='Plan.read(Path("plan.json")), of fp8ctl plan --model M --backend B --out plan.json',
    )
