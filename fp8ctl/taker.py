"""Tensors are taken one by one, and become FP8 bucket by bucket; `stream` gives them on.

A bucket is what the kernels quantise in one launch and all the memory that is used. Over ranks
each bucket begins with a meeting, and ends with the word of the source that it is done.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8ctl import formats, gathering
from fp8ctl.course import Follower, Step
from fp8ctl.errors import ConflictError, Fp8ctlError, PlanDoesNotFitError
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.ranks import leave, meet, tell
from fp8ctl.wire import DTYPES, Slot, place

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from fp8ctl.course import Course, Parcel, Placed
    from fp8ctl.forms import Form
    from fp8ctl.ranks import Ranks

    Named = tuple[str, torch.Tensor]
    #: A tensor that was taken, and what becomes of it.
    _Held = tuple[torch.Tensor, Step]


class Placing(Protocol):
    """A push, as the stream sees it.

    Attributes:
        limit: bytes of outputs that are placed together; a larger tensor comes alone.
        patience: seconds that a place may have to be waited for.
        course: of the update before, and at the end of this one its own; None: there is none.
    """

    limit: int
    patience: float
    course: Course | None

    @property
    def device(self) -> torch.device:
        """Where weights are quantised."""

    def wants(self, name: str) -> bool:
        """Say whether a tensor of this name is taken at all."""

    def place(self, parcel: Parcel) -> Placed:
        """Return memory for these tensors; may wait until there is some."""

    def writing(self, check: Callable[[], object], *, later: bool) -> None:
        """Take what was placed last: all that writes there is queued, and need not be waited for.

        Args:
            check: waits for the scales that are made here, and raises where one is not finite;
                what is placed here is to be loaded by nobody before. It keeps the tensors that
                they are made of.
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
        self._course = Follower(form, None if placing is None else placing.course)
        #: Names of what came; filled when something comes that did not come before.
        self._came: set[str] = set()
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
        step = self._course.next(name, tensor) or self._new(name, tensor)
        full: Iterable[Named] = ()
        # A place is as large as it is: what would not fit any more is the next one's.
        if self.placing is not None and self._held and self._bytes + step.nbytes > self._limit:
            full = self._bucket(self._taken())
        self._held.append((tensor, step))
        self._bytes += step.nbytes
        if self.placing is None and self._bytes >= self._limit:
            full = self._bucket(self._taken())
        return full

    def _new(self, name: str, tensor: torch.Tensor) -> Step:
        """Find out what becomes of a tensor; refuse what cannot come here."""
        if not self._came:
            self._came = {step.name for step in self._course.steps}
        if name in self._came:
            raise ConflictError(f"{name} comes a second time", data={"tensor": name})
        self._came.add(name)
        form = self._form
        codes = form.codes(name)
        if codes and (not self._held or self._held[-1][1].name != codes):
            raise ConflictError(
                f"{name} does not come right after {codes}, whose scale it is",
                hint="give codes, each followed by its scale",
                data={"tensor": name},
            )
        fp8 = form.quantized(name, tensor.shape)
        rounded = self._dtype or (form.dtype(name) if fp8 else None)
        slots: Sequence[Slot] = ()
        if self.placing is None:
            nbytes = tensor.nbytes
        else:
            slots = self._slots(name, tensor, fp8)
            nbytes = place(slots)[1] + form.ahead(name)
        step = Step(name, tensor.dtype, tensor.shape, fp8, rounded, slots, nbytes)
        self._course.add(step)
        return step

    def end(self) -> Iterable[Named]:
        """Return what the last bucket becomes, when no more tensor comes.

        Raises:
            ConflictError: planned tensors did not come.
        """
        if self._complete and not self._course.is_complete:
            came = {step.name for step in self._course.steps}
            absent = sorted((self._form.names or frozenset()) - came)
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
                names = [step.name for _, step in held]
                meet(ranks, "more", names=names, patience=self._patience)
            self._open = True
        steps = [step for _, step in held]
        whole, lent = self._gathered(held, gives)
        held.clear()
        if gives and self.placing is not None:
            self._place(self.placing, steps, whole, lent)
        elif gives:
            made = self._made(steps, whole)
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
        if self.placing is not None:
            self.placing.course = self._course.ended(self._complete)
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

    @torch.no_grad()
    def _gathered(self, held: Sequence[_Held], gives: bool) -> tuple[list[torch.Tensor], bool]:
        """Return whole tensors, where this rank gives them, each as it is to be read.

        Also, whether they are the source's own, so that to keep them takes no memory.
        """
        placing = self.placing
        # A tensor may be a part of one until here; gathering is the same order on all ranks.
        with nullcontext() if placing is None else placing.stage("gather"):
            where = self._device if placing is None else placing.device
            read = placing is not None
            found = [gathering.whole(t, step, where, gives, read) for t, step in held]
        whole = [one for one in found if one is not None]
        lent = self._ranks is None and all(
            (self.keeps or isinstance(given, torch.nn.Parameter))
            and gathering.same_memory(one, given)
            for one, (given, _) in zip(whole, held, strict=True)
        )
        return whole, lent

    def _slots(self, name: str, tensor: torch.Tensor, fp8: bool) -> list[Slot]:
        """Return the places that what a tensor becomes needs."""
        form, shape = self._form, tuple(tensor.shape)
        if fp8:
            scale = formats.scale_name(name, form.mode), tuple(form.groups.scale_shape(shape))
            return [Slot(name, "float8_e4m3fn", shape), Slot(scale[0], "float32", scale[1])]
        rounded = form.dtype(name) if tensor.is_floating_point() else None
        spelled = _spelled(rounded or tensor.dtype)
        if spelled not in DTYPES:
            raise PlanDoesNotFitError(
                f"{name} is {spelled}, which no server takes; one of {', '.join(DTYPES)}",
                hint="cast it before it is sent",
                data={"tensor": name},
            )
        return [Slot(name, spelled, shape)]

    @torch.no_grad()
    def _made(self, steps: Sequence[Step], whole: Sequence[torch.Tensor]) -> list[Named]:
        """Return what a bucket becomes."""
        form = self._form
        by_device: dict[torch.device, list[int]] = {}
        for i, (step, tensor) in enumerate(zip(steps, whole, strict=True)):
            if step.fp8:
                by_device.setdefault(tensor.device, []).append(i)
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for those in by_device.values():
            xs = [whole[i] for i in those]
            with _named([steps[i].name for i in those]):
                outputs = kernels.quantize_many(xs, form.groups, form.recipe)
            made.update(zip(those, outputs, strict=True))
        pairs: list[Named] = []
        for i, (step, tensor) in enumerate(zip(steps, whole, strict=True)):
            if i not in made:
                pairs.append((step.name, tensor))
                continue
            codes, scales = made[i]
            pairs += ((step.name, codes), (formats.scale_name(step.name, form.mode), scales))
        return pairs

    @torch.no_grad()
    def _place(
        self, placing: Placing, steps: Sequence[Step], whole: Sequence[torch.Tensor], lent: bool
    ) -> None:
        """Write what a bucket becomes where it is sent from.

        Nobody waits for the device here: what is to be found out about the outputs is queued
        first, and what comes next as well.
        """
        form = self._form
        placed = placing.place(self._course.parcel(steps))
        parcel = placed.parcel
        names = [steps[i].name for i in parcel.quantised]
        wait: Callable[[], object] = _nothing
        with placing.stage("quantise"):
            if names:
                xs = [whole[i] for i in parcel.quantised]
                with _named(names):
                    wait = kernels.start_many(xs, form.groups, form.recipe, placed.pairs).wait
            gathering.copy(placed.kept, [whole[i] for i in parcel.kept])
        placing.writing(_Begun(names, wait, whole).wait, later=lent)


def _nothing() -> None:
    """Wait for nothing."""


@dataclass(frozen=True)
class _Begun:
    """What was begun together.

    Attributes:
        names: of what is quantised.
        then: waits for that.
        sources: of all, also of what is copied: memory that is free again may be another stream's
            before the device has read it.
    """

    names: Sequence[str]
    then: Callable[[], object]
    sources: Sequence[torch.Tensor]

    def wait(self) -> None:
        """Wait for the list; raise what it is refused for, by name."""
        with _named(self.names):
            self.then()


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
