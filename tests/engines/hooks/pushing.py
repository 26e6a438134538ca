"""A server whose engine is a table: what a push's session is tested on.

The ranks hold what they were sent, each its half, and answer with digests of that; faults are
put in by name. The real engines are in tests/e2e.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from fp8ctl import wire
from fp8ctl.engines.hooks.gate import Gate
from fp8ctl.engines.hooks.routes import PushRoutes
from fp8ctl.engines.hooks.updates import Updates
from fp8ctl.engines.hooks.workers import Reloaded
from tests.listed import Listed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

PLAN = {
    "digest": "plan-1",
    "mode": "block",
    "block_size": [2, 2],
    "tensors": [
        {"name": "embed.weight", "dtype": "BF16", "shape": [8, 4], "quantize": False},
        {"name": "a.weight", "dtype": "BF16", "shape": [4, 4], "quantize": True},
        {"name": "norm.weight", "dtype": "BF16", "shape": [4], "quantize": False},
    ],
}
#: What a complete push of the plan brings: name -> dtype and shape.
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed.weight": ("bfloat16", (8, 4)),
    "a.weight": ("float8_e4m3fn", (4, 4)),
    "a.weight_scale_inv": ("float32", (2, 2)),
    "norm.weight": ("bfloat16", (4,)),
}
NAMES = list(TENSORS)


def digest(version: str, name: str) -> str:
    return f"{abs(hash((version, name))) % (1 << 60):016x}"


def entries(version: str, names: list[str], **changes: object) -> list[dict[str, object]]:
    """Return a bucket's entries; `changes` are made to the first."""
    slots = [wire.Slot(n, *TENSORS.get(n, ("bfloat16", (4,)))) for n in names]
    offsets, _ = wire.place(slots)
    found: list[dict[str, object]] = [
        json.loads(
            wire.Entry(
                s.name, s.dtype, s.shape, at, digest(version, s.name), {"amax": 1.0}
            ).to_text()
        )
        for s, at in zip(slots, offsets, strict=True)
    ]
    found[0].update(changes)
    return found


