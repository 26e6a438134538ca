"""Questions reach every rank of SGLang, and every rank's answer comes back.

The few names of SGLang that a question goes through are stand-ins.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8ctl.engines.hooks import ranklog, sglang_holding, sglang_ranks, sglang_worker
from fp8ctl.engines.hooks.receiver import Receiver
from fp8ctl.kernels.digest import digest, to_text
from tests.engines.hooks.sglang_app import EXPECTED
from tests.engines.hooks.sglang_engine import workers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engines.hooks.sglang_engine import Engine


def test_digests_of_every_rank_come_back_in_the_order_of_ranks(
    run_dir: Path, engine: Engine
) -> None:
    answers = asyncio.run(workers(engine).ask("digests"))
    assert [answer["rank"] for answer in answers] == [0, 1]
    for answer, model in zip(answers, engine.models, strict=True):
        assert answer["format"] == "checkpoint"
        told = {line["name"]: line["digest"] for line in answer["tensors"]}
        assert told == {n: to_text(digest(t)) for n, t in model.named_parameters()}
    assert list((run_dir / "reports").iterdir()) == [], "answers are left behind"


def quantised(kind: str, **facts: object) -> nn.Module:
    """Return a layer with a method of SGLang's, as far as it is looked at."""
    config = SimpleNamespace(is_checkpoint_fp8_serialized=True)
    module = nn.Linear(2, 4)
    module.logical_widths = [4]  # type: ignore[assignment]
    method = type(kind, (), {"block_quant": False, "quant_config": config, **facts})()
    module.quant_method = method
    return module


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        (nn.Linear(2, 4), "checkpoint"),
        (quantised("Fp8LinearMethod", block_quant=True), "checkpoint"),
        (quantised("Fp8MoEMethod", refittable=True), "checkpoint"),
        (quantised("Fp8LinearMethod"), "shared"),  # not patched: one scale for what is fused
        (quantised("Fp8LinearMethod", cutlass_fp8_supported=True), "engine"),
        (quantised("Fp8LinearMethod", use_marlin=True), "engine"),
        (quantised("Fp8LinearMethod", refittable=False), "engine"),
        (
            quantised(
                "Fp8MoEMethod",
                refittable=True,
                quant_config=SimpleNamespace(is_checkpoint_fp8_serialized=False),
            ),
            "online",  # a scale for every row
        ),
        (quantised("Fp8EPMoEMethod", block_quant=True), "engine"),
    ],
)
def test_weights_in_the_form_of_a_kernel_are_told_apart(
    layer: nn.Module, form: str, run_dir: Path, engine: Engine
) -> None:
    engine.models = (nn.Sequential(nn.Linear(3, 2), layer),)
    [answer] = asyncio.run(workers(engine).ask("digests"))
    assert answer["format"] == form


def test_what_the_engine_quantised_by_rows_shows_the_scales_that_kernels_read(
    run_dir: Path, engine: Engine
) -> None:
    config = SimpleNamespace(is_checkpoint_fp8_serialized=False)
    layer = quantised("Fp8LinearMethod", refittable=True, quant_config=config)
    layer.register_buffer("weight_scale_channel", torch.randn(4, 1))
    engine.models = (nn.Sequential(layer),)
    [answer] = asyncio.run(workers(engine).ask("digests"))
    told = {line["name"]: (line["shape"], line["digest"]) for line in answer["tensors"]}
    scales = layer.weight_scale_channel
    assert told["0.weight_scale"] == ([4, 1], to_text(digest(scales)))  # type: ignore[arg-type]


def test_a_stock_layer_shows_its_codes_as_the_checkpoint_has_them(
    run_dir: Path, engine: Engine
) -> None:
    layer: Any = quantised("Fp8LinearMethod")
    codes = layer.weight.detach().clone()
    layer.weight = nn.Parameter(codes.t())
    layer.weight_scale = nn.Parameter(torch.tensor(2.0))
    engine.models = (nn.Sequential(layer),)
    [answer] = asyncio.run(workers(engine).ask("digests"))
    told = {line["name"]: line["digest"] for line in answer["tensors"]}
    assert told["0.weight"] == to_text(digest(codes))
    assert told["0.weight_scale"] == to_text(digest(torch.tensor([2.0])))


