"""The one thread in which an asynchronous update blocks, so that the event loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    T = TypeVar("T")


class Aside:
    """Does one thing after the other, in order."""

    def __init__(self, stop: Callable[[], None]) -> None:
        """Start nothing yet.

        Args:
            stop: ends what waits in the thread; called when who awaits it is cancelled.
        """
        self._stop = stop
        self._pool = ThreadPoolExecutor(1, "fp8ctl-push")
        cuda: Any = torch.cuda
        # What the caller queued on its stream comes first.
        self._stream = cuda.current_stream() if cuda.is_initialized() else None

    async def do(self, work: Callable[[], T]) -> T:
        """Do something there; when cancelled, it is ended before anything else happens."""
        future = self._start(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._stop()
            await _end_of(future)
            raise

    async def do_at_last(self, work: Callable[[], None]) -> bool:
        """Do what has to be done, cancelled or not; say whether that was asked meanwhile."""
        future = self._start(work)
        cancelled = await _end_of(future)
        future.result()
        return cancelled

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True)

    def _start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        def there() -> T:
            stream = self._stream
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                return work()

        return asyncio.get_running_loop().run_in_executor(self._pool, there)


async def _end_of(future: asyncio.Future[Any]) -> bool:
    """Wait until something has ended, whatever is asked meanwhile; say whether something was."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    if not future.cancelled():
        future.exception()  # who cancelled has an exception of its own
    return cancelled
