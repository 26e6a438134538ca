"""What a push client and a server's push routes say to each other.

Bodies are JSON; weights never are: they lie in a bucket, which a carrier
brings (`carriers`), and an `Entry` says where. Read by both ends, so it runs in
a trainer, in an engine and in the command: standard library, Python 3.10.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Both ends must have the same one; it changes with what is said, and with when it may be.
PROTOCOL = 4
#: Where every tensor of a bucket begins, in bytes: what CUDA's widest loads want, and more.
ALIGN = 256

CONNECT = "/fp8ctl/push/connect"
DISCONNECT = "/fp8ctl/push/disconnect"
BEGIN = "/fp8ctl/push/begin"
BUCKET = "/fp8ctl/push/bucket"
END = "/fp8ctl/push/end"
ABORT = "/fp8ctl/push/abort"
LOG = "/fp8ctl/push/log"
PLAN = "/fp8ctl/push/plan"

#: What becomes of requests that run when an update begins: they may end first, are ended, or
#: wait and go on with the new weights (their keys and values are computed anew).
InFlight = Literal["finish", "abort", "pause"]
#: memory: a file of this host's memory; ipc: CUDA memory of this host; group: a process group
#: (NCCL or gloo); disk: a folder that both ends can read.
Kind = Literal["memory", "ipc", "group", "disk"]

#: dtypes on the wire, as torch spells them without the `torch.`, and their bytes.
DTYPES: Mapping[str, int] = {
    "float8_e4m3fn": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "uint8": 1,
    "int8": 1,
    "int32": 4,
    "int64": 8,
}


class WireError(ValueError):
    """A body that does not say what it should."""


#: Of an entry that nobody recorded.
NO_FACTS: Mapping[str, float] = MappingProxyType({})


@functools.lru_cache(maxsize=1 << 12)
def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor's values; there are few kinds, and they are asked for often."""
    return math.prod(shape) * DTYPES[dtype]


class Entry(NamedTuple):
    """One tensor in a bucket, row-major. A tuple: an update makes thousands of them.

    Attributes:
        name: as in the checkpoint of the server's plan.
        dtype: one of `DTYPES`.
        shape: as in the checkpoint.
        offset: first byte in the bucket, a multiple of `ALIGN`.
        digest: of the values, in hexadecimal (`kernels.digest`); "" where not computed.
        facts: what the recorder wants to know of it (amax, saturated, zero_blocks, ...).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: str = ""
    facts: Mapping[str, float] = NO_FACTS

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return bytes_of(self.dtype, self.shape)

    def to_text(self) -> str:
        """Return it as JSON; most of an entry is as it was in the update before, and remembered."""
        facts = json.dumps(dict(self.facts)) if self.facts else "{}"
        known = _known(self.name, self.dtype, self.shape)
        digest = self.digest if self.digest.isalnum() else json.dumps(self.digest)[1:-1]
        return f'{known}, "offset": {self.offset}, "digest": "{digest}", "facts": {facts}}}'


@functools.lru_cache(maxsize=1 << 17)
def _known(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    """Return the JSON of what an entry says at every update, without its end."""
    return json.dumps({"name": name, "dtype": dtype, "shape": shape})[:-1]


class Slot(NamedTuple):
    """A tensor that wants a place in a bucket: its dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return bytes_of(self.dtype, self.shape)


