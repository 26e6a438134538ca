"""The benchmark: what it counts, that it sees a wrong code, and that it goes on after a failure."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8ctl.kernels import bench, compare, quantize, recipes, reference, timing, workloads
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block
from fp8ctl.kernels.recipes import IEEE, UE8M0, Recipe
from fp8ctl.kernels.workloads import Work

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = (sys.executable, "-m", "fp8ctl.kernels.bench")

Outputs = tuple[torch.Tensor, torch.Tensor]
Kernel = Callable[..., Any]

ROW = {
    *("work", "measure", "tensors", "shape", "groups", "recipe", "dtype", "threads", "bytes"),
    *("limit_bytes", "rounds", "time_us", "p10_us", "p90_us", "gb_s", "copy_us", "copy_gb_s"),
    *("of_copy", "limit_us", "of_limit", "plain_us", "of_plain", "exact", "checked", "differs"),
}
DOCUMENT = {
    *("schema", "device", "versions", "date", "seconds", "recipe", "quick", "best_copy_gb_s"),
    *("rows", "ok"),
}


class Small(timing.Cpu):
    """The CPU, with next to nothing to flush and to copy; it may pass for a GPU."""

    def __init__(self, kind: str = "cpu") -> None:
        super().__init__(quick=True)
        self.kind = kind
        self.piece = 1 << 12
        self._flush = self._flush[:1024]


SMALL = Work("small", ((200, 136),), groups=block(64, 64), threads=1, rounds=2)
LIST = Work("list", ((48, 64), (64, 48), (48, 64)), groups=block(16, 16), threads=1, listed=True)


def rows(work: Work, kind: str = "cpu") -> list[dict[str, Any]]:
    return list(bench._Bench(Small(kind)).rows(work))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes works all that there is to measure."""

    def give(*found: Work) -> None:
        monkeypatch.setattr(workloads, "for_cpu", lambda *_: list(found))
        monkeypatch.setattr(bench, "open_device", lambda *_: Small())

    return give


def spoiled(spoil: Callable[[torch.Tensor, Outputs], None]) -> Kernel:
    """Return the kernel, with something done to what it wrote."""
    right = quantize.quantize

    def kernel(x: torch.Tensor, *arguments: Any, **named: Any) -> Outputs:
        found = right(x, *arguments, **named)
        spoil(x, found)
        return found

    return kernel


def flip(x: torch.Tensor, found: Outputs) -> None:
    found[0].view(torch.uint8)[-1, -2] ^= 1


def one_unit(x: torch.Tensor, found: Outputs) -> None:
    found[1].view(torch.int32)[1, 0] += 1


# --- the document ---------------------------------------------------------------------------------


