"""What carries buckets, and how far one is that is given to a group, or comes from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future


class Carrier(NamedTuple):
    """What carries the bytes, as a trainer's user is told.

    Attributes:
        name: "memory" is the host's, shared; "ipc" a GPU's; "copies" one GPU's from another.
        why: of "nccl" to one rank: why not "copies", which are faster.
    """

    name: Literal["memory", "ipc", "copies", "nccl", "gloo", "disk"]
    why: str = ""


class Sent(NamedTuple):
    """Two ends of one bucket's way, in this order; either raises why it is not reached.

    Attributes:
        left: its slot may be written again. The trainer's device has given it: NCCL may have it
            in memory of its own then, and a rank that has died meanwhile not at all. Or, where
            the rank pulls it, it has.
        arrived: every rank has it.
    """

    left: Future[None]
    arrived: Future[None]


class Launched(NamedTuple):
    """A bucket that this rank gives, or takes.

    Attributes:
        over: says whether this device has done it; raises ConflictError where the transport failed.
        done: an event of this device behind it; None: it has none, or does not do it.
    """

    over: Callable[[], bool]
    done: Any = None
