"""Ranks that go through a stream together: they meet, and each hears how the others fare.

Words travel over a process group on the CPU, every wait has a time-out, and a rank that fails
says so before it leaves, so that the others raise at once and not after it. Runs in a trainer's
interpreter. Python 3.10.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from fp8ctl import errors
from fp8ctl.errors import ConflictError, Fp8ctlError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Bytes of a word with what goes with it.
_LENGTH = 2048
#: Seconds that a rank which leaves waits to be heard.
FAREWELL = 30.0

Word = Literal["more", "end", "left"]


@dataclass(frozen=True)
class Ranks:
    """Who gives the stream's tensors when several ranks hold parts of each.

    Attributes:
        group: a process group on the CPU (gloo), by which the ranks wait for each other.
        source: global rank that quantises and gives; the others only take part.
        timeout: seconds after which a rank that does not come is an error on the others.
    """

    group: Any
    source: int = 0
    timeout: float = 300.0

    @property
    def is_source(self) -> bool:
        """Whether this rank is the source."""
        return torch.distributed.get_rank() == self.source


def meet(
    ranks: Ranks,
    word: Word,
    why: BaseException | None = None,
    *,
    names: Sequence[str] = (),
    patience: float = 0.0,
    note: str = "",
) -> str:
    """Wait until all ranks are here, and hear what each has to say.

    A rank that is dead shows before a collective hangs.

    Args:
        ranks: all of them.
        word: "more": another bucket; "end": no more tensors; "left": nothing comes of it.
        why: with "left".
        names: what is gathered next: has to be the same on all ranks, or they would hang.
        patience: seconds that some may take longer than the ranks' own time-out.
        note: of the source: where a rank that cannot wait leaves word (`call_off`).

    Returns:
        The note of the source; "" where it has none, or after "left".

    Raises:
        TimeoutError: a rank did not come.
        Fp8ctlError: a rank left, with its reason; or they would not gather the same.
    """
    distributed = torch.distributed
    seconds = ranks.timeout + patience if word != "left" else min(ranks.timeout, FAREWELL)
    limit = datetime.timedelta(seconds=seconds)
    count = distributed.get_world_size(ranks.group)
    heard = [torch.zeros(_LENGTH, dtype=torch.uint8) for _ in range(count)]
    try:
        distributed.monitored_barrier(ranks.group, timeout=limit)
        mine = _packed(word, why, names, note)
        work = distributed.all_gather(heard, mine, group=ranks.group, async_op=True)
        work.wait(limit)
    except RuntimeError as e:
        raise TimeoutError(f"not all ranks came within {seconds:g} s: {e}") from e
    if word == "left":
        return ""
    words = {}
    for i, text in enumerate(heard):
        rank = distributed.get_global_rank(ranks.group, i)
        words[rank] = _unpacked(text)
        if words[rank]["word"] == "left":
            raise _error_of(rank, words[rank])
    if len({(said["word"], said["names"]) for said in words.values()}) > 1:
        told = "; ".join(f"rank {rank}: {said['shown']}" for rank, said in words.items())
        raise ConflictError(
            f"the ranks do not give the same tensors ({told})",
            hint="give the same names in the same order on all ranks",
        )
    return words.get(ranks.source, {}).get("note", "")


def leave(ranks: Ranks, why: BaseException) -> None:
    """Say that nothing comes of it, as far as somebody is there to hear it."""
    with contextlib.suppress(TimeoutError, Fp8ctlError):
        meet(ranks, "left", why)


def call_off(ranks: Ranks, note: str, why: BaseException) -> None:
    """Leave word for the source that nothing is to come of it, without waiting for anybody.

    It goes by the group's store: the group itself may be in a collective. Without a store the
    source hears it when the ranks meet next.
    """
    store = _store(ranks)
    said = {"rank": str(torch.distributed.get_rank()), **_said("left", why)}
    with contextlib.suppress(Exception):  # a store that is gone takes the job with it
        if store is not None:
            store.set(note, json.dumps(said))


def called_off(ranks: Ranks, note: str) -> Fp8ctlError | None:
    """Return why a rank has called it off; None where none has."""
    store = _store(ranks)
    with contextlib.suppress(Exception):
        if store is not None and store.check([note]):
            said = json.loads(store.get(note))
            with contextlib.suppress(Exception):
                store.delete_key(note)
            return _error_of(int(said["rank"]), said)
    return None


def can_call_off(ranks: Ranks) -> bool:
    """Say whether there is a place to leave word."""
    return _store(ranks) is not None


def _store(ranks: Ranks) -> Any:
    """Return where the ranks of a group find each other; None where torch does not tell it."""
    found = getattr(torch.distributed.distributed_c10d, "_get_process_group_store", None)
    with contextlib.suppress(Exception):
        return None if found is None else found(ranks.group)
    return None


def tell(ranks: Ranks, why: BaseException | None = None, *, patience: float = 0.0) -> None:
    """Say, on the source, how something ended; hear it on the others.

    Args:
        ranks: all of them.
        why: on the source: what went wrong; None: nothing.
        patience: seconds that the source may take longer than the ranks' own time-out.

    Raises:
        TimeoutError: the source does not say it in time.
        Fp8ctlError: on the others: what went wrong.
    """
    word = _packed("more" if why is None else "left", why)
    limit = ranks.timeout + patience
    work = torch.distributed.broadcast(word, ranks.source, group=ranks.group, async_op=True)
    try:
        work.wait(datetime.timedelta(seconds=limit))
    except RuntimeError as e:
        if ranks.is_source:
            return  # nobody is there to hear it; who reads the stream has the error
        told = f"rank {ranks.source} did not say within {limit:g} s that it was done: {e}"
        raise TimeoutError(told) from e
    said = _unpacked(word)
    if not ranks.is_source and said["word"] == "left":
        raise _error_of(ranks.source, said)


def _said(word: Word, why: BaseException | None) -> dict[str, str]:
    said: dict[str, str] = {"word": word}
    if why is not None:
        known = isinstance(why, Fp8ctlError)
        said["id"] = why.id if isinstance(why, Fp8ctlError) else ""
        said["hint"] = str(getattr(why, "hint", None) or "")
        said["message"] = str(why) if known else f"{type(why).__name__}: {why}"
    return said


def _packed(
    word: Word, why: BaseException | None, names: Sequence[str] = (), note: str = ""
) -> torch.Tensor:
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    shown = f"{len(names)} to {names[-1]}" if names else "no more"
    said = {**_said(word, why), "names": digest, "shown": shown}
    if note:
        said["note"] = note
    while len(data := json.dumps(said).encode()) > _LENGTH:
        longest = max(said, key=lambda key: len(said[key]))
        said[longest] = said[longest][: len(said[longest]) // 2]
    return torch.frombuffer(bytearray(data.ljust(_LENGTH)), dtype=torch.uint8)


def _unpacked(text: torch.Tensor) -> dict[str, str]:
    said: dict[str, str] = json.loads(bytes(text.tolist()))
    return said


def _error_of(rank: int, said: dict[str, str]) -> Fp8ctlError:
    kinds: dict[str, type[Fp8ctlError]]
    kinds = {one.id: one for one in vars(errors).values() if _is_kind(one)}
    kind = kinds.get(said.get("id", ""), ConflictError)
    return kind(
        f"rank {rank} ended the stream before its end: {said.get('message', '')}",
        hint=said.get("hint") or f"see the error of rank {rank}",
        data={"rank": rank},
    )


def _is_kind(one: object) -> bool:
    return isinstance(one, type) and issubclass(one, Fp8ctlError)