def test_a_quick_run_is_one_json_document_whose_rows_have_the_same_keys(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    done = subprocess.run(
        [*SCRIPT, "--device", "cpu", "--quick", "--json", str(path)],
        # Threads that spin take very long beside other work, such as another test's.
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    document = json.loads(path.read_text())
    assert set(document) == DOCUMENT
    assert set(document["device"]) == {"type", "name", "memory", "driver", "cuda"}
    assert set(document["versions"]) == {"python", "torch", "triton"}
    assert (document["schema"], document["ok"], document["quick"]) == (1, True, True)
    assert all(set(row) == ROW for row in document["rows"])
    for row in document["rows"]:
        assert (row["exact"], row["differs"], row["checked"]) == (True, None, 1.0), row
        assert 0 < row["p10_us"] <= row["time_us"] <= row["p90_us"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["time_us"] / 1e3, rel=0.01, abs=0.01)
        assert row["of_copy"] == pytest.approx(row["copy_us"] / row["time_us"], rel=0.01, abs=1e-4)
    singles = [row for row in document["rows"] if row["tensors"] == 1]
    assert {row["threads"] for row in singles} == {1, min(2, torch.get_num_threads())}
    assert {row["recipe"] for row in singles} == set(recipes.RECIPES)
    groups = {"128x128", "64x64", "1x128", "per-tensor", "per-channel"}
    assert {row["groups"] for row in singles} == groups
    assert all(row["of_plain"] > 0 for row in singles)
    assert {row["measure"] for row in document["rows"] if row["tensors"] > 1} == {
        "wall, plan",
        "wall, plan, new tensors",
        "wall, plan, new tensors, given outputs",
        "wall, no plan",
        "wall, no plan, outputs looked at",
        "wall, no plan, given outputs",
    }
    for row in document["rows"]:
        assert row["work"] in done.stdout
        assert row["work"] in done.stderr
    assert document["date"] in done.stdout


def test_only_some_works_can_be_asked_for(plan: Callable[..., None]) -> None:
    plan(SMALL, replace(SMALL, name="other"))
    assert [row["work"] for row in bench.run(only="sm*l")["rows"]] == ["small"]
    with pytest.raises(ValueError, match="there are small, other"):
        bench.run(only="none")


def test_progress_is_told_in_bytes(plan: Callable[..., None]) -> None:
    plan(SMALL, LIST)
    heard: list[tuple[int, int]] = []
    bench.run(progress=lambda done, total: heard.append((done, total)))
    total = SMALL.bytes + LIST.bytes
    assert heard == [(SMALL.bytes, total), (total, total)]


def test_threads_are_as_they_were_also_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen = []

    def fail(*_: Any) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("no")

    monkeypatch.setattr(quantize, "quantize", fail)
    other = 2 if before == 1 else 1
    [row] = rows(replace(SMALL, threads=other))
    assert seen == [other]
    assert torch.get_num_threads() == before
    assert row["exact"] is False


def test_what_breaks_off_is_a_row_and_the_others_are_measured(
    plan: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = quantize.quantize

    def kernel(x: torch.Tensor, groups: Groups, *rest: Any) -> Outputs:
        if groups == PER_TENSOR:
            raise RuntimeError("out of memory\nand more of it")
        return right(x, groups, *rest)

    monkeypatch.setattr(quantize, "quantize", kernel)
    plan(replace(SMALL, groups=PER_TENSOR), SMALL)
    document = bench.run()
    broken, measured = document["rows"]
    assert set(broken) == ROW
    assert broken["differs"] == "RuntimeError: out of memory"
    assert measured["exact"]
    assert document["ok"] is False
    assert "Traceback" in capsys.readouterr().err
    assert bench.table(document)[1][0][-1] == "RuntimeError: out of memory"


def test_a_recipe_and_a_device_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown recipe"):
        bench.run(recipe="exact")
    with pytest.raises(ValueError, match="unknown device"):
        bench.run(device="tpu")
    with pytest.raises(SystemExit):
        bench.main(["--recipe", "exact"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_where_there_is_none_is_an_error_of_its_own() -> None:
    with pytest.raises(timing.NoCudaError, match="torch "):
        bench.run(device="cuda")


# --- what is wrong is seen ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (flip, r"^1 of 27200 codes, first at \[199, 134\]: 0x\w\w, expected 0x\w\w$"),
        (one_unit, r"^1 of 12 scales, first at \[1, 0\]: [\d.e-]+, expected [\d.e-]+$"),
        (lambda x, found: found[0][100:].view(torch.uint8).fill_(0x7F), r"^\d+ of 27200 codes"),
        (lambda x, found: found[1].neg_(), "^12 of 12 scales"),
    ],
    ids=["code", "scale", "half", "sign"],
)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_wrong_kernel_fails_its_row(
    kind: str, spoil: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [right] = rows(SMALL, kind)
    assert right["exact"], right["differs"]
    monkeypatch.setattr(quantize, "quantize", spoiled(spoil))
    [row] = rows(SMALL, kind)
    assert row["exact"] is False
    assert re.search(told, row["differs"]), row["differs"]


def prepared(spoil: Callable[[torch.Tensor, Outputs], None]) -> Kernel:
    """Return `prepare`, with something done to what its plan wrote into each tensor."""
    right = quantize.prepare

    class Spoiled:
        def __init__(self, xs: list[torch.Tensor], *arguments: Any) -> None:
            self.xs, self.plan = xs, right(xs, *arguments)

        def run(self, xs: list[torch.Tensor] | None = None) -> Sequence[Outputs]:
            found = self.plan.run() if xs is None else self.plan.run(xs)
            for x, out in zip(self.xs if xs is None else xs, found, strict=True):
                spoil(x, out)
            return found

    return Spoiled


def test_what_a_kernel_leaves_unwritten_shows_though_it_wrote_it_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, calls = quantize.quantize, []

    def once(x: torch.Tensor, groups: Groups, recipe: Recipe, policy: Any, out: Outputs) -> Any:
        calls.append(x)
        return right(x, groups, recipe, policy, out) if len(calls) == 1 else out

    monkeypatch.setattr(quantize, "quantize", once)
    [row] = rows(SMALL)
    assert "27200 of 27200 codes, first at [0, 0]: 0x7f" in row["differs"]
    assert "12 of 12 scales, first at [0, 0]: nan" in row["differs"]


def test_the_cpu_looks_at_a_gpus_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000, 64)
    for groups in (block(128, 32), block(1, 64), PER_CHANNEL, PER_TENSOR):
        codes, scales = reference.quantize(x, groups)
        assert compare.with_the_cpu(x, groups, IEEE, (codes, scales)) is None
        for row in (0, 999):
            wrong = codes.clone()
            wrong.view(torch.uint8)[row, 3] ^= 1
            told = compare.with_the_cpu(x, groups, IEEE, (wrong, scales))
            assert told is not None, (groups, row)
            assert "on the CPU" in told


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_way_to_call_a_list_is_checked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows(LIST, kind)
    assert [row["differs"] for row in right] == [None] * (6 + (kind == "cuda"))

    def spoil_second(x: torch.Tensor, found: Outputs) -> None:
        if x.shape == (64, 48):
            flip(x, found)

    many = quantize.quantize_many

    def spoiled_many(xs: list[torch.Tensor], *arguments: Any) -> Sequence[Outputs]:
        found = many(xs, *arguments)
        for x, out in zip(xs, found, strict=True):
            spoil_second(x, out)
        return found

    monkeypatch.setattr(quantize, "prepare", prepared(spoil_second))
    monkeypatch.setattr(quantize, "quantize_many", spoiled_many)
    wrong = rows(LIST, kind)
    assert [row["measure"] for row in wrong] == [row["measure"] for row in right]
    for row in wrong:
        assert row["differs"].startswith("tensor 1: 1 of 3072 codes"), row


def test_a_list_that_takes_all_the_memory_is_measured_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measures = {}
    for free in (LIST.elements - 1, LIST.bytes - 1):
        monkeypatch.setattr(Small, "free", lambda _, free=free: free)
        measures[free] = [row["measure"] for row in rows(LIST, "cuda")]
    assert list(measures.values()) == [
        ["device", "wall, plan"],
        ["device", "wall, plan", "wall, no plan", "wall, no plan, outputs looked at"],
    ]


def test_a_list_that_is_swapped_short_or_unwritten_is_told() -> None:
    xs = [torch.randn(8, 8) for _ in range(3)]
    groups = block(8, 8)
    outs = [reference.quantize(x, groups) for x in xs]
    assert compare.with_references(xs, groups, IEEE, outs) == (None, 1.0)
    swapped = [outs[1], outs[0], outs[2]]
    told, checked = compare.with_references(xs, groups, IEEE, swapped)
    assert told is not None
    assert told.startswith("tensor 0")
    assert checked == 0
    assert compare.with_references(xs, groups, IEEE, outs[:2])[0] == "2 results for 3 tensors"
    outs[2][1].fill_(math.nan)
    assert compare.with_references(xs, groups, IEEE, outs) == (
        "tensor 2: not all of it is written",
        0.0,
    )


def test_a_long_list_is_compared_in_part_and_searched_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "_ALL", 100)
    monkeypatch.setattr(compare, "_SAMPLE", 2)
    xs = [torch.randn(8, 8) for _ in range(20)]
    xs[7] = torch.randn(16, 8)
    groups = block(8, 8)
    outs = [reference.quantize(x, groups) for x in xs]
    told, checked = compare.with_references(xs, groups, IEEE, outs)
    assert told is None
    assert 0 < checked < 0.5
    for number in (0, 7, 19):  # both ends, and the only one of its shape
        wrong = list(outs)
        wrong[number] = (outs[number][0].clone(), outs[number][1] * 2)
        assert compare.with_references(xs, groups, IEEE, wrong)[0] is not None
    for number in range(20):
        wrong = list(outs)
        wrong[number] = (outs[number][0].clone(), outs[number][1])
        wrong[number][0].view(torch.uint8)[3, 3] = 0x7F
        told = compare.with_references(xs, groups, IEEE, wrong)[0]
        assert told == f"tensor {number}: not all of it is written"


@pytest.mark.parametrize("recipe", [*recipes.RECIPES.values(), UE8M0.with_floor(1e-4)], ids=str)
@pytest.mark.parametrize(
    "groups", [block(128, 128), block(7, 5), block(1, 16), PER_CHANNEL, PER_TENSOR], ids=str
)
def test_the_plain_expression_is_the_recipe(groups: Groups, recipe: Recipe) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((128, 256), (13, 33), (1, 1)):
        x = torch.randn(shape, generator=generator)
        x *= torch.exp2(torch.randint(-12, 12, shape, generator=generator))
        x[:1, :1] = 448 * 2.0**-5  # its scale is a power of two
        x[-1] = 0
        for dtype in workloads.DTYPES:
            expected = reference.quantize(x.to(dtype), groups, recipe)
            found = (torch.empty_like(expected[0]), torch.empty_like(expected[1]))
            bench.eager(x.to(dtype), groups, recipe, found)
            assert compare.outputs(found, expected) is None


# --- what is measured -----------------------------------------------------------------------------


def test_the_works_of_a_gpu_are_those_of_the_figures() -> None:
    found = {work.name: work for work in workloads.for_cuda(IEEE, False, 200 << 30)}
    singles = "151936x4096 129280x7168 14336x4096 4096x14336 4096x4096 6144x4096 1024x4096"
    variants = "64x64 1x128 per-tensor per-channel reciprocal inverse-scale ue8m0 fp16 fp32"
    assert list(found) == [
        *singles.split(),
        *(f"14336x4096 {one}" for one in variants.split()),
        "1,024 x 768x2048",
        "Llama-3.1-8B",
        "Qwen3-30B-A3B",
    ]
    # Parameters of the released models, less embeddings, head, norms and routers.
    assert found["Llama-3.1-8B"].elements == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    embeddings, router, norms = 2 * 151936 * 2048, 48 * 128 * 2048, (48 * 2 + 1) * 2048 + 48 * 256
    assert found["Qwen3-30B-A3B"].elements == 30_532_122_624 - embeddings - router - norms
    assert len(found["Qwen3-30B-A3B"].shapes) == 48 * (4 + 3 * 128)


def test_bytes_are_what_must_move() -> None:
    work = Work("w", ((256, 130),))
    assert work.bytes == 3 * 256 * 130 + 4 * 2 * 2
    assert work.limit_bytes == work.bytes
    wide = replace(work, dtype=torch.float32, groups=PER_CHANNEL)
    assert wide.bytes == 5 * 256 * 130 + 4 * 256
    once = replace(work, groups=PER_TENSOR)
    assert (once.bytes, once.limit_bytes) == (3 * 256 * 130 + 4, 5 * 256 * 130 + 4)
    assert replace(work, shapes=((256, 130),) * 3).bytes == 3 * work.bytes


@pytest.mark.parametrize("free", [0, 2 << 30, 20 << 30, 78 << 30])
def test_as_many_layers_are_taken_as_fit(free: int) -> None:
    last = workloads.for_cuda(IEEE, False, free)[-1]
    one = sum(3 * n * k for n, k in workloads.QWEN_LAYER)
    if free < one:
        assert last.name == "Llama-3.1-8B"
        return
    layers = len(last.shapes) // len(workloads.QWEN_LAYER)
    assert last.name == f"Qwen3-30B-A3B, {layers} of 48 layers"
    assert last.bytes <= free < last.bytes * (layers + 1) / layers


def test_the_limit_of_a_tensor_that_is_read_twice_says_so() -> None:
    [row] = rows(replace(SMALL, groups=PER_TENSOR))
    twice = (5 * 200 * 136 + 4) / (3 * 200 * 136 + 4)
    assert row["of_limit"] / row["of_copy"] == pytest.approx(twice, rel=0.02)


def test_a_copy_moves_as_many_bytes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench._Bench(Small())
    moved = []
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda target, source: moved.append((len(target), len(source)))
    )
    made._copy(2 * (3 * 4096 + 5))()
    assert moved == [(4096, 4096)] * 3 + [(5, 5)]


# --- time on a GPU --------------------------------------------------------------------------------


class Mark:
    """An event that tells when it was recorded."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.at = time.perf_counter()
        self.log.append("mark")

    def elapsed_time(self, end: Mark) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[timing.Cuda, list[str]]:
    """A CUDA device whose events are clocks, and what was done on it in order."""
    log: list[str] = []

    class Flush:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(timing, "_event", lambda: Mark(log))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("wait"))
    device = timing.Cuda.__new__(timing.Cuda)
    vars(device).update(device=torch.device("cpu"), _flush=Flush(), _flush_seconds=0.01)
    vars(device).update(few=2, many=5, seconds=0.05)
    return device, log


def test_each_call_on_a_gpu_is_between_events_behind_a_flush(
    gpu: tuple[timing.Cuda, list[str]],
) -> None:
    device, log = gpu

    def slow() -> None:
        log.append("slow")
        time.sleep(0.002)

    found = device._events([slow, lambda: log.append("quick")], 2, [2, 1])
    one_round = ["flush", "flush", "mark", "slow", "mark", "flush", "mark", "quick", "mark"]
    assert log == ["wait", *one_round, *one_round, "wait"]
    assert [len(times) for times in found] == [2, 2]
    assert min(found[0]) >= 0.002 > max(found[1])


def test_the_device_is_kept_busy_for_longer_than_the_host_takes(
    gpu: tuple[timing.Cuda, list[str]],
) -> None:
    device, log = gpu
    assert device._flushes(lambda: None) == 2
    # 25 ms of the host are to lie behind 50 ms of the device or more: five flushes, and one.
    assert 6 <= device._flushes(lambda: time.sleep(0.025)) <= 9
    log.clear()
    device.times([lambda: time.sleep(0.025)], 1)
    assert log.count("flush") >= 6


def test_a_tenth_of_the_free_memory_is_left(
    gpu: tuple[timing.Cuda, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 5000))
    assert gpu[0].free() == 900


@pytest.mark.skipif(torch.cuda.is_available(), reason="the flag is needed")
def test_flags_are_read_again_when_the_device_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("fp8ctl.kernels.launch")
    read = launch.Flag.read
    with bench._unread_flags():
        assert launch.Flag.read is read
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def call() -> None:
        assert launch.Flag.read(None) is None
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), bench._unread_flags():
        call()
    assert launch.Flag.read is read


def test_the_number_of_rounds_is_bounded(gpu: tuple[timing.Cuda, list[str]]) -> None:
    device, _ = gpu
    assert device.rounds([lambda: None]) == 5
    assert device.rounds([lambda: time.sleep(0.1)]) == 2


@pytest.mark.gpu
def test_a_quick_run_on_a_gpu_is_exact_and_fast_enough_to_be_a_kernel() -> None:
    document = bench.run(device="cuda", quick=True)
    assert document["device"]["driver"]
    for row in document["rows"]:
        assert row["differs"] is None, row
        assert row["measure"] != "device" or row["of_limit"] > 0.3, row
