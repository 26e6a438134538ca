"""A server of a push as a client sees it: real session, real routes, real carriers, real HTTP.

Only the engine is a table of tensors. Faults are put in by path: a function that is given the
request before it is worked off, and may wait, cut the connection, or answer by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers import ends
from fp8ctl.engines.hooks.gate import Gate, answer_json
from fp8ctl.engines.hooks.routes import PushRoutes
from fp8ctl.engines.hooks.updates import Updates
from fp8ctl.engines.hooks.workers import Reloaded
from fp8ctl.kernels.digest import digest, to_text
from tests.listed import Listed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence

    from fp8ctl.manifest import Plan

    Answer = tuple[int, Any] | None
    Fault = Callable[[dict[str, Any]], Awaitable[Answer]]


class CutOffError(Exception):
    """Raised by a fault: the connection ends without an answer."""


class Table:
    """Ranks that keep what they are sent; rank 0 counts, the others hold copies.

    Attributes:
        held: of each rank, name -> tensor.
        buckets: names of each bucket that came.
        keeps: False: it only takes notice, for figures.
        refit: False: an engine without the patch.
        delay: seconds that a bucket takes.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self.held: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
        self.receivers: list[Any] = []
        self.buckets: list[list[str]] = []
        self.keeps, self.refit, self.delay = True, True, 0.0
        self.in_flight: list[str] = []
        self.lists = Listed()
        self.offers: list[Any] = []

    async def ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        if what == "receive" and self.delay:
            await asyncio.sleep(self.delay)
        if what == "connect":
            self.hang_up()
            self.offers.append(details["carrier"])
        if what == "receive":
            entries = self.lists.entries(details)
            self.buckets.append([e["name"] for e in entries])
        answer = getattr(self, f"_{what}")
        # In threads: ranks wait for each other in a group.
        asked = (asyncio.to_thread(answer, rank, **details) for rank in range(self.ranks))
        answers = list(await asyncio.gather(*asked))
        if what == "connect":
            self.receivers = answers
            return [{} for _ in answers]
        return answers

    def hang_up(self) -> None:
        while self.receivers:
            self.receivers.pop().close()

    def _refittable(self, rank: int) -> dict[str, Any]:
        return {"refittable": self.refit, "why": "the patch refit is not in force"}

    def _connect(self, rank: int, carrier: dict[str, Any]) -> Any:
        return ends.receive(carrier, rank, torch.device("cpu"))

    def _disconnect(self, rank: int) -> dict[str, Any]:
        if rank == 0:
            self.hang_up()
        return {}

    def _forget(self, rank: int) -> dict[str, Any]:
        return {}

    def _trust(self, rank: int, names: list[str]) -> dict[str, Any]:
        return {}

    def _receive(
        self,
        rank: int,
        number: int,
        slot: int,
        nbytes: int,
        **listed: Any,
    ) -> dict[str, Any]:
        entries = self.lists.entries(listed)
        bucket = self.receivers[rank].bucket(slot, nbytes)
        for entry in entries if self.keeps else ():
            dtype = getattr(torch, entry["dtype"])
            size = torch.Size(entry["shape"]).numel() * dtype.itemsize
            raw = bucket[entry["offset"] : entry["offset"] + size]
            self.held[rank][entry["name"]] = raw.view(dtype).view(entry["shape"]).clone()
        self.receivers[rank].loaded()
        return {"loaded": len(entries), "broken": False, "error": "", "seconds": {"load": 0.001}}

    async def receive(self, details: Any, then: Any = None) -> list[dict[str, Any]]:
        answers = await self.ask("receive", **details)
        behind = await self.settle(**then) if then is not None else []
        return [
            {**one, "then": progress} if progress else one
            for one, progress in itertools.zip_longest(answers, behind)
        ]

    async def settle(self, **details: Any) -> list[dict[str, Any]]:
        return await self.ask("progress", **details)

    def _progress(
        self, rank: int, expected: list[str], layouts: list[str] | None = None
    ) -> dict[str, Any]:
        missing = [n for n in expected if n not in self.held[rank]] if self.keeps else []
        return {
            **({} if layouts is None else {"digests": self._digests(rank)}),
            "broken": False,
            "unfilled": {},
            "missing": missing[:20],
            "missing_count": len(missing),
        }

    def _names(self, rank: int) -> dict[str, Any]:
        return {"names": list(self.held[rank]), "same": {}}

    def _digests(self, rank: int) -> dict[str, Any]:
        shards = [
            {
                "name": name,
                "row": 0,
                "column": 0,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "primary": rank == 0,
                "digest": to_text(digest(tensor)),
            }
            for name, tensor in self.held[rank].items()
        ]
        return {"rank": rank, "format": "checkpoint", "tensors": shards}

    async def load_from_disk(self, path: str) -> Reloaded:
        self.buckets.append([])
        for file in sorted(Path(path).glob("*.safetensors")):
            for name, tensor in read_safetensors(file).items():
                self.buckets[-1].append(name)
                for held in self.held:
                    held[name] = tensor
        return Reloaded(True)

    async def hold(self, in_flight: str, within: float) -> None:
        self.in_flight.append(in_flight)

    async def resume(self, trust: Sequence[str] = ()) -> str:
        return ""

    async def flush(self) -> None:
        pass


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file by the format's own words: length, header, data."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    spelled = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16}
    spelled |= {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, end = (8 + length + at for at in about["data_offsets"])
            raw = torch.frombuffer(data, dtype=torch.uint8, count=end - start, offset=start)
            found[name] = raw.clone().view(spelled[about["dtype"]]).view(about["shape"])
    return found


class Server:
    """One, on a port of its own, in a thread of its own.

    Attributes:
        url: its address.
        table: its engine.
        asked: path of each request that came, in order; `bodies` what they said.
        faults: path -> fault; see above.
        key: that it wants, "" for none.
    """

    def __init__(
        self,
        plan: Plan | None,
        *,
        ranks: int = 1,
        folder: Path | None = None,
        stock: bool = False,
        key: str = "",
        await_push: bool = False,
    ) -> None:
        self.table = Table(ranks)
        self.gate = Gate(engine="sglang", engine_version="0.4.8", await_push=await_push)
        self.gate.ranks = ranks
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        self.faults: dict[str, Fault] = {}
        self.key, self._stock = key, stock
        manifest = {} if plan is None else json.loads(json.dumps(plan.to_json()))
        self._manifest, self._folder = manifest, folder
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._started.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def state(self) -> str:
        return str(self.gate.describe()["state"])

    def restart(self) -> None:
        """Forget connections and updates, as a process that was started anew."""
        self.table.hang_up()
        self._loop.call_soon_threadsafe(self._renew)

    def _renew(self) -> None:
        self.updates = Updates(
            self.gate, self.table, self._manifest, device="cpu", folder=self._folder
        )
        self._app = self.gate.wrap(PushRoutes(self._engine, self.updates))

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._renew()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._stop.wait()
        server.close()
        self.table.hang_up()

    async def _engine(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/fp8ctl/state" and not self._stock:
            await answer_json(send, *self.gate.answer())
        elif scope["path"] == "/get_model_info":
            await answer_json(send, 200, {})
        else:
            await answer_json(send, 404, {"detail": "Not Found"})

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, CutOffError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode()
                    await self._request(head.split("\r\n"), reader, writer)
        except asyncio.CancelledError:
            pass  # the server ends
        finally:
            writer.close()

    async def _request(self, head: list[str], reader: Any, writer: asyncio.StreamWriter) -> None:
        method, target, _ = head[0].split()
        path, _, query = target.partition("?")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        found = json.loads(body) if body else {}
        self.asked.append(path)
        self.bodies.append(found)
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            sent.append(message)

        told: Answer = None
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            told = 401, {"error": "Unauthorized"}
        elif path in self.faults:
            told = await self.faults[path](found)
        if told is not None:
            await answer_json(send, *told)
        else:
            scope = {"type": "http", "method": method, "path": path, "headers": []}
            app = self._engine if self._stock else self._app
            await app({**scope, "query_string": query.encode()}, receive, send)
        data = b"".join(m["body"] for m in sent[1:])
        start = f"HTTP/1.1 {sent[0]['status']} -\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(start.encode() + data)
        await writer.drain()


@contextlib.contextmanager
def serving(plan: Plan | None, **how: Any) -> Iterator[Server]:
    server = Server(plan, **how)
    try:
        yield server
    finally:
        server.close()


async def cancelled(update: Coroutine[Any, Any, object], reached: threading.Event) -> float:
    """Cancel an update when something is reached; return the seconds until it has ended."""
    task = asyncio.create_task(update)
    assert await asyncio.to_thread(reached.wait, 20)
    start = time.monotonic()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
        raise AssertionError("it was not cancelled")
    return time.monotonic() - start
