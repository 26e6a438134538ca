"""A few numbers on their way from a device: there when it has come so far, whatever follows.

`tolist` of a tensor on a GPU waits for all that is queued there until it is called. Who queues the
next work before he looks at these numbers would wait for that as well.
"""

from __future__ import annotations

from typing import Any

import torch


class Fetched:
    """The numbers of a tensor, as they are when the device has done what is queued by now."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Queue a copy to the host, on the current stream.

        Args:
            tensor: small; on a CPU it is kept as it is.
        """
        self._reached: Any = None
        self._there = tensor
        if tensor.is_cuda:
            # torch gives pinned memory for this, of blocks that it keeps and uses again.
            self._there = tensor.to("cpu", non_blocking=True)
            cuda: Any = torch.cuda
            self._reached = cuda.Event()
            self._reached.record(cuda.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        """Wait for the copy, and return its numbers."""
        if self._reached is not None:
            self._reached.synchronize()
        found: list[Any] = self._there.tolist()
        return found