class Ranks:
    """Two ranks with halves of everything, and requests that run on them.

    Attributes:
        held: by rank, name -> digest of the version it is of.
        slots: of the carrier, name -> digest of what lies there.
        faults: by what is asked, or "hold", "resume", "flush", "disk": raised or called.
        calls: what was asked, in order; `messages` by how many questions.
        lists: of buckets, by the names that the server gave them.
        parameters, same: what the engine has names for, and names in the memory of another one.
        running: requests in the engine.
        remembers: it tells its layout once, and then sums alone.
        goes_on: where it is one, it can let its engine compute again.
    """

    def __init__(self, version: str | None, ranks: int = 2) -> None:
        self.ranks = ranks
        full = {n: digest(version, n) for n in NAMES} if version else {}
        self.held: list[dict[str, str]] = [dict(full) for _ in range(ranks)]
        self.slots: dict[int, dict[str, str]] = {}
        self.dtypes = {name: dtype for name, (dtype, _) in TENSORS.items()}
        self.arrived: set[str] = set()
        self.faults: dict[str, Any] = {}
        self.calls: list[str] = []
        self.messages: list[str] = []
        self.lists = Listed()
        self.details: list[dict[str, Any]] = []
        self.at_rest = False
        self.paused = self.running = 0
        self.flushed = 0
        self.form = "checkpoint"
        self.unfilled: dict[str, str] = {}
        self.parameters = list(full)
        self.same: dict[str, str] = {}
        self.broken = False
        self.remembers = self.goes_on = True

    async def _maybe(self, what: str) -> None:
        self.calls.append(what)
        fault = self.faults.get(what)
        if isinstance(fault, BaseException):
            raise fault
        if fault is not None:
            await fault()

    async def ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        self.messages.append(what)
        return await self._ask(what, **details)

    async def _ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        await self._maybe(what)
        self.details.append(details)
        answer: Callable[..., dict[str, Any]] = getattr(self, f"_{what}")
        return [answer(rank, **details) for rank in range(self.ranks)]

    def _refittable(self, rank: int) -> dict[str, Any]:
        return {"refittable": True, "why": ""}

    def _connect(self, rank: int, carrier: object) -> dict[str, Any]:
        return {}

    def _disconnect(self, rank: int) -> dict[str, Any]:
        return {}

    def _trust(self, rank: int, names: list[str]) -> dict[str, Any]:
        return {}

    def _forget(self, rank: int) -> dict[str, Any]:
        self.arrived.clear()
        self.broken = False
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
        assert self.at_rest, "weights are written under requests that run"
        error = self.faults.get(f"rank {rank}", "")
        loaded = len(entries)
        if error:
            loaded = 1 if error == "half-way" else 0
        for entry in entries[:loaded]:
            self.held[rank][entry["name"]] = self.slots[slot][entry["name"]]
            self.arrived.add(entry["name"])
        self.broken |= bool(loaded and error)
        seconds = {"load": 0.5 + rank}
        return {"loaded": loaded, "broken": self.broken, "error": error, "seconds": seconds}

    async def receive(self, details: Any, then: Any = None) -> list[dict[str, Any]]:
        answers = await self.ask("receive", **details)
        if then is None or any(answer["error"] for answer in answers):
            return answers
        behind = await self._settle(**then)
        return [{**one, "then": told} for one, told in zip(answers, behind, strict=True)]

    async def settle(self, **details: Any) -> list[dict[str, Any]]:
        """As SGLang's ranks: what is asked together is worked off one after the other."""
        self.messages.append("settle")
        return await self._settle(**details)

    async def _settle(self, **details: Any) -> list[dict[str, Any]]:
        if "layouts" in details:
            await self._maybe("digests")
        answers = await self._ask("progress", **details)
        await self._flush()
        return answers

    def _progress(
        self, rank: int, expected: list[str], layouts: list[str] | None = None, sums: str = ""
    ) -> dict[str, Any]:
        missing = [n for n in expected if n not in self.arrived]
        told: dict[str, Any] = {}
        if layouts is not None and not self.broken:
            told["digests"] = self._digests(rank, layouts)
        if sums:
            assert self.ranks == 1, "others may not hold what was sent"
            told["resumed"] = self.goes_on and told["digests"].get("sums") == sums
            self.at_rest = not told["resumed"]
        return {
            **told,
            "broken": self.broken,
            "unfilled": self.unfilled,
            "missing": missing[:20],
            "missing_count": len(missing),
        }

    def _names(self, rank: int) -> dict[str, Any]:
        return {"names": self.parameters, "same": self.same}

    def _digests(self, rank: int, layouts: list[str] | None = None) -> dict[str, Any]:
        shards: list[dict[str, Any]] = []
        for name, text in self.held[rank].items():
            # Two halves that add up to the tensor's digest.
            half = int(text, 16) // 2
            part = half if rank else int(text, 16) - (half if self.ranks > 1 else 0)
            shards.append(
                {
                    "name": name,
                    "row": rank,
                    "column": 0,
                    "dtype": self.dtypes.get(name, "bfloat16"),
                    "primary": True,
                    "digest": f"{part:016x}",
                }
            )
        told = {"rank": rank, "format": self.form}
        if not self.remembers:
            return {**told, "tensors": shards}
        told["layout"] = ", ".join(f"{one['name']} {one['dtype']}" for one in shards)
        if layouts and layouts[rank] == told["layout"]:
            return {**told, "sums": "".join(shard["digest"] for shard in shards)}
        return {**told, "tensors": shards}

    async def load_from_disk(self, path: str) -> Reloaded:
        await self._maybe("disk")
        version = path.rpartition("/")[2]
        for held in self.held:
            held.update((n, digest(version, n)) for n in NAMES)
        self.arrived.update(NAMES)
        return Reloaded(True)

    async def hold(self, in_flight: str, within: float) -> None:
        await self._maybe(f"hold {in_flight}")
        if in_flight == "pause":
            self.paused += self.running
        if in_flight == "abort":
            self.paused = 0
        if in_flight == "finish" and (self.running or self.paused):
            await asyncio.sleep(within)
            raise TimeoutError
        self.running = 0
        self.at_rest = True

    async def resume(self, trust: Sequence[str] = ()) -> str:
        self.messages.append("resume")
        why = ""
        if trust:
            try:
                await self._ask("trust", names=list(trust))
            except Exception as e:  # noqa: BLE001 - as a rank does
                why = str(e)
        await self._maybe("resume")
        self.at_rest = False
        self.running, self.paused = self.running + self.paused, 0
        if self.running:
            assert self.whole, "requests go on with weights of two versions"
        return why

    async def flush(self) -> None:
        self.messages.append("flush")
        await self._flush()

    async def _flush(self) -> None:
        await self._maybe("flush")
        self.flushed += 1

    @property
    def versions(self) -> set[str]:
        """Which of the versions that tests send are in place, in part at least."""
        known = {digest(v, n): v for v in "ABCD" for n in NAMES}
        return {known.get(text, "?") for held in self.held for text in held.values()}

    @property
    def whole(self) -> bool:
        return len(self.versions) == 1 and all(set(h) >= set(NAMES) for h in self.held)


