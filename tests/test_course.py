"""What is like the update before is not looked at again; what is not, is as if it came first."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import forms
from fp8ctl.course import Placed
from fp8ctl.errors import ConflictError, Fp8ctlError, PlanDoesNotFitError
from fp8ctl.formats import Mode
from fp8ctl.push import Rollout
from fp8ctl.stream import quantize_weights
from tests.push.serving import Server, serving
from tests.push.test_rollout import CHANGED, holds, quantised
from tests.test_stream import PLAN, WEIGHTS, planned, wanted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Named = tuple[str, torch.Tensor]
#: Two or three tensors each.
BUCKET = 9000
SAME, OTHER = [*WEIGHTS.items()], [*CHANGED.items()]
GATE = "model.layers.1.mlp.gate_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that a push's form was asked about."""
    names: list[str] = []
    of_push = forms.of_push

    def noting(*of: Any) -> forms.Form:
        form = of_push(*of)

        def quantized(name: str, shape: torch.Size) -> bool:
            names.append(name)
            return form.quantized(name, shape)

        return dataclasses.replace(form, quantized=quantized)

    monkeypatch.setattr(forms, "of_push", noting)
    return names


def without(name: str, pairs: list[Named] = OTHER) -> list[Named]:
    return [pair for pair in pairs if pair[0] != name]


def instead(name: str, tensor: torch.Tensor, pairs: list[Named] = OTHER) -> list[Named]:
    return [(n, tensor if n == name else t) for n, t in pairs]


@pytest.mark.parametrize("bucket", [1, BUCKET, 1 << 30])
def test_the_same_names_and_shapes_are_asked_about_once(bucket: int, asked: list[str]) -> None:
    with serving(PLAN) as server, Rollout(server.url, PLAN, bucket_bytes=bucket) as rollout:
        rollout.update(SAME, 1)
        assert asked == [*WEIGHTS]
        asked.clear()
        for pairs in (OTHER, SAME, OTHER):
            rollout.update(iter(pairs), 2)
            assert holds(server, quantised(dict(pairs)))
        assert not asked


def test_from_the_first_that_is_another_all_is_asked_again(asked: list[str]) -> None:
    with serving(PLAN) as server, Rollout(server.url, PLAN, bucket_bytes=BUCKET) as rollout:
        rollout.update(SAME, 1)
        asked.clear()
        rollout.update([*OTHER[:5], *reversed(OTHER[5:])], 2)
        assert asked == [name for name, _ in reversed(OTHER[5:])]
        assert holds(server, quantised(CHANGED))


