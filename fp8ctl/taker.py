"""Tensors are taken one by one, and become FP8 bucket by bucket; `stream` gives them on.

A bucket is what the kernels quantise in one launch and all the memory that is used. Over ranks
each bucket begins with a meeting, and ends with the word of the source that it is done.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8ctl import formats
from fp8ctl.errors import ConflictError, Fp8ctlError, PlanDoesNotFitError
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.ranks import leave, meet, tell
from fp8ctl.wire import ALIGN, DTYPES, Slot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from fp8ctl.forms import Form
    from fp8ctl.ranks import Ranks

    Named = tuple[str, torch.Tensor]
    #: Name, tensor, whether it becomes FP8, and the places that it needs in a push.
    _Held = tuple[str, torch.Tensor, bool, Sequence[Slot]]
    #: Whether it becomes FP8, the dtype that it has or gets where not, and its shape.
    _Kind = tuple[bool, torch.dtype, torch.Size]
    #: dtype, shape, and bytes until the next one may begin.
    _Place = tuple[str, tuple[int, ...], int]

#: Types that are nothing distributed.
_PLAIN = {torch.Tensor, torch.nn.Parameter}


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

    def writing(self, scales: Collection[str], check: Callable[[], object], *, later: bool) -> None:
        """Hear that all which writes to these places is queued; need not wait for it.

        Args:
            scales: names of those that are made here.
            check: waits for them, and raises where one is not finite; what is placed here is to
                be loaded by nobody before. It keeps the tensors that they are made of.
            later: whether more may be placed before `check` is called. Not where the tensors
                that it keeps are nobody else's: they take memory.
        """

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return what measures a stage of the work."""

    def in_thread(self, work: Callable[[], list[Named]]) -> Awaitable[list[Named]]:
        """Do what would block an event loop; ends with `work`, also when it is cancelled."""


