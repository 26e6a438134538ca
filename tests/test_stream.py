"""A stream gives what the FP8 checkpoint holds, or an error with a name; never something else."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.errors import ConflictError, PlanDoesNotFitError, UsageError
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels import recipes, reference
from fp8ctl.kernels.groups import PER_TENSOR, block
from fp8ctl.manifest import Plan, PlannedTensor
from fp8ctl.policy import Reason
from fp8ctl.stream import quantize_weights
from tests import stream_ranks, two_ranks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

Named = tuple[str, torch.Tensor]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    found = {"model.embed_tokens.weight": normal(50, 64)}
    for i in range(2):
        layer = f"model.layers.{i}"
        found |= {
            f"{layer}.input_layernorm.weight": normal(64).float(),
            f"{layer}.self_attn.q_proj.weight": normal(64, 64),
            f"{layer}.self_attn.q_proj.bias": normal(64),
            f"{layer}.mlp.gate_proj.weight": normal(96, 64).half(),
            # Strides of a slice of something fused.
            f"{layer}.mlp.up_proj.weight": normal(64, 192).t()[::2].float(),
            f"{layer}.mlp.gate.weight": normal(8, 64),
        }
    return found


WEIGHTS = weights()


def planned(tensors: dict[str, torch.Tensor], mode: Mode = Mode.BLOCK) -> Plan:
    spelled = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    return Plan(
        model=Path("model"),
        model_type="llama",
        family="Llama",
        backend=None,
        mode=mode,
        tp=1,
        block=BlockSize(32, 16) if mode is Mode.BLOCK else None,
        tensors=tuple(
            PlannedTensor(
                name,
                spelled[t.dtype],
                tuple(t.shape),
                name.endswith("_proj.weight"),
                Reason.LINEAR if name.endswith("_proj.weight") else Reason.NORM,
            )
            for name, t in tensors.items()
        ),
    )


PLAN = planned(WEIGHTS)


def wanted(mode: Mode = Mode.BLOCK, recipe: str = "ieee") -> list[Named]:
    pairs: list[Named] = []
    for name, tensor in WEIGHTS.items():
        if not name.endswith("_proj.weight"):
            pairs.append((name, tensor))
            continue
        per = block(32, 16) if mode is Mode.BLOCK else PER_TENSOR
        codes, scales = reference.quantize(tensor, per, recipes.named(recipe))
        suffix = "_scale_inv" if mode is Mode.BLOCK else "_scale"
        pairs += [(name, codes), (name + suffix, scales)]
    return pairs


def same(given: Iterable[Named], expected: Iterable[Named]) -> bool:
    given, expected = list(given), list(expected)
    return [n for n, _ in given] == [n for n, _ in expected] and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for (_, a), (_, b) in zip(given, expected, strict=True)
    )


class Source:
    """A source of either kind that knows how far it went and whether it was closed."""

    def __init__(self, items: Iterable[Any], fail_at: int | None = None) -> None:
        self.items, self.fail_at = list(items), fail_at
        self.came, self.closed = 0, False

    def sync(self) -> Iterator[Any]:
        try:
            for item in self.items:
                if self.came == self.fail_at:
                    raise OSError("the source has trouble")
                self.came += 1
                yield item
        finally:
            self.closed = True

    async def asynchronous(self) -> AsyncIterator[Any]:
        for item in (inner := self.sync()):
            try:
                await asyncio.sleep(0)
                yield item
            except BaseException:
                inner.close()  # type: ignore[attr-defined]
                raise


def read(source: Source, how: str, **more: Any) -> list[Named]:
    """Read a stream to its end: `how` is what the source is, and what the consumer."""
    its, mine = how.split()
    stream = quantize_weights(
        source.sync() if its == "sync" else source.asynchronous(), more.pop("plan", PLAN), **more
    )
    if mine == "sync":
        return list(stream)

    async def consume() -> list[Named]:
        return [pair async for pair in stream]

    return asyncio.run(consume())


HOW = ("sync sync", "sync async", "async async")
each_way = pytest.mark.parametrize("how", HOW)


@each_way
@pytest.mark.parametrize("bucket", [1, 9000, 1 << 30])
@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
def test_it_gives_what_the_checkpoint_holds(how: str, bucket: int, mode: Mode) -> None:
    source = Source(WEIGHTS.items())
    given = read(source, how, plan=planned(WEIGHTS, mode), bucket_bytes=bucket)
    assert same(given, wanted(mode))
    assert source.closed


def test_scales_are_of_the_plan_s_recipe() -> None:
    plan = dataclasses.replace(PLAN, recipe="ue8m0")
    given = read(Source(WEIGHTS.items()), "sync sync", plan=plan.to_json())
    assert same(given, wanted(recipe="ue8m0"))
    assert not same(given, wanted())


@each_way
@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_a_failing_source_is_the_error_and_is_closed(how: str, at: int) -> None:
    source = Source(WEIGHTS.items(), fail_at=at)
    with pytest.raises(OSError, match="the source has trouble"):
        read(source, how, bucket_bytes=1)
    assert source.closed
    assert source.came == at


@each_way
def test_nan_names_its_tensor_and_passes_nothing_on(how: str) -> None:
    spoilt = {name: t.clone() for name, t in WEIGHTS.items()}
    name = "model.layers.1.mlp.gate_proj.weight"
    spoilt[name][3, 4] = torch.inf
    source = Source(spoilt.items())
    with pytest.raises(PlanDoesNotFitError, match=r"layers\.1\.mlp\.gate_proj.*inf.*\[3, 4\]") as e:
        read(source, how)
    assert e.value.data["tensor"] == name
    assert source.closed


def test_buckets_before_a_failure_are_whole() -> None:
    spoilt = {name: t.clone() for name, t in WEIGHTS.items()}
    spoilt["model.layers.1.mlp.gate_proj.weight"][:] = torch.nan
    given: list[Named] = []
    with pytest.raises(PlanDoesNotFitError):
        given.extend(quantize_weights(spoilt.items(), PLAN, bucket_bytes=1))
    assert same(given, wanted()[: len(given)])
    assert len(given) > 8


@pytest.mark.parametrize("end", ["close", "with", "drop"])
def test_a_consumer_that_leaves_closes_the_source(end: str) -> None:
    source = Source(WEIGHTS.items())
    stream = quantize_weights(source.sync(), PLAN, bucket_bytes=1)
    next(stream)
    if end == "close":
        stream.close()
        assert list(stream) == []
    elif end == "with":
        with pytest.raises(KeyError), stream:
            raise KeyError
    del stream
    gc.collect()
    assert source.closed
    assert source.came == 1


@pytest.mark.parametrize("kind", ["sync", "asynchronous"])
@pytest.mark.parametrize("end", ["aclose", "async with", "cancel"])
def test_an_async_consumer_that_leaves_closes_the_source(kind: str, end: str) -> None:
    source = Source(WEIGHTS.items())

    async def consume() -> None:
        stream = quantize_weights(getattr(source, kind)(), PLAN, bucket_bytes=1)
        if end == "aclose":
            await anext(stream)
            await stream.aclose()
        elif end == "async with":
            async with stream:
                await anext(stream)
        else:
            async with aclosing(stream):
                async for _ in stream:
                    await asyncio.sleep(60)

    async def run() -> None:
        task = asyncio.create_task(consume())
        await asyncio.sleep(0.2)
        if end == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task
        assert source.closed

    asyncio.run(run())
    assert 1 <= source.came <= 2


def test_a_stream_that_was_never_read_closes_its_source() -> None:
    source = Source(WEIGHTS.items())
    generator = source.sync()
    next(generator)
    with quantize_weights(generator, PLAN):
        pass
    assert source.closed


def test_no_more_is_pulled_than_a_bucket_and_nothing_is_kept() -> None:
    sizes = {name: t.numel() * t.element_size() for name, t in WEIGHTS.items()}
    source, limit = Source(WEIGHTS.items()), 12_000
    given, largest = 0, 0
    alive: list[weakref.ref[torch.Tensor]] = []
    for name, tensor in quantize_weights(source.sync(), PLAN, bucket_bytes=limit):
        pulled = sum([*sizes.values()][: source.came])
        largest = max(largest, pulled - given)
        given += sizes.get(name, 0)
        alive.append(weakref.ref(tensor))
        del tensor
    assert largest <= limit + max(sizes.values())
    gc.collect()
    kept = {id(t) for t in WEIGHTS.values()}
    assert all(ref() is None or id(ref()) in kept for ref in alive)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda items: [*items, items[3]], ConflictError, r"q_proj\.bias comes a second time"),
        (lambda items: items[:-1], ConflictError, r"1 tensors .*layers\.1\.mlp\.gate\.weight"),
        (
            lambda items: [("model.layers.7.mlp.up_proj.weight", items[0][1])],
            ConflictError,
            r"layers\.7\.mlp\.up_proj\.weight is not in the plan",
        ),
        (
            lambda items: [(items[2][0], items[2][1][1:])],
            PlanDoesNotFitError,
            r"q_proj\.weight has shape \[63, 64\], planned \[64, 64\]",
        ),
        (lambda items: [("a", 5)], TypeError, r"\(str, int\)"),
        (lambda items: [5], TypeError, r"int where \(name, tensor\)"),
        (lambda items: ["ab"], TypeError, r"\(str, str\)"),
    ],
)
def test_what_was_not_planned_is_refused(
    change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    source = Source(change([*WEIGHTS.items()]))
    with pytest.raises(error, match=message):
        list(quantize_weights(source.sync(), PLAN))
    assert source.closed


def test_a_part_may_be_sent_and_kept_tensors_may_be_more_than_planned() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    given = dict(quantize_weights([(name, WEIGHTS[name])], PLAN, complete=False))
    assert list(given) == [name, name + "_scale_inv"]
    head = torch.ones(50, 64)
    both = [*WEIGHTS.items(), ("lm_head.weight", head)]
    assert dict(quantize_weights(both, PLAN))["lm_head.weight"].data_ptr() == head.data_ptr()


def test_a_manifest_and_a_configuration_do_as_well_as_a_plan() -> None:
    by_plan = [*quantize_weights(WEIGHTS.items(), PLAN)]
    assert same(quantize_weights(WEIGHTS.items(), PLAN.to_json()), by_plan)
    config = {"model_type": "llama", "quantization_config": PLAN.quantization_config()}
    assert same(quantize_weights(WEIGHTS.items(), config), by_plan)
    config["quantization_config"] = planned(WEIGHTS, Mode.PER_TENSOR).quantization_config()
    assert same(quantize_weights(WEIGHTS.items(), config), wanted(Mode.PER_TENSOR))
    for bad in ({"quantization_config": {"quant_method": "awq"}}, {"schema": 0}, None, "block"):
        with pytest.raises(UsageError):
            quantize_weights(WEIGHTS.items(), bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 bytes"):
        quantize_weights(WEIGHTS.items(), PLAN, bucket_bytes=0)


def test_master_weights_are_rounded_first() -> None:
    masters = {name: t.float() + 1e-5 for name, t in WEIGHTS.items()}
    rounded = {name: t.bfloat16() for name, t in masters.items()}
    assert not torch.equal(
        masters["model.embed_tokens.weight"], rounded["model.embed_tokens.weight"]
    )
    given = quantize_weights(masters.items(), PLAN, dtype=torch.bfloat16, device="cpu")
    assert same(given, quantize_weights(rounded.items(), PLAN))


def test_it_is_read_once_and_as_what_it_is() -> None:
    async def tensors() -> AsyncIterator[Named]:
        yield "a", torch.zeros(1)

    with pytest.raises(TypeError, match="async for"):
        iter(quantize_weights(tensors(), PLAN))
    stream = quantize_weights(WEIGHTS.items(), PLAN)
    next(stream)
    with pytest.raises(TypeError, match="read once"):
        aiter(stream)


# ---- FSDP2, two ranks ----


def run_ranks(tmp_path: Path, case: str) -> list[tuple[int, dict[str, Any]]]:
    """Run a case with two ranks; return exit status and answer of each."""
    tensors = dict(stream_ranks.net().named_parameters())
    plan = planned({name: t.detach() for name, t in tensors.items()}).to_json()
    answers = two_ranks.run("tests.stream_ranks", plan, str(tmp_path / "meet"), case)
    return [(status, answer or {}) for status, answer in answers]


def test_ranks_gather_and_one_gives(tmp_path: Path) -> None:
    (_, first), (_, second) = run_ranks(tmp_path, "all")
    assert second == {"given": {}}, second
    expected: dict[str, torch.Tensor] = {}
    for name, parameter in stream_ranks.net().named_parameters():
        tensor = parameter.detach()
        if name.endswith("_proj.weight"):
            codes, scales = reference.quantize(tensor, block(32, 16))
            expected |= {name: codes, name + "_scale_inv": scales}
        else:
            expected[name] = tensor
    assert first.get("given") == {n: stream_ranks.bits(t) for n, t in expected.items()}, first


@pytest.mark.parametrize(
    ("case", "errors"),
    [
        # What fails or leaves on one is told to the other at once, by its name.
        ("nan", ("PlanDoesNotFitError", "PlanDoesNotFitError")),
        ("leaves", (None, "ConflictError")),
        # What is gone elsewhere shows after the time-out.
        ("dead", ("TimeoutError", None)),
        ("raises", ("ConflictError", "OSError")),
    ],
)
def test_no_rank_waits_for_ever(
    case: str, errors: tuple[str | None, str | None], tmp_path: Path
) -> None:
    answers = run_ranks(tmp_path, case)
    assert [answer.get("error") for _, answer in answers] == list(errors), answers
    assert answers[1][0] == (7 if case == "dead" else 0)