REFUSED: dict[str, tuple[list[Named], type[Exception], str]] = {
    "one twice": ([*OTHER, OTHER[0]], ConflictError, "comes a second time"),
    "one twice in a row": ([*OTHER[:3], *OTHER[2:]], ConflictError, "comes a second time"),
    "one too few": (OTHER[:-1], ConflictError, "1 tensors of the plan did not come"),
    "one left out": (without(NORM), ConflictError, "1 tensors of the plan did not come"),
    "a stranger": ([*OTHER, ("x", OTHER[0][1])], ConflictError, "not in the plan"),
    "another shape": (instead(NORM, torch.zeros(65)), PlanDoesNotFitError, "planned [64]"),
    "NaN kept": (instead(NORM, torch.full((64,), torch.nan)), PlanDoesNotFitError, NORM),
    "NaN quantised": (instead(GATE, CHANGED[GATE] * torch.nan), PlanDoesNotFitError, GATE),
    "no pair": ([*OTHER[:3], 3], TypeError, "int where"),  # type: ignore[list-item]
    "no tensor": ([*OTHER[:3], (OTHER[3][0], 3)], TypeError, "(str, int)"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_the_first_time_is_refused_the_second(case: str) -> None:
    pairs, kind, told = REFUSED[case]
    with serving(PLAN) as server, Rollout(server.url, PLAN, bucket_bytes=BUCKET) as rollout:
        rollout.update(SAME, 1)
        with pytest.raises(kind) as e:
            rollout.update(pairs, 2)
        assert told in str(e.value)
        rollout.update(OTHER, 3)
        assert holds(server, quantised(CHANGED))


def test_a_part_that_came_as_such_is_not_all_when_it_comes_as_that() -> None:
    with serving(PLAN) as server, Rollout(server.url, PLAN, bucket_bytes=BUCKET) as rollout:
        rollout.update(SAME, 1)
        for _ in range(2):
            rollout.update(without(NORM), 2, complete=False)
        with pytest.raises(ConflictError, match=f"of the plan did not come, such as {NORM}"):
            rollout.update(without(NORM), 3)


def test_another_dtype_is_another_tensor() -> None:
    rounded = [(name, tensor.double()) for name, tensor in OTHER]
    with serving(PLAN) as server, Rollout(server.url, PLAN, bucket_bytes=BUCKET) as rollout:
        for pairs in (SAME, rounded, SAME, rounded):
            rollout.update(pairs, 1)
            assert holds(server, quantised(CHANGED if pairs is rounded else WEIGHTS))


def test_without_a_plan_another_dtype_is_sent_as_it_is() -> None:
    rounded = [(name, tensor.double().contiguous()) for name, tensor in OTHER]
    with serving(None) as server, Rollout(server.url, None, bucket_bytes=1 << 20) as rollout:
        for pairs in (SAME, rounded, SAME):
            rollout.update(pairs, 1)
            assert holds(server, [(name, t.contiguous()) for name, t in pairs])


@pytest.mark.parametrize("bucket", [BUCKET, 1 << 30])
def test_what_is_in_fp8_already_follows_no_course_of_what_is_not(bucket: int) -> None:
    with serving(PLAN) as server, Rollout(server.url, PLAN, bucket_bytes=bucket) as rollout:
        for _ in range(2):
            rollout.update(SAME, 1)
            assert holds(server, wanted())
            rollout.update(quantised(CHANGED), 2, quantized=True)
            assert holds(server, quantised(CHANGED))


def test_what_should_be_fp8_already_is_not_made_fp8_since_it_was_before() -> None:
    with serving(PLAN) as server, Rollout(server.url, PLAN) as rollout:
        rollout.update(SAME, 1)
        with pytest.raises(ConflictError, match="tensors of the plan did not come"):
            rollout.update(SAME, 2, quantized=True)


SOURCES: list[Callable[[list[Named]], Any]] = [
    list,
    iter,
    lambda pairs: dict(pairs).items(),
    lambda pairs: [(n, torch.nn.Parameter(t)) for n, t in pairs],
]


def _some_update(chance: random.Random) -> tuple[Any, dict[str, Any]]:
    """Return a source, and how it is pushed."""
    pairs: list[Any] = [*chance.choice([SAME, OTHER])]
    kind = chance.randrange(9)
    if kind == 1:
        chance.shuffle(pairs)
    elif kind == 2:
        at = chance.randrange(len(pairs))
        pairs[at:] = reversed(pairs[at:])
    elif kind == 3:
        pairs.insert(chance.randrange(len(pairs)), chance.choice(pairs))
    elif kind == 4:
        del pairs[chance.randrange(len(pairs))]
    elif kind == 5:
        at = chance.randrange(len(pairs))
        pairs[at] = pairs[at][0], chance.choice(pairs)[1]
    elif kind == 6:
        at = chance.randrange(len(pairs))
        pairs[at] = pairs[at][0], pairs[at][1].float() * chance.choice([1, torch.inf])
    elif kind == 7:
        pairs = [(n, t if chance.random() < 0.8 else CHANGED[n]) for n, t in SAME]
    source = chance.choice(SOURCES)
    complete = chance.random() < 0.6
    return source(pairs), {"complete": complete}


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_no_course_makes_a_difference(seed: int, delta: bool) -> None:
    """One rollout gives and refuses what a new one for every update does."""
    chance, bucket = random.Random(seed), random.Random(seed).choice([1, BUCKET, 1 << 30])

    def outcome(server: Server, rollout: Rollout, given: tuple[Any, dict[str, Any]]) -> object:
        source, how = given
        try:
            done = rollout.update(source, 1, **how)
        except (Fp8ctlError, TypeError) as e:
            # How much was loaded before it was given up is chance.
            rollout.update(SAME, 2)
            return type(e), str(e).replace(server.url, "")
        return done.sent + done.skipped, done.bytes_sent + done.bytes_skipped, server.state

    with (
        serving(PLAN) as server,
        serving(PLAN) as other,
        Rollout(server.url, PLAN, bucket_bytes=bucket, delta=delta) as rollout,
    ):
        for _ in range(12):
            state = chance.getstate()
            found = outcome(server, rollout, _some_update(chance))
            chance.setstate(state)
            with Rollout(other.url, PLAN, bucket_bytes=bucket, delta=delta) as new:
                assert found == outcome(other, new, _some_update(chance))
            assert holds(server, other.table.held[0].items())


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Placed]]:
    """Every parcel that came to lie somewhere."""
    found: list[weakref.ref[Placed]] = []
    begin = Placed.__init__

    def noted(self: Placed, *of: Any) -> None:
        begin(self, *of)
        found.append(weakref.ref(self))

    monkeypatch.setattr(Placed, "__init__", noted)
    return found