class Server:
    """Gate, push routes and an app that generates, as a client sees them over HTTP."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        version: str | None = "A",
        plan: dict[str, Any] | None = None,
        ranks: int = 2,
    ) -> None:
        self.workers = Ranks(version, ranks)
        self.gate = Gate(engine="sglang", engine_version="0.4.8", await_push=version is None)
        plan = PLAN if plan is None else plan
        self.updates = Updates(self.gate, self.workers, plan, device="cpu", folder=folder)
        self.manifest = plan.get("digest", "")
        self.connection = ""
        self._app = self.gate.wrap(PushRoutes(self._engine, self.updates))

    async def _engine(self, scope: Any, receive: Any, send: Any) -> None:
        assert not self.workers.at_rest, "a request reaches an engine that rests"
        assert self.workers.whole, "an answer from weights of two versions"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'"text"'})

    async def http(
        self, method: str, path: str, body: bytes = b"", *, query: str = "", gone: bool = False
    ) -> tuple[int, Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if gone:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [],
        }
        await self._app(scope, receive, send)
        if not sent:
            return 0, None
        return sent[0]["status"], json.loads(b"".join(m["body"] for m in sent[1:]))

    async def post(self, path: str, /, **body: object) -> tuple[int, Any]:
        return await self.http("POST", path, json.dumps(body).encode())

    async def generate(self) -> int:
        return (await self.http("POST", "/generate"))[0]

    @property
    def state(self) -> str:
        return str(self.gate.describe()["state"])

    # --- a client ---------------------------------------------------------------------------

    async def connect(self, kind: str = "memory") -> tuple[int, Any]:
        status, answer = await self.post(
            wire.CONNECT, protocol=wire.PROTOCOL, client={}, carrier={"kind": kind}
        )
        if status == 200:
            self.connection = answer["connection"]
        return status, answer

    async def begin(self, version: str = "B", push: str = "", **more: Any) -> tuple[int, Any]:
        if not self.connection:
            assert (await self.connect())[0] == 200
        about = {"manifest": self.manifest, "connection": self.connection, **more}
        begin = wire.Begin(push=push or f"push-{version}", version=version, **about)
        return await self.post(wire.BEGIN, **begin.to_json())

    async def bucket(
        self, number: int, names: list[str], version: str = "B", push: str = "", **changes: Any
    ) -> tuple[int, Any]:
        slot, found = int(number) % 2, entries(version, names, **changes)
        self.workers.slots[slot] = {str(one["name"]): str(one["digest"]) for one in found}
        return await self.post(
            wire.BUCKET,
            push=push or f"push-{version}",
            number=number,
            slot=slot,
            nbytes=1 << 20,
            entries=found,
        )

    async def end(
        self, buckets: int, version: str = "B", push: str = "", **more: Any
    ) -> tuple[int, Any]:
        about = {"skipped": [], "verify": True, **more}
        return await self.post(wire.END, push=push or f"push-{version}", buckets=buckets, **about)

    async def abort(self, version: str = "B") -> tuple[int, Any]:
        return await self.post(wire.ABORT, push=f"push-{version}", reason="tired")

    async def push(self, version: str = "B", **more: Any) -> tuple[int, Any]:
        """Push everything in two buckets; return the first refusal, or the answer to END."""
        answer = await self.begin(version, **more)
        for number, names in enumerate((NAMES[:2], NAMES[2:])):
            if answer[0] == 200:
                answer = await self.bucket(number, names, version)
        if answer[0] != 200:
            return answer
        return await self.end(2, version)


# --- steps of tests -------------------------------------------------------------------------------


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test, and let nothing that it started go on."""

    async def alone() -> None:
        await asyncio.wait_for(test, 20)
        me = asyncio.current_task()
        rest = [t for t in asyncio.all_tasks() if t is not me]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    asyncio.run(alone())


async def never() -> None:
    await asyncio.Event().wait()


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about."""
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not come to that")


def error(answer: tuple[int, Any]) -> tuple[int, str, str]:
    """Return what a refusal says: status, id, and the state that the server is in."""
    status, body = answer
    return status, body["error"]["id"], body["state"]


async def flipped(server: Server) -> tuple[int, Any]:
    """One scale is not what was sent, on one rank."""
    await server.begin()
    await server.bucket(0, NAMES)
    server.workers.held[1]["a.weight_scale_inv"] = digest("D", "a.weight_scale_inv")
    return await server.end(1)


async def together(
    server: Server, version: str = "B", *, early: bool = True, **more: Any
) -> tuple[int, Any]:
    """Push all in one bucket, with an END that is there before it; return the last answer."""
    await server.begin(version)
    server.workers.messages.clear()
    ending = asyncio.ensure_future(server.end(1, version, **more)) if early else None
    await asyncio.sleep(0.01)
    status, told = await server.bucket(0, NAMES, version)
    if status != 200:
        return status, told
    return await (server.end(1, version, **more) if ending is None else ending)


async def from_disk(server: Server, path: str, version: str = "B") -> tuple[int, Any]:
    """Bring a whole set in a folder; return the first refusal, or the answer to END."""
    await server.connect("disk")
    await server.begin(version)
    found = [
        {"name": n, "dtype": d, "shape": list(s), "offset": 0} for n, (d, s) in TENSORS.items()
    ]
    push = f"push-{version}"
    status, answer = await server.post(wire.BUCKET, push=push, number=0, path=path, entries=found)
    return (status, answer) if status != 200 else await server.end(1, version)


def sixteen(names: list[str] = NAMES) -> list[str]:
    return [name for name in names if "_scale" not in name]


async def push_16_bits(server: Server, names: list[str], version: str) -> tuple[int, Any]:
    await server.begin(version)
    for i, name in enumerate(names):
        status, answer = await server.bucket(i, [name], version, dtype="bfloat16")
        if status != 200:
            return status, answer
    return await server.end(len(names), version)
