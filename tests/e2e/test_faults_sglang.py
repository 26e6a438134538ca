"""Faults in the weights of the real SGLang 0.4.8: each has its word, and the tensor is named.

They are planted into one running server (`plant`), or pushed by a client that lies, and undone by a
refit, after which the server is well again.
"""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from fp8ctl.check import weights
from fp8ctl.render import Reporter
from tests.conftest import ROOT
from tests.e2e import plant
from tests.e2e.conftest import post, random_experts, write_model
from tests.e2e.entry import EntryModule
from tests.e2e.pushing import Bucket, Pusher, bucket
from tests.e2e.test_push_sglang import Served, serving, step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Cli, Json

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

LAYER = "model.layers.1"
Q, OUT, DOWN = (
    f"{LAYER}.{m}.weight" for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
)
QKV = f"{LAYER}.self_attn.qkv_proj.weight"
SCALE = "_scale_inv"


@dataclass(frozen=True)
class Patient:
    """A server with faults.

    Attributes:
        served: the server, on checkpoint `a`.
        b: folder of the checkpoint one step later.
    """

    served: Served
    b: Path

    def plant(self, what: str, **details: Any) -> None:
        answer = post(self.served.url, "/update_weights_from_tensor", plant.body(what, **details))
        assert answer.status_code == 200, answer.text
        assert self.served.state["state"] == "ready"

    def push(self, sent: list[Bucket], version: str, said: list[Bucket] | None = None) -> None:
        """Push a set; where `said` differs, say that it is that one, and ask for no proof."""
        with Pusher(self.served.url) as pusher:
            push = pusher.begin(version)
            for number, (one, other) in enumerate(zip(sent, said or sent, strict=True)):
                pusher.send(push, number, Bucket(one.named, other.entries, one.nbytes))
            answer = pusher.end(push, len(sent), verify=said is None)
            assert answer["state"] == "ready"

    def heal(self) -> None:
        self.plant("undo")
        self.push(self.served.a, "A")

    def check(self, model: Path | None = None) -> Json:
        return check(self.served.url, model)


def check(url: str, model: Path | None = None) -> Json:
    report = Reporter(out=io.StringIO(), err=io.StringIO())
    found = weights.verify(url, str(model) if model else None, report, None)
    json.dumps(found)
    return found


def told(found: Json) -> dict[str, Json]:
    """Return what is said of each tensor that is a fault."""
    return {
        line["name"]: line
        for line in found["tensors"]
        if line["found"] == "different" or (line["quantize"] and line["found"] == "missing")
    }


def looks(found: Json) -> dict[str, str]:
    return {name: line["looks"] for name, line in told(found).items()}


