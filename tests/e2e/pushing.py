"""A push client as bare as can be: every request of `wire` on its own, so that each can be wrong.

Runs in the tests' interpreter, which has another torch than the engine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file

from fp8ctl import wire
from fp8ctl.carriers import ends
from fp8ctl.kernels.digest import digests, to_text
from fp8ctl.stream import quantize_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Json = dict[str, Any]
Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class Bucket:
    """What goes into one request.

    Attributes:
        named: the tensors.
        entries: what is said of them.
        nbytes: of the bucket.
    """

    named: tuple[Named, ...]
    entries: tuple[wire.Entry, ...]
    nbytes: int

    def say(self, name: str, /, **changes: Any) -> Bucket:
        """Return the bucket with something else said of one tensor."""
        changed = tuple(e._replace(**changes) if e.name == name else e for e in self.entries)
        return replace(self, entries=changed)


def quantized(
    state: Mapping[str, torch.Tensor], plan: Json, bucket_bytes: int = 8 << 20
) -> list[Bucket]:
    """Return buckets with the FP8 form of a 16-bit checkpoint."""
    return list(buckets(quantize_weights(state.items(), plan), bucket_bytes))


def buckets(named: Iterable[Named], bucket_bytes: int) -> Iterator[Bucket]:
    """Fill buckets."""
    some: list[Named] = []
    for name, tensor in named:
        size = sum(t.nbytes for _, t in some)
        if some and size + tensor.nbytes > bucket_bytes:
            yield bucket(some)
            some = []
        some.append((name, tensor))
    if some:
        yield bucket(some)


def bucket(named: Sequence[Named]) -> Bucket:
    """Lay tensors out in one bucket."""
    slots = [wire.Slot(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in named]
    offsets, nbytes = wire.place(slots)
    sums = digests((t, 0, 0) for _, t in named)
    entries = [
        wire.Entry(slot.name, slot.dtype, slot.shape, offset, to_text(total))
        for slot, offset, total in zip(slots, offsets, sums, strict=True)
    ]
    return Bucket(tuple(named), tuple(entries), nbytes)


class RefusedError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.id = body.get("error", {}).get("id", "")
        self.body = body


@dataclass
class Pusher:
    """A connection to one server.

    Attributes:
        url: of the server.
        kind: of carrier.
        ranks: of the server.
        slot_bytes: how large a bucket may be.
        seconds: of the last update, by stage.
        ways: how many tensors of it went through loaders and how many were copied.
    """

    url: str
    kind: Literal["memory", "group", "disk"] = "memory"
    ranks: int = 1
    slot_bytes: int = 64 << 20
    seconds: dict[str, float] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        if self.kind != "disk":
            self.sender = ends.sender(self.kind, self.slot_bytes, ranks=[self.ranks], timeout=60)
        offer = {"kind": "disk"} if self.kind == "disk" else self.sender.offer()
        try:
            coming = self._thread.submit(
                self.call, wire.CONNECT, protocol=wire.PROTOCOL, carrier=offer
            )
            if self.kind != "disk":
                self.sender.join()
            answer = coming.result()
        except BaseException:
            self.close()
            raise
        self.connection = answer["connection"]
        self.manifest = answer["manifest"]

    def close(self) -> None:
        """Say nothing more, as a client that was killed."""
        if self.kind != "disk":
            self.sender.close()
        self._thread.shutdown()

    def __enter__(self) -> Pusher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def call(self, route: str, /, **body: Any) -> Json:
        """Post a request; return the answer's body.

        Raises:
            RefusedError: it is not 200.
        """
        address = urlsplit(self.url)
        assert address.hostname
        server = http.client.HTTPConnection(address.hostname, address.port, timeout=300)
        with contextlib.closing(server):
            server.request("POST", route, json.dumps(body), {"content-type": "application/json"})
            response = server.getresponse()
            answer: Json = json.loads(response.read())
        if response.status != 200:
            raise RefusedError(response.status, answer)
        return answer

    def begin(self, version: str, **changes: Any) -> str:
        """Open an update; return its name."""
        name = uuid.uuid4().hex
        begin = wire.Begin(name, self.connection, version, self.manifest, **changes)
        self.call(wire.BEGIN, **begin.to_json())
        return name

    def write(self, slot: int, bucket: Bucket) -> None:
        """Put a bucket into shared memory."""
        where = self.sender.buffer(slot)
        for entry, (_, tensor) in zip(bucket.entries, bucket.named, strict=True):
            bits = tensor.contiguous().view(-1).view(torch.uint8)
            where[entry.offset : entry.offset + bits.numel()].copy_(bits)
        self.sender.ready(slot)

    def send(self, push: str, number: int, bucket: Bucket) -> Json:
        """Write a bucket and have it loaded."""
        self.write(number % 2, bucket)
        return self.tell(push, number, bucket)

    def tell(self, push: str, number: int, bucket: Bucket) -> Json:
        """Have a bucket loaded that lies in its slot."""
        asked = self._thread.submit(
            self.call,
            wire.BUCKET,
            push=push,
            number=number,
            slot=number % 2,
            nbytes=bucket.nbytes,
            entries=[json.loads(entry.to_text()) for entry in bucket.entries],
        )
        self.sender.send(number % 2, bucket.nbytes)
        return asked.result()

    def end(self, push: str, count: int, **changes: Any) -> Json:
        """End an update."""
        return self.call(wire.END, push=push, buckets=count, **{"skipped": [], **changes})

    def update(self, version: str, sent: Sequence[Bucket], **begin: Any) -> Json:
        """Bring a whole set; return the answer to its end."""
        clock = time.perf_counter
        began = clock()
        self.seconds = dict.fromkeys(("begin", "write", "buckets", "end"), 0.0)
        self.ways = {"loaders": 0, "copies": 0}
        push = self.begin(version, **begin)
        self.seconds["begin"] = clock() - began
        for number, one in enumerate(sent):
            at = clock()
            self.write(number % 2, one)
            self.seconds["write"] += clock() - at
            at = clock()
            answer = self.tell(push, number, one)
            self.seconds["buckets"] += clock() - at
            for stage, took in answer["seconds"].items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + took
            for way, count in answer["ways"].items():
                self.ways[way] += count
        at = clock()
        answer = self.end(push, len(sent))
        self.seconds["end"] = clock() - at
        return answer

    def update_from(self, folder: Path, version: str, sent: Sequence[Bucket]) -> Json:
        """Bring a whole set in a folder that the engine reads itself."""
        folder.mkdir()
        named = {n: t.contiguous() for one in sent for n, t in one.named}
        save_file(named, str(folder / "model.safetensors"))
        push = self.begin(version)
        entries = [json.loads(entry.to_text()) for one in sent for entry in one.entries]
        self.call(wire.BUCKET, push=push, number=0, path=str(folder), entries=entries)
        return self.end(push, 1)
