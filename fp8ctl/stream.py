"""Weights as a stream: 16-bit tensors in, FP8 codes and scales out, in order.

`quantize_weights` stands between a trainer and whatever carries weights to a server. It
takes (name, tensor) pairs, from a sync or an async iterator, and gives what the FP8
checkpoint of the plan holds under these names: codes, then scales; what stays in 16 bits as
it came. Tensors are taken in buckets, which is what the kernels quantise in one launch and
all the memory that is used. Nothing is passed on unquantised in place of a failure.

A push has the outputs written where it sends them from (`placed_weights`); all else is the
same stream.

Under FSDP all ranks go through the stream: each tensor is gathered by all, quantised and
given by one. Runs in a trainer's interpreter: torch and the standard library. Python 3.10.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import forms
from fp8ctl.errors import UsageError
from fp8ctl.ranks import Ranks
from fp8ctl.taker import Placing, Taker

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterable,
        AsyncIterator,
        Callable,
        Iterable,
        Iterator,
        Mapping,
    )

    from fp8ctl.forms import Form
    from fp8ctl.manifest import Plan

    Named = tuple[str, torch.Tensor]

__all__ = ["BUCKET_BYTES", "Placing", "Ranks", "Stream", "placed_weights", "quantize_weights"]

BUCKET_BYTES = 512 << 20


def quantize_weights(
    named_tensors: Iterable[Named] | AsyncIterable[Named],
    plan: Plan | Mapping[str, Any],
    *,
    bucket_bytes: int = BUCKET_BYTES,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    complete: bool = True,
    ranks: Ranks | None = None,
) -> Stream:
    """Return the tensors of an FP8 checkpoint, made from those of a 16-bit one as they come.

    Args:
        named_tensors: names as in the checkpoint, and tensors of any device and strides;
            DTensors are gathered.
        plan: a plan, its manifest as a mapping, or a config.json with a `quantization_config`.
        bucket_bytes: of weights that are taken together, before they are quantised.
        device: where to quantise; None: where a tensor lies. Kept tensors go there, too.
        dtype: what floating tensors are rounded to first, as FP32 master weights are for a
            server that holds BF16; None: nothing.
        complete: at the end, a tensor of the plan that did not come is an error.
        ranks: for several processes that hold parts of each tensor.

    Returns:
        An iterator, `for` where the source has one, and `async for` in any case. On ranks
        that are not the source it gives nothing, and has to be gone through all the same.

    Raises:
        UsageError: the plan cannot be understood, or a bucket size is not positive.

    While it runs:
        PlanDoesNotFitError: a weight holds NaN or Inf, or has another shape than planned.
        ConflictError: a name that the plan does not have, one that comes twice, or, at the
            end, planned ones that did not come.
        TypeError: what came is no pair of a name and a tensor.
        TimeoutError: a rank did not come.
    """
    if bucket_bytes < 1:
        raise UsageError(f"a bucket of {bucket_bytes} bytes", hint="bucket_bytes=512 << 20")
    where = None if device is None else torch.device(device)
    taker = Taker(forms.of(plan), bucket_bytes, where, dtype, complete, ranks)
    return Stream(named_tensors, taker)


def placed_weights(
    named_tensors: Iterable[Named] | AsyncIterable[Named],
    form: Form,
    placing: Placing,
    *,
    complete: bool = True,
    ranks: Ranks | None = None,
    leaving: Callable[[BaseException], None] | None = None,
) -> Stream:
    """Return the stream of a push: its tensors lie where `placing` put them, and it gives none.

    Tensors are rounded to the dtypes of the plan first: a server's 16-bit checkpoint has these,
    and codes made of anything else would be other codes than those of its FP8 form.

    Args:
        named_tensors, complete, ranks: as in `quantize_weights`. An output head that the plan
            does not have, since it is tied, may come.
        form: of the push.
        placing: gives the memory.
        leaving: is told why nothing more comes, before that waits for the other ranks.

    Returns:
        As `quantize_weights`; it raises what that does. A name that is neither in the plan nor a
        tied head is a ConflictError.
    """
    return Stream(
        named_tensors,
        Taker(form, placing.limit, None, None, complete, ranks, placing, leaving),
    )


class Stream:
    """Quantised tensors; made by `quantize_weights`.

    Ending it early, by `close`, `aclose` or a `with`, closes the source, too; so does a failure.
    """

    def __init__(self, source: Iterable[Named] | AsyncIterable[Named], taker: Taker) -> None:
        self._source, self._taker = source, taker
        taker.keeps = isinstance(source, Collection)
        self._sync: Iterator[Named] | None = None
        self._async: AsyncIterator[Named] | None = None

    @property
    def met(self) -> bool:
        """Whether all ranks have met behind the last tensor; False where there is one process."""
        return self._taker.met

    @property
    def over(self) -> bool:
        """Whether all ranks know that no more comes; True where there is one process."""
        return self._taker.over

    def __iter__(self) -> Iterator[Named]:
        """Return the tensors; of an async source use `async for`."""
        if hasattr(self._source, "__aiter__"):
            raise TypeError("the source is asynchronous: use `async for`")
        if self._sync is None:
            self._sync = self._once(self._pull())
        return self._sync

    def __next__(self) -> Named:
        """Return the next tensor."""
        return next(iter(self))

    def __aiter__(self) -> AsyncIterator[Named]:
        """Return the tensors, of a sync source as well."""
        if self._async is None:
            self._async = self._once(self._apull())
        return self._async

    async def __anext__(self) -> Named:
        """Return the next tensor."""
        return await anext(aiter(self))

    def close(self) -> None:
        """End the stream and its source."""
        if hasattr(self._source, "__aiter__"):
            raise TypeError("the source is asynchronous: use `await stream.aclose()`")
        iterator: Any = iter(self)
        iterator.close()
        _close(self._source)

    async def aclose(self) -> None:
        """End the stream and its source."""
        iterator: Any = aiter(self)
        await iterator.aclose()
        await _aclose(self._source)

    def __enter__(self) -> Stream:
        """Return itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End it; other ranks are told the error."""
        self._taker.why = error
        self.close()

    async def __aenter__(self) -> Stream:
        """Return itself."""
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End it; other ranks are told the error."""
        self._taker.why = error
        await self.aclose()

    def _once(self, made: Any) -> Any:
        if self._sync is not None or self._async is not None:
            raise TypeError("the stream is being read already, and a stream is read once")
        return made

    def _pull(self) -> Iterator[Named]:
        source: Any = iter(self._source)  # type: ignore[arg-type]
        try:
            for item in source:
                yield from self._taker.take(item)
            yield from self._taker.end()
        finally:
            self._taker.leave()
            _close(source)

    async def _apull(self) -> AsyncIterator[Named]:
        source: Any = self._source
        is_async = hasattr(source, "__aiter__")
        source = aiter(source) if is_async else iter(source)
        try:
            if is_async:
                async for item in source:
                    for one in await self._flow(self._taker.take(item)):
                        yield one
            else:
                for item in source:
                    for one in await self._flow(self._taker.take(item)):
                        yield one
            for one in await self._flow(self._taker.end()):
                yield one
        finally:
            self._taker.leave()
            await _aclose(source)

    async def _flow(self, given: Iterable[Named]) -> Iterable[Named]:
        """Return what is given; in a push it is waited for elsewhere than in the event loop."""
        placing = self._taker.placing
        if placing is None or not given:
            return given
        return await placing.in_thread(lambda: [*given])


def _close(source: Any) -> None:
    close = getattr(source, "close", None)
    if close is not None and hasattr(source, "__next__"):
        close()


async def _aclose(source: Any) -> None:
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()
    else:
        _close(source)