@contextmanager
def patient(cli: Cli, model: Path, folder: Path, mode: str, *more: str) -> Iterator[Patient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        loader = ("--", "--custom-weight-loader", plant.LOADER)
        with serving(cli, model, mode, *more, *loader) as served:
            state = step(load_file(str(model / "model.safetensors")))
            b = write_model(folder / "later", model, state, {})
            yield Patient(served, b)


@pytest.fixture(scope="module")
def dense(
    cli: Cli, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patient]:
    with patient(cli, small_model, tmp_path_factory.mktemp("dense"), "block") as one:
        yield one


def test_a_code_a_scale_and_old_weights_have_their_words(dense: Patient) -> None:
    """The short form of what follows."""
    found = dense.check()
    assert (found["verdict"], found["seconds"][0]["rank"]) == ("fp8-ok", 0)
    assert found["seconds"][0]["total"] > 0
    assert {q["sqnr_db"] > 20 for q in found["quality"].values()} == {True}

    dense.plant("flip", name=f"{LAYER}.mlp.down_proj.weight", at=[3, 2])
    found = dense.check()
    assert found["verdict"] == "wrong-weights"
    [line] = told(found).values()
    assert (line["name"], line["codes"], line["rows"]) == (
        DOWN,
        {"different": 1, "of": 576 * 1536},
        "3",
    )
    assert f"{DOWN} is different (rank 0, 1 of 884736 codes, row 3)" in found["message"]

    # A client that says B and sends A: nothing but values can tell.
    dense.push(dense.served.a, "A")
    dense.push(dense.served.a, "B", said=dense.served.b)
    assert dense.served.state["version"] == "B"
    found = dense.check(dense.b)
    assert found["verdict"] == "stale"
    assert {line["version"] for line in told(found).values()} == {"version A"}
    assert len(told(found)) >= 34


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.long
def test_scales_that_are_not_there(dense: Patient) -> None:
    for value in (1.0, torch.finfo(torch.float32).min):
        dense.plant("fill", name=f"{QKV}{SCALE}", value=value)
        found = dense.check()
        assert found["verdict"] == "unscaled"
        assert set(told(found)) == {
            f"{LAYER}.self_attn.{part}_proj.weight{SCALE}" for part in "qkv"
        }
        assert set(looks(found).values()) == {"unscaled"}
    dense.heal()
    # Of one part of what is fused, some rows.
    dense.plant("fill", name=f"{QKV}{SCALE}", value=torch.finfo(torch.float32).min, rows=[2, 4])
    found = dense.check()
    assert (found["verdict"], looks(found)) == ("unscaled", {f"{Q}{SCALE}": "unscaled"})
    assert told(found)[f"{Q}{SCALE}"]["rows"] == "2-3"
    dense.heal()
    dense.plant("drop", name=f"{LAYER}.self_attn.o_proj.weight{SCALE}")
    found = dense.check()
    assert (found["verdict"], looks(found)) == ("unscaled", {f"{OUT}{SCALE}": "unscaled"})
    assert "is missing" in found["message"]
    dense.heal()
    assert dense.check()["verdict"] == "fp8-ok"


@pytest.mark.long
def test_a_transposed_weight(dense: Patient) -> None:
    """A square o_proj that was loaded as it lies in another engine's memory."""
    dense.plant("transpose", name=OUT)
    found = dense.check()
    assert (found["verdict"], looks(found)) == ("wrong-weights", {OUT: "transposed"})
    dense.heal()
    assert dense.check()["verdict"] == "fp8-ok"


@pytest.mark.long
def test_another_block_size(dense: Patient) -> None:
    dense.plant("reblock", name=OUT, side=32, was=64)
    found = dense.check()
    assert found["verdict"] == "wrong-weights"
    assert looks(found)[f"{OUT}{SCALE}"] == "other block"
    assert "18x18 where 9x9 is expected" in told(found)[f"{OUT}{SCALE}"]["detail"]
    dense.heal()
    assert dense.check()["verdict"] == "fp8-ok"


@pytest.mark.long
def test_sixteen_bits_somewhere_and_everywhere(dense: Patient) -> None:
    dense.plant("widen", names=[OUT])
    found = dense.check()
    assert (found["verdict"], looks(found)) == ("bf16-fallback", {OUT: "bf16"})
    assert f"1 of 14 tensors that the plan quantises: {OUT} is bfloat16" in found["message"]
    dense.heal()
    assert dense.check()["verdict"] == "fp8-ok"


@pytest.mark.long
def test_half_an_update(dense: Patient) -> None:
    """Without a proof, and broken off."""
    dense.push(dense.served.a, "A")
    with Pusher(dense.served.url) as pusher:
        push = pusher.begin("B", complete=False)
        pusher.send(push, 0, dense.served.b[0])
        assert pusher.end(push, 1)["state"] == "ready"
    arrived = {entry.name for entry in dense.served.b[0].entries}
    found = dense.check(dense.b)
    assert found["verdict"] == "stale", found["message"]
    assert not arrived & set(told(found))
    assert {line["version"] for line in told(found).values()} == {"version A"}
    found = dense.check()
    assert found["verdict"] == "wrong-weights"
    assert set(told(found)) <= arrived
    assert "is that of version B, which was brought later" in found["message"]
    with Pusher(dense.served.url) as pusher:
        push = pusher.begin("B")
        pusher.send(push, 0, dense.served.b[0])
        pusher.call("/fp8ctl/push/abort", push=push, reason="a test")
    found = dense.check(dense.b)
    assert found["verdict"] == "wrong-weights"
    assert "the server is failed" in found["message"]
    dense.push(dense.served.a, "A")
    assert dense.check()["verdict"] == "fp8-ok"


@pytest.mark.long
def test_another_model_of_the_same_shape(dense: Patient, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(99)
    other = [
        (n, (torch.randn(t.shape, generator=noise) * 0.1).to(t.dtype))
        for one in dense.served.a
        for n, t in one.named
    ]
    sent = [bucket(other)]
    said = [Bucket(sent[0].named, _entries_of(dense.served.a, sent[0]), sent[0].nbytes)]
    dense.push(sent, "A again", said)
    found = dense.check()
    assert found["verdict"] == "wrong-weights"
    assert len(told(found)) == len(other)
    assert all(line["looks"] == "" for line in told(found).values() if line["codes"])
    # A checkpoint that the server never saw.
    dense.push(dense.served.a, "A")
    state = {n: t * 1.5 for n, t in load_file(str(dense.b / "model.safetensors")).items()}
    found = dense.check(write_model(tmp_path / "other", dense.b, state, {}))
    assert found["verdict"] == "stale"
    assert dense.check()["verdict"] == "fp8-ok"


def _entries_of(said: list[Bucket], sent: Bucket) -> tuple[Any, ...]:
    digests = {entry.name: entry.digest for one in said for entry in one.entries}
    return tuple(entry._replace(digest=digests[entry.name]) for entry in sent.entries)


@pytest.mark.long
def test_dummy_weights(dense: Patient) -> None:
    dense.plant("dummy")
    found = dense.check()
    assert found["verdict"] == "wrong-weights"
    seen = {line["looks"] for line in told(found).values() if line["codes"] and line["quantize"]}
    assert seen == {"dummy"}
    dense.heal()
    assert dense.check()["verdict"] == "fp8-ok"


@pytest.mark.long
def test_a_server_that_was_started_in_16_bits(cli: Cli, small_model: Path, tmp_path: Path) -> None:
    """The plan says FP8, and the engine was told nothing of it."""
    fp8 = tmp_path / "fp8"
    cli.run("quantize", "--model", str(small_model), "--out", str(fp8), "--backend", "sglang")
    plan = json.loads((fp8 / "fp8ctl.json").read_text())["plan"]
    entry = EntryModule(cli, small_model, plan, tmp_path / "run")
    with entry.served("--disable-overlap-schedule") as url:
        found = check(url)
    assert found["verdict"] == "bf16-fallback"
    assert found["message"] == "the server holds bfloat16 where the plan says FP8"
    assert looks(found)[OUT] == looks(found)[f"{OUT}{SCALE}"] == "bf16"


# --- experts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_experts(demo_model, tmp_path_factory.mktemp("experts") / "experts")


@pytest.fixture(scope="module")
def sparse(
    cli: Cli, experts_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patient]:
    with patient(cli, experts_model, tmp_path_factory.mktemp("sparse"), "block") as one:
        yield one


EXPERTS = f"{LAYER}.mlp.experts"
GATE = f"{LAYER}.mlp.gate.weight"


@pytest.mark.long
def test_faults_of_experts(sparse: Patient) -> None:
    """Two that changed places, one that was never scaled, one that lies on its side."""
    assert sparse.check()["verdict"] == "fp8-ok"
    both = [f"{EXPERTS}.w13_weight{end}" for end in ("", SCALE)]
    sparse.plant("swap", names=both, a=1, b=2)
    found = sparse.check()
    assert found["verdict"] == "wrong-weights"
    others = {name: line["with"] for name, line in told(found).items()}
    assert others == {
        f"{EXPERTS}.{e}.{part}_proj.weight{end}": f"{EXPERTS}.{3 - e}.{part}_proj.weight{end}"
        for e in (1, 2)
        for part in ("gate", "up")
        for end in ("", SCALE)
    }
    assert set(looks(found).values()) == {"swapped"}
    sparse.heal()
    sparse.plant("fill", name=f"{EXPERTS}.w2_weight{SCALE}", value=1.0, rows=[3, 4])
    found = sparse.check()
    assert found["verdict"] == "unscaled"
    assert looks(found) == {f"{EXPERTS}.3.down_proj.weight{SCALE}": "unscaled"}
    sparse.heal()
    sparse.plant("flip", name=f"{EXPERTS}.w13_weight", at=[2, 256 + 7, 9])
    found = sparse.check()
    [line] = told(found).values()
    assert (line["name"], line["codes"], line["rows"]) == (
        f"{EXPERTS}.2.up_proj.weight",
        {"different": 1, "of": 256 * 256},
        "7",
    )
    sparse.heal()
    assert sparse.check()["verdict"] == "fp8-ok"


@pytest.mark.long
@pytest.mark.parametrize("keep_dtype", [True, False])
def test_a_quantised_router(sparse: Patient, keep_dtype: bool) -> None:
    """As both engines take one: raw into 16 bits; and as none should: in FP8."""
    sparse.plant("cast", name=GATE, keep_dtype=keep_dtype)
    found = sparse.check()
    assert found["verdict"] == "router-quantised"
    assert found["message"].startswith(GATE)
    assert list(told(found)) == [GATE]
    sparse.heal()
    assert sparse.check()["verdict"] == "fp8-ok"


@pytest.mark.long
def test_old_experts(sparse: Patient) -> None:
    sparse.push(sparse.served.a, "A")
    sparse.push(sparse.served.a, "B", said=sparse.served.b)
    found = sparse.check(sparse.b)
    assert found["verdict"] == "stale"
    assert sparse.check()["verdict"] == "fp8-ok", "it is A, whatever it was called"
    assert f"{EXPERTS}.0.gate_proj.weight" in told(found)


# --- servers that are well, and other modes -------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mode", ["block", "per-tensor", "online"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_healthy_servers_are_well_through_ten_refits(
    mode: str, kind: str, cli: Cli, small_model: Path, experts_model: Path, tmp_path: Path
) -> None:
    """No false alarm: each set beside its own checkpoint; the other one is the control."""
    model = small_model if kind == "dense" else experts_model
    with patient(cli, model, tmp_path, mode) as one:
        found = one.check()
        assert (found["verdict"], found["counts"]["different"]) == ("fp8-ok", 0)
        assert (len(found["quality"]) > 0, "bit for bit" in found["message"]) == (True, True)
        for i in range(10):
            later = i % 2 == 0
            one.push(one.served.b if later else one.served.a, f"{i}")
            found = one.check(one.b if later else None)
            assert (found["verdict"], found["counts"]["different"]) == ("fp8-ok", 0), i
        wrong = one.check(one.b)
        assert wrong["verdict"] == "wrong-weights"
        assert ("which was brought later" in wrong["message"]) is (mode != "online")
        if mode == "online":
            _faults_of_online(one, kind)
        if mode == "per-tensor" and kind == "dense":
            one.plant("fill", name=f"{LAYER}.self_attn.o_proj.weight_scale", value=1.0)
            found = one.check()
            assert (found["verdict"], looks(found)) == (
                "unscaled",
                {f"{OUT}_scale": "unscaled"},
            )


def _faults_of_online(one: Patient, kind: str) -> None:
    if kind == "experts":
        one.plant("swap", names=[f"{EXPERTS}.w13_weight"], a=0, b=1)
        found = one.check()
        assert found["verdict"] == "wrong-weights"
        assert set(looks(found).values()) == {"swapped"}
    else:
        one.plant("flip", name=OUT, at=[3, 2])
        found = one.check()
        assert found["verdict"] == "wrong-weights"
        [line] = told(found).values()
        assert (line["name"], line["codes"]["different"], line["rows"]) == (OUT, 1, "3")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["block", "online"])
