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

import datetime
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8ctl import formats, policy
from fp8ctl.errors import ConflictError, PlanDoesNotFitError, UsageError
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.groups import PER_TENSOR, Groups, block
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.manifest import Plan
from fp8ctl.wire import ALIGN, Slot

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Iterable, Sequence
    from contextlib import AbstractContextManager

    Named = tuple[str, torch.Tensor]

BUCKET_BYTES = 512 << 20
#: As a plan spells what a stream rounds to; other dtypes stay as they come.
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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


class Placing(Protocol):
    """A push, as the stream sees it.

    Attributes:
        limit: bytes of outputs that are placed together; a larger tensor comes alone.
    """

    limit: int

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
    taker = _Taker(_form(plan), bucket_bytes, where, dtype, complete, ranks)
    return Stream(named_tensors, taker)


def placed_weights(
    named_tensors: Iterable[Named] | AsyncIterable[Named],
    plan: Plan | None,
    placing: Placing,
    *,
    dtype: torch.dtype | None = None,
    complete: bool = True,
    ranks: Ranks | None = None,
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

    Returns:
        As `quantize_weights`; it raises what that does. A name that is neither in the plan nor a
        tied head is a ConflictError.
    """
    form = _form_of_push(plan, dtype)
    taker = _Taker(form, placing.limit, None, None, complete, ranks, placing)
    return Stream(named_tensors, taker)


def tied_head(plan: Plan) -> tuple[str, str] | None:
    """Return the names of an output head that is its embedding, and of that; None: there is none.

    `lm_head.weight` of a checkpoint that has none: the plan does not list it, and trainers
    give it all the same.
    """
    names = {tensor.name for tensor in plan.tensors}
    if any(name.endswith("lm_head.weight") for name in names):
        return None
    for name in names:
        if name.endswith("model.embed_tokens.weight"):
            return name.removesuffix("model.embed_tokens.weight") + "lm_head.weight", name
    return None


class Stream:
    """Quantised tensors; made by `quantize_weights`.

    Ending it early, by `close`, `aclose` or a `with`, closes the source, too; so does a failure.
    """

    def __init__(self, source: Iterable[Named] | AsyncIterable[Named], taker: _Taker) -> None:
        self._source, self._taker = source, taker
        self._sync: Iterator[Named] | None = None
        self._async: AsyncIterator[Named] | None = None

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

    def __exit__(self, *error: object) -> None:
        """End it."""
        self.close()

    async def __aenter__(self) -> Stream:
        """Return itself."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """End it."""
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


@dataclass(frozen=True)
class _Form:
    """What becomes of tensors.

    Attributes:
        quantized: says whether a name of this shape becomes FP8; raises where it cannot be.
        names: all that have to come; None: nobody knows.
        dtype: says what a tensor of this name is rounded to; None: nothing.
    """

    groups: Groups
    mode: Mode
    quantized: Callable[[str, torch.Size], bool]
    names: frozenset[str] | None
    dtype: Callable[[str], torch.dtype | None] = lambda _: None


def _form_of_push(plan: Plan | None, dtype: torch.dtype | None) -> _Form:
    if plan is None:
        return _Form(PER_TENSOR, Mode.PER_TENSOR, lambda name, shape: False, None)
    planned = {tensor.name: tensor for tensor in plan.tensors}
    # A head that does not come may be tied in the engine, too: the server knows.
    names = frozenset(name for name in planned if not name.endswith("lm_head.weight"))
    tie = tied_head(plan)
    if tie is not None:
        planned[tie[0]] = planned[tie[1]]._replace(name=tie[0])

    def quantized(name: str, shape: torch.Size) -> bool:
        one = planned.get(name)
        if one is None:
            raise _stranger(name, plan)
        if tuple(shape) != one.shape:
            raise _misshapen(name, shape, one.shape)
        return one.quantize

    def rounded(name: str) -> torch.dtype | None:
        one = planned[name]
        return dtype if dtype is not None and one.quantize else _FLOATS.get(one.dtype)

    return _Form(_groups(plan.mode, plan.block), plan.mode, quantized, names, rounded)


def _form(plan: Plan | Mapping[str, Any]) -> _Form:
    if isinstance(plan, Mapping) and "quantization_config" in plan:
        return _form_of_config(plan)
    if isinstance(plan, Mapping):
        plan = Plan.from_json(plan)
    if not isinstance(plan, Plan):
        raise UsageError(
            f"{type(plan).__name__} where a plan or a configuration was expected",
            hint="quantize_weights(named_tensors, fp8ctl.planning.make_plan(...))",
        )
    planned = {tensor.name: tensor for tensor in plan.tensors}
    family = policy.family_of({"model_type": plan.model_type})

    def quantized(name: str, shape: torch.Size) -> bool:
        one = planned.get(name)
        if one is None:
            # A tied head, a buffer: what the policy keeps anyway may come along.
            if policy.decide(family, name, shape).quantize:
                raise _stranger(name, plan)
            return False
        if tuple(shape) != one.shape:
            raise _misshapen(name, shape, one.shape)
        return one.quantize

    return _Form(_groups(plan.mode, plan.block), plan.mode, quantized, frozenset(planned))


def _stranger(name: str, plan: Plan) -> ConflictError:
    return ConflictError(
        f"{name} is not in the plan of {plan.model.name}",
        hint="give the names of the checkpoint that was planned",
        data={"tensor": name},
    )


def _misshapen(name: str, shape: Sequence[int], planned: tuple[int, ...]) -> PlanDoesNotFitError:
    return PlanDoesNotFitError(
        f"{name} has shape {list(shape)}, planned {list(planned)}",
        hint="plan the model that is trained",
        data={"tensor": name},
    )


def _form_of_config(config: Mapping[str, Any]) -> _Form:
    found = config["quantization_config"]
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method != "fp8":
        raise UsageError(
            f"quant_method {method!r} in quantization_config; expected 'fp8'",
            hint="give the plan, or the config.json of an FP8 checkpoint",
        )
    sides = found.get("weight_block_size")
    mode = Mode.PER_TENSOR if sides is None else Mode.BLOCK
    size = None if sides is None else BlockSize(int(sides[0]), int(sides[1]))
    family = policy.family_of(config)
    kept = {*found.get("modules_to_not_convert", ()), *found.get("ignored_layers", ())}

    def quantized(name: str, shape: torch.Size) -> bool:
        module = name.removesuffix(".weight")
        return module not in kept and policy.decide(family, name, shape).quantize

    return _Form(_groups(mode, size), mode, quantized, None)


def _groups(mode: Mode, size: BlockSize | None) -> Groups:
    return PER_TENSOR if size is None or mode is not Mode.BLOCK else block(size.n, size.k)


class _Taker:
    """Takes tensors one by one and gives what they become, bucket by bucket."""

    def __init__(
        self,
        form: _Form,
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
        self._held: list[tuple[str, torch.Tensor, bool]] = []
        self._bytes = 0
        self._came: set[str] = set()
        # True between a bucket's beginning and the word of the source that it is done.
        self._open = False

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
        becomes_fp8 = self._form.quantized(name, tensor.shape)
        one = (name, tensor, becomes_fp8)
        full: Iterable[Named] = ()
        if self.placing is None:
            size = tensor.numel() * tensor.element_size()
        else:
            # A place is as large as it is: what would not fit any more is the next one's.
            size = sum(-(-slot.nbytes // ALIGN) * ALIGN for slot in self._slots(one))
            if self._held and self._bytes + size > self._limit:
                full = self._bucket(self._taken())
        self._held.append(one)
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
        return self._bucket(self._taken()) if self._held else ()

    def leave(self) -> None:
        """Tell ranks that wait for this one's word that there will be none."""
        self._held.clear()
        if self._open and self._ranks is not None:
            self._open = False
            _tell(self._ranks, done=False)

    def _taken(self) -> list[tuple[str, torch.Tensor, bool]]:
        held, self._held, self._bytes = self._held, [], 0
        return held

    def _bucket(self, held: list[tuple[str, torch.Tensor, bool]]) -> Iterator[Named]:
        ranks = self._ranks
        gives = ranks is None or torch.distributed.get_rank() == ranks.source
        if ranks is not None:
            _meet(ranks)
            self._open = gives
        # A tensor may be a part of one until here; gathering is the same order on all ranks.
        with self._stage("gather"):
            whole = [(name, self._whole(name, t, fp8, gives), fp8) for name, t, fp8 in held]
        held.clear()
        if gives:
            yield from self._become([(name, t, fp8) for name, t, fp8 in whole if t is not None])
        if ranks is not None:
            self._open = False
            _tell(ranks, done=True)

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.placing is None else self.placing.stage(name)

    def _slots(self, one: tuple[str, torch.Tensor, bool]) -> list[Slot]:
        """Return the places that what a tensor becomes needs."""
        name, tensor, fp8 = one
        shape = tuple(tensor.shape)
        if not fp8:
            rounded = self._form.dtype(name) if tensor.is_floating_point() else None
            return [Slot(name, _spelled(rounded or tensor.dtype), shape)]
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
    def _become(self, bucket: list[tuple[str, torch.Tensor, bool]]) -> Iterator[Named]:
        places = self._places(bucket)
        by_device: dict[torch.device, list[int]] = {}
        for i, (_, tensor, fp8) in enumerate(bucket):
            if fp8:
                by_device.setdefault(tensor.device, []).append(i)
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with self._stage("quantise"):
            for those in by_device.values():
                made.update(self._quantize(bucket, those, places))
            for i, (place,) in ((i, p) for i, p in places.items() if len(p) == 1):
                bucket[i] = (bucket[i][0], place.copy_(bucket[i][1]), False)
        for i, (name, tensor, _) in enumerate(bucket):
            if i not in made:
                yield name, tensor
                continue
            codes, scales = made.pop(i)
            yield name, codes
            yield formats.scale_name(name, self._form.mode), scales

    def _places(
        self, bucket: list[tuple[str, torch.Tensor, bool]]
    ) -> dict[int, tuple[torch.Tensor, ...]]:
        """Return where what the tensors become is to be written, where that matters."""
        if self.placing is None:
            return {}
        slots = [self._slots(one) for one in bucket]
        places = iter(self.placing.place([slot for those in slots for slot in those]))
        return {i: tuple(islice(places, len(those))) for i, those in enumerate(slots)}

    def _quantize(
        self,
        bucket: list[tuple[str, torch.Tensor, bool]],
        those: list[int],
        places: dict[int, tuple[torch.Tensor, ...]],
    ) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        xs = [bucket[i][1] for i in those]
        out: Any = [places[i] for i in those] if places else None
        try:
            made = kernels.quantize_many(xs, self._form.groups, out=out)
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


def _meet(ranks: Ranks) -> None:
    """Wait until all ranks are here; a rank that is dead shows before a collective hangs."""
    try:
        torch.distributed.monitored_barrier(
            ranks.group, timeout=datetime.timedelta(seconds=ranks.timeout)
        )
    except RuntimeError as e:
        raise TimeoutError(f"not all ranks came within {ranks.timeout:g} s: {e}") from e


def _tell(ranks: Ranks, *, done: bool) -> None:
    """Say, on the source, how a bucket ended; hear it on the others.

    Raises:
        TimeoutError: the source does not say it in time.
        ConflictError: it failed, or its consumer ended the stream.
    """
    distributed = torch.distributed
    here = distributed.get_rank()
    word = torch.tensor([int(done)])
    work = distributed.broadcast(word, ranks.source, group=ranks.group, async_op=True)
    try:
        work.wait(datetime.timedelta(seconds=ranks.timeout))
    except RuntimeError as e:
        if here == ranks.source:
            return  # nobody is there to hear it; who reads the stream has the error
        told = f"rank {ranks.source} did not end its bucket within {ranks.timeout:g} s: {e}"
        raise TimeoutError(told) from e
    if here != ranks.source and not int(word):
        raise ConflictError(
            f"rank {ranks.source} ended the stream before its end",
            hint=f"see the error of rank {ranks.source}",
        )


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
