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

import sys
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8ctl import formats, forms
from fp8ctl.errors import ConflictError, Fp8ctlError, PlanDoesNotFitError, UsageError
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.ranks import Ranks, leave, meet, tell
from fp8ctl.wire import ALIGN, DTYPES, Slot

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterable,
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from contextlib import AbstractContextManager

    from fp8ctl.forms import Form
    from fp8ctl.manifest import Plan

    Named = tuple[str, torch.Tensor]
    #: Name, tensor, whether it becomes FP8, and the places that it needs in a push.
    _Held = tuple[str, torch.Tensor, bool, Sequence[Slot]]

__all__ = ["BUCKET_BYTES", "Placing", "Ranks", "Stream", "placed_weights", "quantize_weights"]

BUCKET_BYTES = 512 << 20


class Placing(Protocol):
    """A push, as the stream sees it.

    Attributes:
        limit: bytes of outputs that are placed together; a larger tensor comes alone.
        patience: seconds that a place may have to be waited for.
    """

    limit: int
    patience: float

    @property
    def device(self) -> torch.device:
        """Where weights are quantised."""

    def wants(self, name: str) -> bool:
        """Say whether a tensor of this name is taken at all."""

    def place(self, slots: Sequence[Slot]) -> Sequence[torch.Tensor]:
        """Return memory for these tensors; may wait until there is some."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return what measures a stage of the work."""

    def in_thread(self, work: Callable[[], list[Named]]) -> Awaitable[list[Named]]:
        """Do what would block an event loop; ends with `work`, also when it is cancelled."""


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
    taker = _Taker(forms.of(plan), bucket_bytes, where, dtype, complete, ranks)
    return Stream(named_tensors, taker)


def placed_weights(
    named_tensors: Iterable[Named] | AsyncIterable[Named],
    plan: Plan | None,
    placing: Placing,
    *,
    dtype: torch.dtype | None = None,
    complete: bool = True,
    ranks: Ranks | None = None,
    quantized: bool = False,
) -> Stream:
    """Return the stream of a push: its tensors lie where `placing` put them.

    Tensors are rounded to the dtypes of the plan first: a server's 16-bit checkpoint has these,
    and codes made of anything else would be other codes than those of its FP8 form.

    Args:
        named_tensors, complete, ranks: as in `quantize_weights`. An output head that the plan
            does not have, since it is tied, may come.
        plan: None: all is kept.
        placing: gives the memory.
        dtype: what weights are rounded to before they are quantised, instead of the plan's.
        quantized: what comes is the plan's FP8 form already: codes, each before its scale.

    Returns:
        As `quantize_weights`; it raises what that does. A name that is neither in the plan nor a
        tied head is a ConflictError.
    """
    form = forms.of_made(plan) if quantized and plan is not None else forms.of_push(plan, dtype)
    taker = _Taker(form, placing.limit, None, None, complete, ranks, placing)
    return Stream(named_tensors, taker)


class Stream:
    """Quantised tensors; made by `quantize_weights`.

    Ending it early, by `close`, `aclose` or a `with`, closes the source, too; so does a failure.
    """

    def __init__(self, source: Iterable[Named] | AsyncIterable[Named], taker: _Taker) -> None:
        self._source, self._taker = source, taker
        self._sync: Iterator[Named] | None = None
        self._async: AsyncIterator[Named] | None = None

    @property
    def ended(self) -> bool:
        """Whether all tensors were given, and all ranks know of each other that they were."""
        return self._taker.ended

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


