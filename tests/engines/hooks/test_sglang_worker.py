"""What SGLang's models say of themselves, and how its ranks are asked to rest."""

from __future__ import annotations

import asyncio
import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fp8ctl.engines.hooks import sglang_holding, sglang_worker
from fp8ctl.engines.hooks.receiver import Receiver
from fp8ctl.engines.hooks.sglang_ranks import Workers
from fp8ctl.engines.hooks.sglang_worker import ENGINE, Question


def method(kind: str, **facts: object) -> Any:
    """Return a method of quantisation, as far as it is looked at."""
    config = SimpleNamespace(is_checkpoint_fp8_serialized=facts.pop("serialized", True))
    return type(kind, (), {"block_quant": False, "quant_config": config, **facts})()


def layer(quantization: Any, *names: str, loaders: bool = True) -> nn.Module:
    module = nn.Module()
    if quantization is not None:
        module.quant_method = quantization
    for name in names or ("weight",):
        parameter = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        if loaders:
            parameter.weight_loader = print  # type: ignore[attr-defined]
        module.register_parameter(name, parameter)
    return module


LINEAR = {"block": {"block_quant": True}, "per-tensor": {}, "online": {"serialized": False}}


# --- can it be loaded twice ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", LINEAR)
def test_a_patched_model_can_be_loaded_twice_in_every_mode(mode: str) -> None:
    model = nn.Sequential(
        layer(method("Fp8LinearMethod", refittable=True, **LINEAR[mode])),
        layer(method("UnquantizedEmbeddingMethod"), loaders=False),
        layer(method("BaseKVCacheMethod"), loaders=False),
        layer(None, loaders=False),
    )
    assert list(ENGINE.obstacles(model)) == []


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (layer(method("Fp8LinearMethod", block_quant=True)), "the patch `refit` is not applied"),
        (layer(method("Fp8MoEMethod", block_quant=True)), "the patch `refit` is not applied"),
        (layer(method("Fp8LinearMethod", refittable=False)), "0: Marlin's and ROCm's forms"),
        (
            layer(method("Fp8MoEMethod", refittable=False, serialized=False)),
            "0: experts that SGLang quantises itself",
        ),
        (layer(method("Fp8EPMoEMethod", refittable=True)), "0 is quantised by Fp8EPMoEMethod"),
        (layer(method("W8A8Fp8LinearMethod")), "0 is quantised by W8A8Fp8LinearMethod"),
        (
            layer(method("Fp8LinearMethod", refittable=True), loaders=False),
            "0.weight has lost its loader",
        ),
    ],
)
def test_a_model_that_cannot_says_which_layer_and_why(module: nn.Module, why: str) -> None:
    told = Receiver(nn.Sequential(module), 0, ENGINE).refittable()
    assert not told["refittable"]
    assert told["why"].startswith(why)


def test_experts_in_blocks_can_be_loaded_twice_without_a_form_of_their_own() -> None:
    experts = layer(method("Fp8MoEMethod", block_quant=True, refittable=False))
    assert list(ENGINE.obstacles(nn.Sequential(experts))) == []


# --- what may be copied -------------------------------------------------------------------------


BLOCK, WHOLE, PLAIN = ("weight", "weight_scale_inv"), ("weight", "weight_scale"), ("weight",)


@pytest.mark.parametrize(
    ("quantization", "names", "copied"),
    [
        (method("Fp8LinearMethod", block_quant=True), BLOCK, BLOCK),
        (method("Fp8LinearMethod"), (*WHOLE, "input_scale"), PLAIN),
        (method("Fp8LinearMethod", serialized=False), PLAIN, ()),
        (method("UnquantizedLinearMethod"), PLAIN, PLAIN),
        (method("SomebodysMethod"), PLAIN, ()),
        (method("Fp8KVCacheMethod"), ("k_scale", "v_scale"), ()),
    ],
)
def test_only_what_a_loader_does_nothing_but_copy(
    quantization: Any, names: tuple[str, ...], copied: tuple[str, ...]
) -> None:
    """Scales of whole tensors are renewed for the kernels; 16-bit weights are quantised."""
    assert _copied(layer(quantization, *names)) == copied


def _copied(module: nn.Module) -> tuple[str, ...]:
    form = ENGINE.copies(module)
    assert form is not None
    parts = module.named_parameters()
    return tuple(n for n, p in parts if form(module, n, p.detach()) is not None)


@pytest.mark.parametrize("block", [True, False])
def test_experts_scales_are_copied_in_blocks_only(block: bool) -> None:
    weights = ("w13_weight", "w2_weight")
    scales = tuple(f"{name}_scale_inv" if block else f"{name}_scale" for name in weights)
    quantization = method("Fp8MoEMethod", block_quant=block, refittable=True)
    found = _copied(layer(quantization, *weights, *scales))
    assert found == (*weights, *(scales if block else ()))


def test_a_norm_is_copied_and_a_parameter_with_a_loader_of_its_own_is_not() -> None:
    assert _copied(layer(None, loaders=False)) == PLAIN
    assert _copied(layer(None)) == ()