def place(slots: Iterable[Slot]) -> tuple[list[int], int]:
    """Return the offset of each tensor when they are laid out in this order, and the end."""
    offsets, end = [], 0
    for slot in slots:
        offsets.append(end)
        end += -(-slot.nbytes // ALIGN) * ALIGN
    return offsets, end


def read_entries(found: object, nbytes: int) -> list[Entry]:
    """Read the entries of a bucket of `nbytes` bytes.

    Raises:
        WireError: a field is missing or of another kind, a dtype is not known, a tensor lies
            outside of the bucket or on another one, or a name comes twice.
    """
    if not isinstance(found, list):
        raise WireError(f"entries: expected a list, found {type(found).__name__}")
    entries = [_entry(one) for one in found]
    end = 0
    for entry in sorted(entries, key=lambda e: e.offset):
        if entry.offset < end or entry.offset % ALIGN:
            raise WireError(f"{entry.name}: offset {entry.offset}, expected {end} or more")
        end = entry.offset + entry.nbytes
    if end > nbytes:
        raise WireError(f"entries end at byte {end} of a bucket of {nbytes}")
    if len({entry.name for entry in entries}) < len(entries):
        raise WireError("a name comes twice in one bucket")
    return entries


def _entry(found: Any) -> Entry:
    try:
        name, dtype, offset = found["name"], found["dtype"], found["offset"]
        shape, digest, facts = found["shape"], found.get("digest", ""), found.get("facts")
        if type(name) is not str or type(dtype) is not str or type(digest) is not str:
            for value in (name, dtype, digest):
                _is(str, value)
        if {int}.issuperset(map(type, shape)) and type(offset) is int:
            shape = tuple(shape)
        else:
            shape, offset = tuple(_is(int, side) for side in shape), _is(int, offset)
        entry = Entry(name, dtype, shape, offset, digest, dict(facts) if facts else NO_FACTS)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise WireError(f"not an entry of a bucket: {type(e).__name__} {e}") from None
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise WireError(f"{name}: dtype {dtype!r}; expected one of {known}")
    if shape and min(shape) < 0:
        raise WireError(f"{name}: shape {list(shape)}")
    return entry


def _is(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


@dataclass(frozen=True)
class Begin:
    """What opens an update.

    Attributes:
        push: a name of this update, unique for ever.
        connection: as `CONNECT` answered.
        version: what the trainer calls these weights.
        manifest: digest of the plan by which they are made; "" for 16-bit weights to a server
            that quantises itself.
        in_flight: what becomes of requests that run.
        within: seconds that "finish" may take.
        lease: seconds without a word after which the client counts as dead.
        complete: True where everything that the plan names is sent, or is there unchanged.
        digests: True asks for the digests of what the server holds, to send what differs.
    """

    push: str
    connection: str
    version: str
    manifest: str
    in_flight: InFlight = "finish"
    within: float = 600.0
    lease: float = 120.0
    complete: bool = True
    digests: bool = False

    def to_json(self) -> dict[str, object]:
        """Return the request's body."""
        return {
            "protocol": PROTOCOL,
            "push": self.push,
            "connection": self.connection,
            "version": self.version,
            "manifest": self.manifest,
            "in_flight": self.in_flight,
            "within": self.within,
            "lease": self.lease,
            "complete": self.complete,
            "digests": self.digests,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Begin:
        """Read a request's body.

        Raises:
            WireError: another protocol, or a field is missing or of another kind.
        """
        check_protocol(found)
        try:
            begin = cls(
                push=_is(str, found["push"]),
                connection=_is(str, found["connection"]),
                version=_is(str, found["version"]),
                manifest=_is(str, found["manifest"]),
                in_flight=found.get("in_flight", "finish"),
                within=float(found.get("within", 600.0)),
                lease=float(found.get("lease", 120.0)),
                complete=_is(bool, found.get("complete", True)),
                digests=_is(bool, found.get("digests", False)),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise WireError(f"not the beginning of an update: {type(e).__name__} {e}") from None
        if begin.in_flight not in get_args(InFlight):
            known = ", ".join(get_args(InFlight))
            raise WireError(f"in_flight {begin.in_flight!r}; expected one of {known}")
        return begin


def shown(connection: str) -> str:
    """Return how a state tells a connection: whoever reads it cannot use it."""
    return hashlib.sha256(connection.encode()).hexdigest()[:16] if connection else ""


def check_protocol(found: Mapping[str, Any]) -> None:
    """Refuse a client of another protocol.

    Raises:
        WireError: it is one.
    """
    if found.get("protocol") != PROTOCOL:
        raise WireError(
            f"protocol {found.get('protocol')!r}; this server's is {PROTOCOL}:"
            " trainer and server need the same fp8ctl"
        )