def test_scales_are_those_that_the_kernels_multiply_with(run_dir: Path, engine: Engine) -> None:
    """Refit keeps a copy of per-tensor scales with one entry per channel, and it is the truth."""
    layer = quantised("Fp8LinearMethod", refittable=True)
    layer.weight_scale = nn.Parameter(torch.tensor([1.0, 2.0]))
    layer.input_scale = nn.Parameter(torch.tensor([9.0]))
    layer.logical_widths = [1, 3]  # type: ignore[assignment]
    layer.weight_scale_channel = torch.tensor([[1.0], [2.0], [2.0], [2.0]])
    engine.models = (layer,)

    def told() -> dict[str, str]:
        [answer] = asyncio.run(workers(engine).ask("digests"))
        return {line["name"]: line["digest"] for line in answer["tensors"]}

    assert set(told()) == {"weight", "bias", "weight_scale"}
    assert told()["weight_scale"] == to_text(digest(torch.tensor([1.0, 2.0])))
    layer.weight_scale_channel[2] = 5.0
    assert told()["weight_scale"] == to_text(digest(torch.tensor([1.0, 5.0])))


def test_progress_counts_what_has_not_arrived(run_dir: Path, engine: Engine) -> None:
    for rank, model in enumerate(engine.models):
        sglang_worker._receiver(model, rank).arrived.update(EXPECTED[:1])
    answers = asyncio.run(workers(engine).ask("progress", expected=EXPECTED))
    assert [a["missing"] for a in answers] == [EXPECTED[1:]] * 2
    assert [a["missing_count"] for a in answers] == [2, 2]


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the scheduler of this process is asked to do, in place of one."""
    done: list[str] = []

    def does(what: str) -> Callable[[], dict[str, object]]:
        def do() -> dict[str, object]:
            done.append(what)
            return {}

        return do

    stand_in = SimpleNamespace(flush=does("flush"), resume=does("resume"))
    monkeypatch.setattr(sglang_holding, "this", lambda: stand_in)
    return done


def test_the_end_of_an_update_is_one_question_and_the_way_back_another(
    run_dir: Path, engine: Engine, holding: list[str]
) -> None:
    asked = workers(engine)
    answers = asyncio.run(asked.settle(expected=EXPECTED, layouts=[]))
    assert [len(a["digests"]["tensors"]) for a in answers] == [
        len(list(model.parameters())) for model in engine.models
    ]
    assert [a["missing_count"] for a in answers] == [len(EXPECTED)] * 2
    # The next time they tell sums alone.
    layouts = [a["digests"]["layout"] for a in answers]
    answers = asyncio.run(asked.settle(expected=[], layouts=layouts))
    assert all("sums" in a["digests"] for a in answers)
    assert (len(engine.requests), holding) == (2, ["flush"] * 4)
    for model, rank in zip(engine.models, range(2), strict=True):
        receiver = sglang_worker._receiver(model, rank)
        receiver._by_loader.add("a")
    assert asyncio.run(asked.resume(["a"])) == ""
    assert (len(engine.requests), holding[4:]) == (3, ["resume"] * 2)


def test_the_last_bucket_and_the_end_of_its_update_are_one_question(
    run_dir: Path, engine: Engine, holding: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = workers(engine)
    told: dict[str, Any] = {"error": "", "broken": False, "loaded": 3, "seconds": {"copies": 0.1}}
    monkeypatch.setattr(Receiver, "receive", lambda *_: told)
    bucket = {"slot": 0, "nbytes": 8, "number": 0}
    assert not any("then" in a for a in asyncio.run(asked.receive(bucket)))
    assert holding == []
    answers = asyncio.run(asked.receive(bucket, {"expected": EXPECTED, "layouts": []}))
    assert [a["then"]["missing_count"] for a in answers] == [len(EXPECTED)] * 2
    assert all(a["then"]["digests"]["tensors"] for a in answers)
    assert [sorted(a["seconds"]) for a in answers] == [["copies", "settle"]] * 2
    assert (len(engine.requests), holding) == (2, ["flush"] * 2)
    told["error"] = "no carrier"
    answers = asyncio.run(asked.receive(bucket, {"expected": []}))
    assert not any("then" in a for a in answers)


def test_ranks_that_cannot_trust_what_was_proven_compute_all_the_same(
    run_dir: Path,
    engine: Engine,
    holding: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(names: object) -> None:
        raise MemoryError("too many names")

    receiver = sglang_worker._receiver(engine.models[1], 1)
    monkeypatch.setattr(receiver, "trust", fail)
    assert asyncio.run(workers(engine).resume(["a"])) == "rank 1: MemoryError: too many names"
    assert holding == ["resume"] * 2
    assert "Traceback" in capsys.readouterr().err


def test_a_question_that_a_rank_cannot_answer_is_an_error_that_names_it(
    run_dir: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="rank 1: ValueError: unknown question 'nonsense'"):
        asyncio.run(workers(engine).ask("nonsense"))
    assert list((run_dir / "reports").iterdir()) == []
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["Success", '{"id": "of another question", "rank": 0}'])
def test_what_is_no_answer_to_the_question_is_not_taken_for_one(
    message: str, run_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_worker, "taken", lambda _: message)
    with pytest.raises(RuntimeError, match="did not answer what it was asked"):
        asyncio.run(workers(engine).ask("digests"))
    assert list(run_dir.glob("reports/*")) == []


def test_a_server_of_several_replicas_is_told_that_it_is_one(run_dir: Path, engine: Engine) -> None:
    engine.refusal, engine.replicas = "whatever", 2
    with pytest.raises(RuntimeError, match="data parallelism: one server would have several sets"):
        asyncio.run(workers(engine).ask("refittable"))


def test_a_refusal_of_the_engine_is_an_error(run_dir: Path, engine: Engine) -> None:
    engine.refusal = "no such load format"
    with pytest.raises(RuntimeError, match="no such load format"):
        asyncio.run(workers(engine).ask("digests"))


def test_a_question_that_is_cancelled_is_answered_and_the_next_one_too(
    run_dir: Path, engine: Engine
) -> None:
    async def ask() -> list[dict[str, Any]]:
        asked = workers(engine)
        first = asyncio.ensure_future(asked.ask("digests"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        second = asyncio.ensure_future(asked.ask("digests"))
        await asked.ask("digests")
        return await second

    assert [answer["rank"] for answer in asyncio.run(ask())] == [0, 1]
    assert len(engine.requests) == 3
    assert list((run_dir / "reports").iterdir()) == [], "answers are left behind"


def test_a_rank_that_stays_silent_is_named(
    run_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_ranks, "ANSWER_WITHIN", 0.1)
    engine.silent = {1}
    with pytest.raises(RuntimeError, match=r"no \w+\.1\.json within 0 s"):
        asyncio.run(workers(engine).ask("digests"))
    assert list(run_dir.glob("reports/*")) == [], "the other's answer is left behind"


def test_schedulers_that_hang_do_not_keep_the_server_waiting_for_ever(
    run_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_ranks, "ANSWER_WITHIN", 0.05)
    monkeypatch.setattr(sglang_ranks, "GRACE", 0.05)
    stock = engine.update_weights_from_tensor_communicator

    async def test() -> None:
        asked, go_on = workers(engine), asyncio.Event()

        async def hang(request: Any) -> list[Any]:
            await go_on.wait()
            return await stock(request)

        monkeypatch.setattr(engine, "update_weights_from_tensor_communicator", hang)
        with pytest.raises(RuntimeError, match="did not answer within"):
            await asked.ask("digests")
        # The communicator takes one at a time, so that another would never be sent.
        with pytest.raises(RuntimeError, match="have not answered the question before"):
            await asked.ask("digests")
        assert engine.requests == []
        go_on.set()
        assert len(await asked.ask("digests")) == 2
        assert list((run_dir / "reports").iterdir()) == [], "the late answer is left behind"

    asyncio.run(test())


def test_without_a_run_folder_nothing_is_asked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ranklog.RUN_DIR, raising=False)
    with pytest.raises(RuntimeError, match="FP8CTL_RUN_DIR"):
        asyncio.run(workers(engine).ask("digests"))
    assert engine.requests == []


@pytest.mark.parametrize(
    "tensors",
    [
        [("model.norm.weight", torch.ones(2))],
        [(sglang_worker.QUESTION, torch.tensor([255, 0], dtype=torch.uint8))],
        [(sglang_worker.QUESTION, sglang_worker.Question(b"no JSON"))],
        [],
    ],
)
def test_what_is_no_question_is_passed_over(
    tensors: list[tuple[str, torch.Tensor]], run_dir: Path, engine: Engine
) -> None:
    """An exception here would end the server."""
    sglang_worker.load(engine.models[0], tensors)
    assert list(run_dir.iterdir()) == []
