"""docs/trainers.md: its Python runs, against servers of the protocol and stand-in trainers."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from fp8ctl import errors
from fp8ctl.formats import Mode
from fp8ctl.push import Rollout, replies
from tests.push.serving import Server, serving
from tests.push.test_rollout import holds
from tests.test_stream import WEIGHTS, planned, wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trainers.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


class Model:
    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from WEIGHTS.items()


class ServerAdapter:
    """verl's: takes the weights of a step; here it keeps what its own transport would carry."""

    async def update_weights(self, weights: Any, **kwargs: Any) -> None:
        self.carried = [(name, tensor) async for name, tensor in weights]


class FSDPEngine:
    """AReaL's: `update_weights(meta)` ends in the method that the page replaces."""

    model = Model()

    def get_version(self) -> int:
        return 7

    def update_weights(self, meta: object) -> None:
        self._update_weights_from_distributed(meta)

    def _update_weights_from_distributed(self, meta: object) -> None:
        raise AssertionError("the page replaces it")


class HfWeightIteratorBase:
    """slime's: chunks of the weights that a getter holds, under the names of Hugging Face."""

    @staticmethod
    def create(args: object, model: object, **kwargs: Any) -> HfWeightIteratorBase:
        # One of its two iterators takes exactly these, too.
        assert set(kwargs) == {"model_name", "quantization_config"}
        assert kwargs["quantization_config"] is None, "it would quantise by itself"
        return HfWeightIteratorBase()

    def get_hf_weight_chunks(self, megatron_local_weights: Any) -> Iterator[Any]:
        pairs = list(megatron_local_weights.items())
        yield pairs[:2]
        yield pairs[2:]


class GRPOTrainer:
    """TRL's: calls `_move_model_to_vllm` before it generates."""

    def __init__(self) -> None:
        self.model = types.SimpleNamespace(module=Model())
        self.accelerator = types.SimpleNamespace(unwrap_model=lambda model: model.module)
        self.state = types.SimpleNamespace(global_step=9)


STANDINS: dict[str, Any] = {
    "verl.workers.rollout.sglang_rollout.sglang_rollout": {"ServerAdapter": ServerAdapter},
    "slime.backends.megatron_utils.update_weight.hf_weight_iterator_base": {
        "HfWeightIteratorBase": HfWeightIteratorBase
    },
    "areal.engine.fsdp_engine": {"FSDPEngine": FSDPEngine},
    "trl": {"GRPOTrainer": GRPOTrainer},
}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Be the one rank of a process group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(planned(WEIGHTS, Mode.BLOCK), folder=tmp_path) as found:
        yield found


@pytest.fixture
def page(
    alone: None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """Run the page from its top; return the names that it defines."""
    monkeypatch.chdir(tmp_path)
    plan = planned(WEIGHTS, Mode.BLOCK)
    Path("plan.json").write_text(json.dumps(plan.to_json()))
    for name, members in STANDINS.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        for parent in _parents(name):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    names: dict[str, Any] = {"model": Model()}
    for block in BLOCKS:
        text = block.replace("http://127.0.0.1:30000", server.url)
        exec(compile(text, str(PAGE), "exec"), names)
    yield names
    names["rollout"].close()


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def served(server: Server) -> str:
    """Return the version that is served, once it is the checkpoint's FP8 form."""
    assert holds(server, wanted(Mode.BLOCK))
    return str(server.gate.describe()["version"])


def test_the_page_updates_a_server_from_one_rank_and_from_several(
    page: dict[str, Any], server: Server
) -> None:
    assert page["done"].version == "1"
    assert served(server) == "2"
    asyncio.run(page["updated"](Model().named_parameters(), 3))
    assert served(server) == "3"


def test_verls_adapter_pushes_or_quantises(page: dict[str, Any], server: Server) -> None:
    asyncio.run(page["PushingAdapter"]().update_weights(iter(WEIGHTS.items()), global_steps=5))
    assert served(server) == "5"
    adapter = page["QuantizingAdapter"]()
    asyncio.run(adapter.update_weights(iter(WEIGHTS.items())))
    assert [name for name, _ in adapter.carried] == [n for n, _ in wanted(Mode.BLOCK)]
    assert served(server) == "5", "its own transport carries them"


def test_areals_engine_pushes(page: dict[str, Any], server: Server) -> None:
    page["PushingEngine"]().update_weights(object())
    assert served(server) == "7"


def test_slimes_updater_pushes(page: dict[str, Any], server: Server) -> None:
    address = server.url.removeprefix("http://")
    args = types.SimpleNamespace(rollout_external_engine_addrs=[address])
    updater = page["UpdateWeightByPush"](
        args, [], lambda: WEIGHTS, model_name="llama", quantization_config={"quant_method": "fp8"}
    )
    updater.connect_rollout_engines([], None, engine_gpu_counts=[1], engine_gpu_offsets=[0])
    updater.update_weights()
    updater.rollout.close()
    assert updater.weight_version == 1, "slime compares it with the engine's"
    assert updater.pop_metrics() == {}
    assert served(server) == "1"


def test_trls_trainer_pushes(page: dict[str, Any], server: Server) -> None:
    page["PushingTrainer"]()._move_model_to_vllm()
    assert served(server) == "9"


def test_the_arguments_that_the_page_speaks_of_exist() -> None:
    spoken = set(re.findall(r"`(?:Rollout\(\.\.\., )?(\w+)(?:=[^`]*)?`", TEXT))
    parameters = set(inspect.signature(Rollout.__init__).parameters)
    assert {"via", "in_flight", "delta", "record", "bucket_bytes", "api_key"} <= parameters & spoken


def test_every_error_that_a_server_s_answer_becomes_is_told_what_to_do_about() -> None:
    table = TEXT.partition("## When it raises")[2].partition("\n## ")[0]
    told = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.M)
        for name in re.findall(r"`(\w+)`", row)
    }
    kinds = {kind.__name__ for kind in replies._KINDS.values()}
    assert (
        kinds | {"TimeoutError", "NotFoundError", "NotPermittedError", "EngineFailedError"} <= told
    )
    for name in told - {"TimeoutError"}:
        assert issubclass(getattr(errors, name), errors.Fp8ctlError)
