"""The tensors of a bucket, as views of the slot in which the carrier has put it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fp8ctl.carriers.ends import Receiver as Carrier
    from fp8ctl.wire import Entry

    Named = tuple[str, torch.Tensor]
    Open = Callable[[Mapping[str, Any], int, torch.device], Carrier]

#: Views that are kept: more than a model has tensors, in each of the slots.
_MOST_SEEN = 1 << 18


class Slots:
    """The carrier of one rank, where one is open."""

    def __init__(self, opens: Open | None = None) -> None:
        """Open nothing yet.

        Args:
            opens: instead of `carriers.ends.receive`.
        """
        self._opens = opens or _open
        self._carrier: Carrier | None = None
        #: Where a tensor lay, it most often lies again.
        self._seen: dict[tuple[object, ...], torch.Tensor] = {}

    def open(self, offer: Mapping[str, Any], rank: int, device: torch.device) -> None:
        """Open the carrier that a client offers; none may be open.

        Raises:
            Exception: of the carrier, with the reason.
        """
        self._carrier = self._opens(offer, rank, device)

    def close(self) -> None:
        """Close the carrier, if one is open; no tensor of `views` may be in use any more."""
        carrier, self._carrier = self._carrier, None
        self.forget()
        if carrier is not None:
            carrier.close()

    def forget(self) -> None:
        """Hold no tensor that uses the carrier's memory."""
        self._seen.clear()

    def loaded(self) -> None:
        """Say that all which reads the views is launched; the trainer may write when it returns."""
        if self._carrier is not None:
            self._carrier.loaded()

    def arrived(self) -> None:
        """Wait until what `views` has shown before it was there is.

        Raises:
            RuntimeError: no carrier is open any more.
            Exception: of the carrier: bytes did not come.
        """
        self._open_one().arrived()

    def views(
        self, slot: int, nbytes: int, entries: Iterable[Entry], *, here: bool = True
    ) -> list[Named]:
        """Wait until a bucket is there; return its tensors, without a copy.

        Args:
            slot, nbytes: of the bucket.
            entries: what lies in it.
            here: False: a GPU may wait for it instead, before what it is told from now on; bytes
                that are lost then are known by `arrived` alone.

        Raises:
            RuntimeError: no carrier is open.
            Exception: of the carrier: it has no such slot, or the bytes did not come.
        """
        bucket = self._open_one().bucket(slot, nbytes, here=here)
        address, found = bucket.data_ptr(), []
        for entry in entries:
            key = (address, *entry[:4])  # name, dtype, shape, offset
            tensor = self._seen.get(key)
            if tensor is None:
                if len(self._seen) >= _MOST_SEEN:  # other layouts than before
                    self._seen.clear()
                tensor = self._seen[key] = view(bucket, entry)
            found.append((entry.name, tensor))
        return found

    def _open_one(self) -> Carrier:
        if self._carrier is None:
            raise RuntimeError("no carrier is open")
        return self._carrier


def view(bucket: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Return a tensor that lies in a bucket, without a copy."""
    bits = bucket[entry.offset : entry.offset + entry.nbytes]
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return bits.view(dtype).view(entry.shape)


def _open(offer: Mapping[str, Any], rank: int, device: torch.device) -> Carrier:
    from fp8ctl.carriers import ends

    return ends.receive(offer, rank, device)
