"""Weights as a stream: 16-bit tensors in, FP8 codes and scales out, in order.

`quantize_weights` stands between a trainer and whatever carries weights to a server. It
takes (name, tensor) pairs, from a sync or an async iterator, and gives what the FP8
checkpoint of the plan holds under these names: codes, then scales; what stays in 16 bits as
it came. Tensors are taken in buckets, which is what the kernels quantise in one launch and
all the memory that is used. Nothing is passed on unquantised in place of a failure.

Under FSDP all ranks go through the stream: each tensor is gathered by all, quantised and
given by one. Runs in a trainer's interpreter: torch and the standard library. Python 3.10.
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import formats, policy
from fp8ctl.errors import ConflictError, PlanDoesNotFitError, UsageError
from fp8ctl.formats import BlockSize, Mode, RecipeName
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.groups import PER_TENSOR, Groups, block
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.manifest import Plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable

    Named = tuple[str, torch.Tensor]

BUCKET_BYTES = 512 << 20


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
                    for one in self._taker.take(item):
                        yield one
            else:
                for item in source:
                    for one in self._taker.take(item):
                        yield one
            for one in self._taker.end():
                yield one
        finally:
            self._taker.leave()
            await _aclose(source)


@dataclass(frozen=True)
class _Form:
    """What becomes of tensors.

    Attributes:
        quantized: says whether a name of this shape becomes FP8; raises where it cannot be.
        names: all that have to come; None: nobody knows.
    """

    groups: Groups
    mode: Mode
    quantized: Callable[[str, torch.Size], bool]
    names: frozenset[str] | None
    recipe: RecipeName = formats.RECIPE


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
                raise ConflictError(
                    f"{name} is not in the plan of {plan.model.name}",
                    hint="give the names of the checkpoint that was planned",
                    data={"tensor": name},
                )
            return False
        if tuple(shape) != one.shape:
            raise PlanDoesNotFitError(
                f"{name} has shape {list(shape)}, planned {list(one.shape)}",
                hint="plan the model that is trained",
                data={"tensor": name},
            )
        return one.quantize

    groups = _groups(plan.mode, plan.block)
    return _Form(groups, plan.mode, quantized, frozenset(planned), plan.recipe)


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
    ) -> None:
        self._form, self._limit = form, bucket_bytes
        self._device, self._dtype = device, dtype
        self._complete, self._ranks = complete, ranks
        self._held: list[tuple[str, torch.Tensor, bool]] = []
        self._bytes = 0
        self._came: set[str] = set()
        # True between a bucket's beginning and the word of the source that it is done.
        self._open = False

    def take(self, item: Any) -> Iterator[Named]:
        """Take a tensor; give what a full bucket becomes."""
        try:
            name, tensor = item
        except (TypeError, ValueError):
            raise TypeError(f"{type(item).__name__} where (name, tensor) was expected") from None
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = f"({type(name).__name__}, {type(tensor).__name__})"
            raise TypeError(f"{found} where (name, tensor) was expected")
        if name in self._came:
            raise ConflictError(f"{name} comes a second time", data={"tensor": name})
        self._came.add(name)
        becomes_fp8 = self._form.quantized(name, tensor.shape)
        self._held.append((name, tensor, becomes_fp8))
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= self._limit:
            yield from self._bucket()

    def end(self) -> Iterator[Named]:
        """Give what the last bucket becomes, when no more tensor comes.

        Raises:
            ConflictError: planned tensors did not come.
        """
        absent = sorted((self._form.names or frozenset()) - self._came) if self._complete else []
        if absent:
            raise ConflictError(
                f"{len(absent)} tensors of the plan did not come, such as {absent[0]}",
                hint="complete=False sends a part",
                data={"absent": absent[:20]},
            )
        if self._held:
            yield from self._bucket()

    def leave(self) -> None:
        """Tell ranks that wait for this one's word that there will be none."""
        self._held.clear()
        if self._open and self._ranks is not None:
            self._open = False
            _tell(self._ranks, done=False)

    def _bucket(self) -> Iterator[Named]:
        held, self._held, self._bytes = self._held, [], 0
        ranks = self._ranks
        gives = ranks is None or torch.distributed.get_rank() == ranks.source
        if ranks is not None:
            _meet(ranks)
            self._open = gives
        # A tensor may be a part of one until here; gathering is the same order on all ranks.
        whole = [(name, self._whole(tensor, gives), fp8) for name, tensor, fp8 in held]
        del held
        if gives:
            yield from self._become([(name, t, fp8) for name, t, fp8 in whole if t is not None])
        if ranks is not None:
            self._open = False
            _tell(ranks, done=True)

    @torch.no_grad()
    def _whole(self, tensor: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        moved: Any = tensor.detach()
        if self._device is not None:
            moved = moved.to(self._device)
        if hasattr(moved, "full_tensor"):
            moved = moved.full_tensor()
        if not wanted:
            return None
        if self._dtype is not None and moved.is_floating_point():
            moved = moved.to(self._dtype)
        whole: torch.Tensor = moved
        return whole

    @torch.no_grad()
    def _become(self, bucket: list[tuple[str, torch.Tensor, bool]]) -> Iterator[Named]:
        by_device: dict[torch.device, list[int]] = {}
        for i, (_, tensor, fp8) in enumerate(bucket):
            if fp8:
                by_device.setdefault(tensor.device, []).append(i)
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for those in by_device.values():
            made.update(self._quantize(bucket, those))
        for i, (name, tensor, _) in enumerate(bucket):
            if i not in made:
                yield name, tensor
                continue
            codes, scales = made.pop(i)
            yield name, codes
            yield formats.scale_name(name, self._form.mode), scales

    def _quantize(
        self, bucket: list[tuple[str, torch.Tensor, bool]], those: list[int]
    ) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        xs = [bucket[i][1] for i in those]
        try:
            made = kernels.quantize_many(xs, self._form.groups, self._form.recipe)
            return iter([*zip(those, made, strict=True)])
        except NonFiniteError as e:
            name = bucket[those[e.tensor or 0]][0]
            raise PlanDoesNotFitError(
                f"{name}: non-finite value {e.value} at index {list(e.index)};"
                " FP8 has no code for it",
                hint="look at the optimiser's step: one such value spoils its whole block",
                data={"tensor": name, "index": list(e.index)},
            ) from e


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