def alive(cut: list[weakref.ref[Placed]]) -> int:
    gc.collect()
    return sum(one() is not None for one in cut)


@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
@pytest.mark.parametrize("via", ["ipc", "disk"])
def test_no_memory_of_a_connection_outlives_it(
    mode: Mode, via: Any, cut: list[weakref.ref[Placed]], tmp_path: Path
) -> None:
    plan = planned(WEIGHTS, mode)
    with (
        serving(plan) as server,
        Rollout(server.url, plan, via=via, bucket_bytes=BUCKET, folder=tmp_path) as rollout,
    ):
        for _ in range(3):
            rollout.update(SAME, 1)
        assert bool(alive(cut)) == (via == "ipc")  # a folder's memory is an update's
        rollout.close()
        assert not alive(cut)
        rollout.update(OTHER, 2)
        pairs = quantize_weights(CHANGED.items(), plan)
        assert holds(server, [(name, t.contiguous()) for name, t in pairs])


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("bucket", [1, BUCKET])
def test_what_lies_there_is_cut_once_for_each_slot(
    bucket: int, delta: bool, cut: list[weakref.ref[Placed]]
) -> None:
    with (
        serving(PLAN) as server,
        Rollout(server.url, PLAN, bucket_bytes=bucket, delta=delta) as rollout,
    ):
        rollout.update(SAME, 1)
        first = len(cut)
        for i in range(9):
            rollout.update([SAME, OTHER][i % 2], i)
        assert alive(cut) <= 2 * first
        before = len(cut)
        rollout.update(OTHER, 9)
        assert delta or len(cut) == before


@pytest.mark.parametrize("failing", [False, True])
def test_what_lay_there_for_another_course_is_forgotten(
    failing: bool, cut: list[weakref.ref[Placed]]
) -> None:
    chance = random.Random(0)
    with serving(PLAN) as server, Rollout(server.url, PLAN, bucket_bytes=BUCKET) as rollout:
        rollout.update(SAME, 0)
        most = 2 * len(cut)
        for i in range(12):
            pairs = chance.sample(OTHER, len(OTHER))
            if failing:
                with pytest.raises(ConflictError):
                    rollout.update([*pairs, pairs[0]], i)
            else:
                rollout.update(pairs, i)
            assert alive(cut) <= 2 * most