class Taker:
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
        leaving: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._form, self._limit = form, bucket_bytes
        self._device, self._dtype = device, dtype
        self._complete, self._ranks = complete, ranks
        self.placing = placing
        self._leaving = leaving
        self._held: list[_Held] = []
        self._bytes = 0
        self._came: set[str] = set()
        #: Most tensors are like one before: dtypes, shapes and bytes of their places.
        self._alike: dict[_Kind, tuple[_Place, ...]] = {}
        #: The source has its tensors whether or not they are taken; others may make each of them.
        self.keeps = False
        #: Of who reads the stream, for the other ranks.
        self.why: BaseException | None = None
        # True between a bucket's beginning and the word of the source that it is done.
        self._open = False
        # `over`: all ranks know that no more comes, or need not; `met`: since all has come.
        self.over = ranks is None
        self.met = False

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
            slots, size = self._slots(name, tensor, becomes_fp8)
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
        ranks, over, self.over = self._ranks, self.over, True
        if ranks is None or over:
            return
        failed = sys.exc_info()[1]
        why = self.why if failed is None or isinstance(failed, GeneratorExit) else failed
        why = why or ConflictError("who read it went away")
        if self._leaving is not None:
            self._leaving(why)
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
                meet(ranks, "more", names=[name for name, *_ in held], patience=self._patience)
            self._open = True
        # A tensor may be a part of one until here; gathering is the same order on all ranks.
        with self._stage("gather"), torch.no_grad():
            where = self._device if self.placing is None else self.placing.device
            whole = [(n, self._whole(n, t, fp8, gives, where), fp8, s) for n, t, fp8, s in held]
        lent = ranks is None and all(
            self._is_lent(one[1], given[1]) for one, given in zip(whole, held, strict=True)
        )
        held.clear()
        if gives:
            made = self._become([(n, t, fp8, s) for n, t, fp8, s in whole if t is not None], lent)
            del whole
            made.reverse()
            while made:  # what was given is no longer kept here
                yield made.pop()
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
                meet(self._ranks, "end", patience=self._patience)
            self.over = self.met = True

    @contextmanager
    def _among_ranks(self) -> Iterator[None]:
        """What is raised here, all ranks that are there know."""
        try:
            yield
        except (TimeoutError, Fp8ctlError):
            self.over = True
            raise

    @property
    def _patience(self) -> float:
        """Seconds that the source may take longer to come: it waits for servers as well."""
        if self.placing is None or self._ranks is None or self._ranks.is_source:
            return 0.0
        return self.placing.patience

    def _is_lent(self, whole: torch.Tensor | None, given: torch.Tensor) -> bool:
        """Say whether a tensor is the source's own, so that to keep it takes no memory."""
        own = self.keeps or isinstance(given, torch.nn.Parameter)
        return own and whole is not None and _same_memory(whole, given)

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.placing is None else self.placing.stage(name)

    def _slots(self, name: str, tensor: torch.Tensor, fp8: bool) -> tuple[list[Slot], int]:
        """Return the places that what a tensor becomes needs, and their bytes."""
        rounded = None if fp8 or not tensor.is_floating_point() else self._form.dtype(name)
        kind = fp8, rounded or tensor.dtype, tensor.shape
        places = self._alike.get(kind)
        if places is None:
            places = self._alike[kind] = self._places_of(name, *kind)
        slots = [Slot(name, *places[0][:2])]
        if fp8:
            slots.append(Slot(formats.scale_name(name, self._form.mode), *places[1][:2]))
        return slots, sum([nbytes for *_, nbytes in places])

    def _places_of(
        self, name: str, fp8: bool, dtype: torch.dtype, shape: torch.Size
    ) -> tuple[_Place, ...]:
        spelled = _spelled(dtype)
        if not fp8 and spelled not in DTYPES:
            raise PlanDoesNotFitError(
                f"{name} is {spelled}, which no server takes; one of {', '.join(DTYPES)}",
                hint="cast it before it is sent",
                data={"tensor": name},
            )
        found = [("float8_e4m3fn" if fp8 else spelled, tuple(shape))]
        if fp8:
            found.append(("float32", tuple(self._form.groups.scale_shape(shape))))
        return tuple(
            (dtype_, sides, -(-math.prod(sides) * DTYPES[dtype_] // ALIGN) * ALIGN)
            for dtype_, sides in found
        )

    def _whole(
        self, name: str, tensor: torch.Tensor, fp8: bool, wanted: bool, where: torch.device | None
    ) -> torch.Tensor | None:
        moved: Any = tensor.detach()
        if type(tensor) not in _PLAIN and hasattr(moved, "full_tensor"):
            # Shards that are kept on the CPU are gathered where the ranks' group is.
            there = moved.device_mesh.device_type
            if moved.device.type != there:
                moved = moved.to(there)
            moved = moved.full_tensor()
        if not wanted:
            return None
        # To where it is already, and to what it is, takes time as well. In a push, what is kept
        # is copied there.
        if where is not None and (fp8 or self.placing is None) and moved.device != where:
            moved = moved.to(where)
        rounded = self._dtype or (self._form.dtype(name) if fp8 else None)
        if rounded is not None and moved.dtype != rounded and moved.is_floating_point():
            moved = moved.to(rounded)
        whole: torch.Tensor = moved
        return whole

    @torch.no_grad()
    def _become(self, bucket: list[_Held], lent: bool) -> list[Named]:
        places = self._places([slots for *_, slots in bucket])
        by_device: dict[torch.device, list[int]] = {}
        for i, (_, tensor, fp8, _) in enumerate(bucket):
            if fp8:
                by_device.setdefault(tensor.device, []).append(i)
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        begun: list[tuple[list[str], Callable[[], Any]]] = []
        sources = [tensor for _, tensor, *_ in bucket]
        with self._stage("quantise"):
            for those in by_device.values():
                names = [bucket[i][0] for i in those]
                with _named(names):
                    outputs, wait = self._quantize(bucket, those, places)
                made.update(zip(those, outputs, strict=True))
                begun.append((names, wait))
            for i, place in places.items():
                if len(place) == 1:
                    name, tensor, *_ = bucket[i]
                    bucket[i] = (name, place[0].copy_(tensor), False, ())
        if self.placing is not None:
            # Nobody waits for the device here: what is to be found out about the outputs is
            # queued first, and what comes next as well.
            here = {slots[1].name for *_, fp8, slots in bucket if fp8}
            self.placing.writing(here, _Begun(begun, sources).wait, later=lent)
        pairs: list[Named] = []
        for i, (name, tensor, *_) in enumerate(bucket):
            if i not in made:
                pairs.append((name, tensor))
                continue
            codes, scales = made[i]
            pairs += ((name, codes), (formats.scale_name(name, self._form.mode), scales))
        return pairs

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
    ) -> tuple[Sequence[tuple[torch.Tensor, torch.Tensor]], Callable[[], object]]:
        """Begin with these tensors; return codes and scales of each, and what waits for them."""
        xs = [bucket[i][1] for i in those]
        form = self._form
        if not places:
            return kernels.quantize_many(xs, form.groups, form.recipe), lambda: None
        out: Any = [places[i] for i in those]
        return out, kernels.start_many(xs, form.groups, form.recipe, out).wait


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (type(other) in _PLAIN and one.data_ptr() == other.data_ptr())


@dataclass(frozen=True)
class _Begun:
    """What was begun together.

    Attributes:
        lists: names of each list, and what waits for it.
        sources: of all, also of what is copied: memory that is free again may be another stream's
            before the device has read it.
    """

    lists: Sequence[tuple[Sequence[str], Callable[[], object]]]
    sources: Sequence[torch.Tensor]

    def wait(self) -> None:
        """Wait for the lists; raise what one is refused for, by name."""
        for names, wait in self.lists:
            with _named(names):
                wait()


@contextmanager
def _named(names: Sequence[str]) -> Iterator[None]:
    """Raise what a list of tensors is refused for with the name of the tensor."""
    try:
        yield
    except NonFiniteError as e:
        name = names[e.tensor or 0]
        raise PlanDoesNotFitError(
            f"{name}: non-finite value {e.value} at index {list(e.index)}; FP8 has no code for it",
            hint="look at the optimiser's step: one such value spoils its whole block",
            data={"tensor": name, "index": list(e.index)},
        ) from e


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