def test_a_model_that_derives_something_from_its_weights_is_left_to_its_loaders() -> None:
    model = layer(None)
    model.post_load_weights = print  # type: ignore[assignment]
    assert ENGINE.copies(model) is None


# --- questions ----------------------------------------------------------------------------------


def test_a_question_goes_the_way_of_a_tensor() -> None:
    asked = pickle.loads(pickle.dumps(Question(b"{}")))
    assert isinstance(asked.to("cuda:0"), Question)
    assert asked.to(0) == b"{}"


class Server:
    """SGLang's tokenizer manager with requests that run.

    Attributes:
        late: how often a request is found that has begun since nothing ran.
    """

    def __init__(self, running: int) -> None:
        self.rid_to_state = dict.fromkeys(range(running))
        self.asked: list[dict[str, Any]] = []
        self.late = 0
        self.workers = Workers(
            SimpleNamespace(_global_state=SimpleNamespace(tokenizer_manager=self)),
            SimpleNamespace(tp_size=1, enable_memory_saver=False),
        )
        self.workers.ask = self._ask  # type: ignore[method-assign]

    async def _ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        self.asked.append({"what": what, "running": len(self.rid_to_state), **details})
        self.late -= 1
        return [{"rank": 0, "held": self.late < 0}]


def test_ranks_rest_when_the_last_request_has_ended() -> None:
    server = Server(2)

    async def ending() -> None:
        hold = asyncio.ensure_future(server.workers.hold("finish", 30))
        for _ in range(2):
            await asyncio.sleep(0.02)
            assert server.asked == []
            server.rid_to_state.popitem()
        await hold

    asyncio.run(ending())
    assert server.asked == [{"what": "hold", "running": 0, "how": "finish"}]


def test_requests_that_do_not_end_are_counted_and_go_on() -> None:
    server = Server(3)
    with pytest.raises(TimeoutError, match=r"3 requests still run after 0\.01 s"):
        asyncio.run(server.workers.hold("finish", 0.01))
    assert server.asked == []


def test_a_request_that_comes_between_the_last_ones_end_and_the_question_is_waited_for() -> None:
    """Held, it would go on with the new weights: an answer of two sets, said to be finished."""
    server = Server(0)
    server.late = 2
    asyncio.run(server.workers.hold("finish", 30))
    assert server.asked == [{"what": "hold", "running": 0, "how": "finish"}] * 3
    server.late = 1000
    with pytest.raises(TimeoutError, match="some requests still run after 0 s"):
        asyncio.run(server.workers.hold("finish", 0.0))


@pytest.mark.parametrize("in_flight", ["abort", "pause"])
def test_what_need_not_end_is_not_waited_for(in_flight: Any) -> None:
    server = Server(3)
    server.late = 1
    asyncio.run(server.workers.hold(in_flight, 30))
    assert server.asked == [{"what": "hold", "running": 3, "how": in_flight}]


@pytest.mark.parametrize("what", ["receive", "connect", "digests"])
def test_sglangs_watchdog_sees_no_batch_while_the_weights_are_worked_on(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that joins late, or a bucket of a slow one, must not end the server."""
    scheduler = SimpleNamespace(cur_batch="a batch", watchdog_last_time=0.0)
    monkeypatch.setattr(sglang_holding, "_holding", sglang_holding.Holding(scheduler))
    seen: list[object] = []

    class Slow(Receiver):
        def answer(self, what: str, details: Any) -> dict[str, Any]:
            seen.append((what, scheduler.cur_batch))
            return {}

    assert sglang_worker._answer(Slow(nn.Linear(2, 2), 0, ENGINE), what, {}) == {}
    assert seen == [(what, None)]
    assert scheduler.cur_batch == "a batch"


# --- a folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["taken", "refused", "broken"])
def test_an_updates_folder_does_not_become_the_models(
    end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang would load it again where a later load fails; by then it is gone."""

    class Runner:
        model_config = SimpleNamespace(model_path="the model")
        server_args = SimpleNamespace(model_path="the model", load_format="auto")
        load_config = "the first"

        def update_weights_from_disk(self, path: str, load_format: str) -> tuple[bool, str]:
            self.model_config.model_path = self.server_args.model_path = path
            self.server_args.load_format = self.load_config = load_format
            if end == "broken":
                receiver.broken = True
                raise ValueError("half of it")
            return end == "taken", "told"

    runner: Any = Runner()
    receiver = Receiver(nn.Linear(2, 2), 0, ENGINE)
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    holding = sglang_holding.Holding(SimpleNamespace(tp_worker=worker))
    monkeypatch.setattr(sglang_holding, "_holding", holding)
    answer = sglang_worker._answer(receiver, "reload", {"path": "/tmp/update"})
    json.dumps(answer)
    assert answer["ok"] is (end == "taken")
    assert answer["changed"] is (end != "refused")
    assert answer["message"] == ("ValueError: half of it" if end == "broken" else "told")
    assert (runner.model_config.model_path, runner.load_config) == ("the model", "the first")
    assert vars(runner.server_args) == {"model_path": "the model", "load_format": "auto"}
    capsys.readouterr()


def test_a_rank_that_may_go_on_by_itself_has_its_scheduler_do_it() -> None:
    assert ENGINE.resume is sglang_holding.resume_here