class _Taker:
    """Takes tensors one by one and gives what they become, bucket by bucket."""

    def __init__(
        self,
        form: Form,
        bucket_bytes: int,
        device: torch.device | None,
        dtype: torch.dtype | None,
        complete: bool,
        ranks: Ranks | None,
        placing: Placing | None = None,
    ) -> None:
        self._form, self._limit = form, bucket_bytes
        self._device, self._dtype = device, dtype
        self._complete, self._ranks = complete, ranks
        self.placing = placing
        self._held: list[_Held] = []
        self._bytes = 0
        self._came: set[str] = set()
        #: Of who reads the stream, for the other ranks.
        self.why: BaseException | None = None
        # True between a bucket's beginning and the word of the source that it is done.
        self._open = False
        # True when all ranks know that no more comes; `ended`: since all has come.
        self._over = ranks is None
        self.ended = False

    def take(self, item: Any) -> Iterable[Named]:
        """Take a tensor; return what a full bucket becomes, which is made while it is read."""
        try:
            name, tensor = item
        except (TypeError, ValueError):
            raise TypeError(f"{type(item).__name__} where (name, tensor) was expected") from None
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = f"({type(name).__name__}, {type(tensor).__name__})"
            raise TypeError(f"{found} where (name, tensor) was expected")
        if self.placing is not None and not self.placing.wants(name):
            return ()
        if name in self._came:
            raise ConflictError(f"{name} comes a second time", data={"tensor": name})
        self._came.add(name)
        codes = self._form.codes(name)
        if codes and (not self._held or self._held[-1][0] != codes):
            raise ConflictError(
                f"{name} does not come right after {codes}, whose scale it is",
                hint="give codes, each followed by its scale",
                data={"tensor": name},
            )
        becomes_fp8 = self._form.quantized(name, tensor.shape)
        slots: Sequence[Slot] = ()
        full: Iterable[Named] = ()
        if self.placing is None:
            size = tensor.numel() * tensor.element_size()
        else:
            # A place is as large as it is: what would not fit any more is the next one's.
            slots = self._slots(name, tensor, becomes_fp8)
            size = sum(-(-slot.nbytes // ALIGN) * ALIGN for slot in slots)
            size += self._form.ahead(name)
            if self._held and self._bytes + size > self._limit:
                full = self._bucket(self._taken())
        self._held.append((name, tensor, becomes_fp8, slots))
        self._bytes += size
        if self.placing is None and self._bytes >= self._limit:
            full = self._bucket(self._taken())
        return full

    def end(self) -> Iterable[Named]:
        """Return what the last bucket becomes, when no more tensor comes.

        Raises:
            ConflictError: planned tensors did not come.
        """
        absent = sorted((self._form.names or frozenset()) - self._came) if self._complete else []
        if self.placing is not None:
            absent = [name for name in absent if self.placing.wants(name)]
        if absent:
            raise ConflictError(
                f"{len(absent)} tensors of the plan did not come, such as {absent[0]}",
                hint="complete=False sends a part",
                data={"absent": absent[:20]},
            )
        return self._last() if self._held or self._ranks is not None else ()

    def leave(self) -> None:
        """Tell the other ranks, where they do not know yet, that nothing more comes."""
        self._held.clear()
        ranks, over, self._over = self._ranks, self._over, True
        if ranks is None or over:
            return
        failed = sys.exc_info()[1]
        why = self.why if failed is None or isinstance(failed, GeneratorExit) else failed
        why = why or ConflictError("who read it went away")
        if not self._open:
            leave(ranks, why)
        elif ranks.is_source:
            tell(ranks, why)
        else:
            # The source goes on, and hears it at the next bucket; or is gone itself.
            with suppress(TimeoutError, Fp8ctlError):
                tell(ranks)
                leave(ranks, why)

    def _taken(self) -> list[_Held]:
        held, self._held, self._bytes = self._held, [], 0
        return held

    def _bucket(self, held: list[_Held]) -> Iterator[Named]:
        ranks = self._ranks
        gives = ranks is None or ranks.is_source
        if ranks is not None:
            with self._among_ranks():
                meet(ranks, "more", names=[name for name, *_ in held])
            self._open = True
        # A tensor may be a part of one until here; gathering is the same order on all ranks.
        with self._stage("gather"):
            whole = [(n, self._whole(n, t, fp8, gives), fp8, s) for n, t, fp8, s in held]
        held.clear()
        if gives:
            yield from self._become([(n, t, fp8, s) for n, t, fp8, s in whole if t is not None])
        if ranks is not None:
            with self._among_ranks():
                tell(ranks, patience=0.0 if self.placing is None else self.placing.patience)
            self._open = False

    def _last(self) -> Iterator[Named]:
        """Give what the last bucket becomes, and see all ranks at the end."""
        if self._held:
            yield from self._bucket(self._taken())
        if self._ranks is not None:
            with self._among_ranks():
                meet(self._ranks, "end")
            self._over = self.ended = True

    @contextmanager
    def _among_ranks(self) -> Iterator[None]:
        """What is raised here, all ranks that are there know."""
        try:
            yield
        except (TimeoutError, Fp8ctlError):
            self._over = True
            raise

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.placing is None else self.placing.stage(name)

    def _slots(self, name: str, tensor: torch.Tensor, fp8: bool) -> list[Slot]:
        """Return the places that what a tensor becomes needs."""
        shape = tuple(tensor.shape)
        if not fp8:
            rounded = self._form.dtype(name) if tensor.is_floating_point() else None
            spelled = _spelled(rounded or tensor.dtype)
            if spelled not in DTYPES:
                raise PlanDoesNotFitError(
                    f"{name} is {spelled}, which no server takes; one of {', '.join(DTYPES)}",
                    hint="cast it before it is sent",
                    data={"tensor": name},
                )
            return [Slot(name, spelled, shape)]
        scale = formats.scale_name(name, self._form.mode)
        return [
            Slot(name, "float8_e4m3fn", shape),
            Slot(scale, "float32", tuple(self._form.groups.scale_shape(shape))),
        ]

    @torch.no_grad()
    def _whole(
        self, name: str, tensor: torch.Tensor, fp8: bool, wanted: bool
    ) -> torch.Tensor | None:
        moved: Any = tensor.detach()
        if hasattr(moved, "full_tensor"):
            # Shards that are kept on the CPU are gathered where the ranks' group is.
            there = moved.device_mesh.device_type
            if moved.device.type != there:
                moved = moved.to(there)
            moved = moved.full_tensor()
        if not wanted:
            return None
        if self.placing is not None:
            moved = moved.to(self.placing.device) if fp8 else moved  # what is kept is copied there
        elif self._device is not None:
            moved = moved.to(self._device)
        rounded = self._dtype or (self._form.dtype(name) if fp8 else None)
        if rounded is not None and moved.is_floating_point():
            moved = moved.to(rounded)
        whole: torch.Tensor = moved
        return whole

    @torch.no_grad()
    def _become(self, bucket: list[_Held]) -> Iterator[Named]:
        places = self._places([slots for *_, slots in bucket])
        by_device: dict[torch.device, list[int]] = {}
        for i, (_, tensor, fp8, _) in enumerate(bucket):
            if fp8:
                by_device.setdefault(tensor.device, []).append(i)
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with self._stage("quantise"):
            for those in by_device.values():
                made.update(self._quantize(bucket, those, places))
            for i, (place,) in ((i, p) for i, p in places.items() if len(p) == 1):
                bucket[i] = (bucket[i][0], place.copy_(bucket[i][1]), False, ())
        for i, (name, tensor, *_) in enumerate(bucket):
            if i not in made:
                yield name, tensor
                continue
            codes, scales = made.pop(i)
            yield name, codes
            yield formats.scale_name(name, self._form.mode), scales

    def _places(self, slots: list[Sequence[Slot]]) -> dict[int, tuple[torch.Tensor, ...]]:
        """Return where what the tensors become is to be written, where that matters."""
        if self.placing is None:
            return {}
        places = iter(self.placing.place([slot for those in slots for slot in those]))
        return {i: tuple(islice(places, len(those))) for i, those in enumerate(slots)}

    def _quantize(
        self,
        bucket: list[_Held],
        those: list[int],
        places: dict[int, tuple[torch.Tensor, ...]],
    ) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        xs = [bucket[i][1] for i in those]
        out: Any = [places[i] for i in those] if places else None
        try:
            made = kernels.quantize_many(xs, self._form.groups, self._form.recipe, out=out)
        except NonFiniteError as e:
            name = bucket[those[e.tensor or 0]][0]
            raise PlanDoesNotFitError(
                f"{name}: non-finite value {e.value} at index {list(e.index)};"
                " FP8 has no code for it",
                hint="look at the optimiser's step: one such value spoils its whole block",
                data={"tensor": name, "index": list(e.index)},
            ) from e
        return iter([*zip(those, made, strict=True)])


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