def test_two_ranks_with_faults_on_one(
    mode: str, cli: Cli, even_model: Path, tmp_path: Path
) -> None:
    with patient(cli, even_model, tmp_path, mode, "--tp", "2") as one:
        found = one.check()
        assert (found["verdict"], found["ranks"], len(found["seconds"])) == ("fp8-ok", 2, 2)
        body = plant.body("flip", 2, name=OUT, at=[3, 2], rank=1)
        assert post(one.served.url, "/update_weights_from_tensor", body).status_code == 200
        found = one.check()
        [line] = told(found).values()
        assert (found["verdict"], line["name"], line["rows"]) == ("wrong-weights", OUT, "3")
        assert line["codes"]["different"] == 1


@pytest.mark.long
def test_a_stock_engine_that_gives_fused_parts_one_scale(
    cli: Cli, small_model: Path, tmp_path: Path
) -> None:
    """Without `refit` it quantises per-tensor codes anew; the expectation does the same."""
    fp8 = tmp_path / "fp8"
    cli.run("quantize", "--model", str(small_model), "--out", str(fp8), "--backend", "sglang",
            "--mode", "per-tensor")  # fmt: skip
    plan = json.loads((fp8 / "fp8ctl.json").read_text())["plan"]
    target = ("--backend", "sglang", "--python", str(cli.python))
    stock = ("--patch", "refit", "--patch", "unscaled-guard")
    cli.run("revert", *target, *stock)
    try:
        entry = EntryModule(cli, fp8, plan, tmp_path / "run")
        with entry.served("--disable-overlap-schedule") as url:
            found = check(url)
            other = check(url, _scaled(small_model, tmp_path / "other"))
    finally:
        cli.run("patch", *target, *stock)
    assert found["verdict"] == "fp8-ok"
    assert found["message"].endswith("after the engine gave all that it fuses one scale")
    assert found["counts"]["equal"] >= 28
    assert other["verdict"] == "wrong-weights"


def _scaled(model: Path, folder: Path) -> Path:
    state = {n: t * 1.5 for n, t in load_file(str(model / "model.safetensors")).items()}
    return write_model(folder, model, state, {})
