"""The logprobs level on the real SGLang 0.4.8: servers as a stranger's, seen from outside alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8ctl.check import conclusion, hypotheses, likelihood, logprobs, recording
from fp8ctl.check.prompts import Prompts
from fp8ctl.formats import Mode
from fp8ctl.kernels.groups import block
from fp8ctl.kernels.quantize import quantize
from fp8ctl.planning import make_plan
from fp8ctl.render import Reporter
from tests.conftest import HOME
from tests.e2e.conftest import free_port, post, random_experts, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.check.conclusion import Conclusion
    from fp8ctl.check.hypotheses import Expected
    from fp8ctl.manifest import Plan
    from tests.e2e.conftest import Cli, Json

    State = dict[str, torch.Tensor]

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]

HERE = Path(__file__).parent


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let checks of this process find the managed engine, whose interpreter has transformers."""
    monkeypatch.setenv("FP8CTL_HOME", str(HOME))


def look(url: str, model: Path | None = None, **options: Any) -> Json:
    """Return what the level says, as a program gets it."""
    report = Reporter(json_mode=True, err=io.StringIO())
    found: Json = logprobs.verify(
        url, None if model is None else str(model), report, None, **options
    )
    json.dumps(found, allow_nan=False)
    return found


@contextlib.contextmanager
def launched(cli: Cli, model: Path, mode: str) -> Iterator[str]:
    """Serve a model by `launch`."""
    found = cli.run(
        "launch",
        *("--backend", "sglang", "--python", str(cli.python), "--model", str(model)),
        *("--mode", mode, "--port", str(free_port()), "--detach", "--no-check"),
    )
    try:
        yield found["url"]
    finally:
        cli.run("stop", found["name"])


@contextlib.contextmanager
def stock(cli: Cli, model: Path, folder: Path, *argv: str) -> Iterator[str]:
    """Serve a model in 16 bits by the engine's own entry, without any of our hooks."""
    port = free_port()
    command = [
        *(str(cli.python), "-m", "sglang.launch_server", "--model-path", str(model)),
        *("--port", str(port), "--device", "cpu", "--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch", "--disable-cuda-graph", "--disable-overlap-schedule"),
        *("--disable-custom-all-reduce", "--max-total-tokens", "4096", "--max-running-requests"),
        *("8", "--mem-fraction-static", "0.8", "--sleep-on-idle", *argv),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "SPT_NOENV": "1"}
    with (folder / "stock.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while not _answers(url):
            assert process.poll() is None, (folder / "stock.log").read_text()[-3000:]
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.5)
        yield url
    finally:
        _end(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health_generate", timeout=20, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    import psutil

    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(members, timeout=10)
    for one in left:
        one.kill()
    process.wait()


# --- the expectation itself -----------------------------------------------------------------------

FAMILIES = ("llama-tied", "qwen3-moe", "gemma2")
MORE = ("llama", "qwen2", "qwen3", "mixtral", "phi3", "deepseek-v3")


def ours(cli: Cli, folder: Path, script: str, *words: str) -> str:
    """Run a script that imports fp8ctl with the engine's interpreter, which has none."""
    (folder / "fp8ctl").symlink_to(HERE.parents[1] / "fp8ctl")
    return cli.engine(HERE / script, str(folder), *words)


@pytest.mark.parametrize("families", [FAMILIES, pytest.param(MORE, marks=pytest.mark.long)])
def test_layer_by_layer_is_what_the_whole_model_says(
    cli: Cli, tmp_path: Path, families: tuple[str, ...]
) -> None:
    found = json.loads(ours(cli, tmp_path, "expectation_families.py", *families))
    assert set(found) == set(families)
    for family, told in found.items():
        assert told["bf16"] < 1e-5, (family, told)
        assert told["fp8"] < 1e-5, (family, told)
        # The control: FP8 is another model, and engines scatter around it.
        assert told["apart"] > 0.1, (family, told)
        assert told["engine"] > 0.05, (family, told)


@pytest.mark.long
def test_a_model_of_which_a_matrix_is_no_linear_is_not_guessed_at(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"c_proj\.weight is no Linear of GPT2LMHeadModel"):
        ours(cli, tmp_path, "expectation_families.py", "gpt2")


@pytest.mark.long
def test_memory_is_bounded_by_a_matrix_and_not_by_the_model(cli: Cli, tmp_path: Path) -> None:
    told = json.loads(ours(cli, tmp_path, "expectation_memory.py"))
    assert told["checkpoint"] > 4e9
    assert told["peak"] < 0.4 * told["checkpoint"], told


# --- servers --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_an_fp8_server_is_named_recorded_and_told_from_another(
    cli: Cli, small_model: Path, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    with launched(cli, small_model, "block") as url:
        found = look(url, small_model, record=record)
        assert (found["result"], found["verdict"], found["fits"]) == ("ok", "fp8-ok", "fp8-block")
        assert found["by"] > 1.2
        assert found["sigmas"] > likelihood.APART
        assert found["tokens"] > 1000
        assert (
            found["hypotheses"]["broken"]["mean_abs"]
            > 10 * found["hypotheses"]["fp8-block"]["mean_abs"]
        )
        assert sum(found["histogram"]["counts"]["fp8-block"]) == found["tokens"]
        # It answers from its cache by now; prompts are told in full all the same.
        again = look(url, against=record)
        assert (again["result"], again["verdict"], again["fits"]) == ("ok", "fp8-ok", "recorded")
        assert again["hypotheses"]["recorded"]["mean_abs"] < 1e-4
        # Another model: half as far as nothing at all.
        changed = tmp_path / "changed"
        state = load_file(str(small_model / "model.safetensors"))
        noise = torch.Generator().manual_seed(7)
        for name, weight in state.items():
            if ".mlp." in name:
                step = torch.randn(weight.shape, generator=noise) * weight.float().std()
                state[name] = (weight.float() + step).to(weight.dtype)
        write_model(changed, small_model, state, {})
        cli.run("quantize", "--model", str(changed), "--out", str(tmp_path / "fp8"),
                "--backend", "sglang")  # fmt: skip
        update = post(url, "/update_weights_from_disk", {"model_path": str(tmp_path / "fp8")})
        assert update.status_code == 200, update.text
        other = look(url, against=record)
        assert (other["result"], other["verdict"]) == ("failed", "wrong-weights"), other["message"]


@pytest.mark.long
@pytest.mark.usefixtures("home")
def test_a_server_in_16_bits_is_named(cli: Cli, small_model: Path, tmp_path: Path) -> None:
    with stock(cli, small_model, tmp_path) as url:
        found = look(url, small_model)
        assert (found["result"], found["verdict"]) == ("failed", "bf16-fallback")
        assert found["fits"] == "bf16"
        assert found["by"] > 1.5
        nobody = look(url)
        assert (nobody["result"], nobody["verdict"]) == ("not visible", None)
        assert "nothing to compare with" in nobody["message"]
        # Without a model, and without a tokenizer here: the server's own.
        alone = look(url, record=tmp_path / "r.json")
        assert (alone["result"], alone["verdict"], alone["fits"]) == ("ok", None, None)
        assert recording.read(tmp_path / "r.json").scores.tokens == found["tokens"]


@pytest.mark.long
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("of", ["dense", "experts"])
@pytest.mark.parametrize(
    ("mode", "fits"),
    [("block", "fp8-block"), ("per-tensor", "fp8-per-tensor"), ("online", "fp8-per-channel")],
)
def test_healthy_servers_of_every_kind_are_fp8(
    cli: Cli, demo_model: Path, experts_model: Path, of: str, mode: str, fits: str
) -> None:
    model = demo_model if of == "dense" else experts_model
    with launched(cli, model, mode) as url:
        # Where the server tells a plan, by that; what the engine quantised has none.
        found = look(url, model if mode == "online" else None)
    assert (found["result"], found["verdict"]) == ("ok", "fp8-ok"), found["message"]
    assert found["model"] == str(model)
    assert fits in {found["fits"], *found["rivals"]}, found["message"]


@pytest.mark.long
@pytest.mark.usefixtures("home")
def test_dummy_weights_and_16_bits_of_the_whole_model(
    cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    with stock(cli, demo_model, tmp_path, "--load-format", "dummy") as url:
        found = look(url, demo_model)
        assert (found["verdict"], found["fits"]) == ("wrong-weights", "broken"), found["message"]
    with stock(cli, demo_model, tmp_path) as url:
        found = look(url, demo_model)
        assert (found["verdict"], found["fits"]) == ("bf16-fallback", "bf16"), found["message"]


# --- planted faults, as if the server were a stranger's -------------------------------------------


@pytest.fixture(scope="module")
def experts_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small random mixture of experts that is sure enough of itself to be wrong."""
    folder = tmp_path_factory.mktemp("experts") / "random-experts"
    return random_experts(demo_model, folder, spread=0.1)


@dataclass
class Victim:
    """A running FP8 server, what it should hold, and what it should say."""

    url: str
    plan: Plan
    right: State
    older: State
    folder: Path
    served: Path
    expected: Expected

    def plant(self, state: State) -> None:
        """Have the server load other weights, by the engine's own route."""
        folder = self.folder / "planted"
        folder.mkdir(exist_ok=True)
        for file in self.served.iterdir():
            if file.suffix in (".json", ".jinja"):
                (folder / file.name).write_bytes(file.read_bytes())
        whole = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(whole, str(folder / "model.safetensors"), metadata={"format": "pt"})
        answer = post(self.url, "/update_weights_from_disk", {"model_path": str(folder)})
        assert answer.status_code == 200, answer.text

    def look(self) -> tuple[likelihood.Judgement, Conclusion, Conclusion]:
        """Return the numbers, what they mean to a stranger, and to who knows the plan."""
        with Prompts(self.url, None) as prompts:
            scores = prompts.score(self.expected.ids)
        found = likelihood.judge(scores, self.expected.hypotheses)
        stranger = conclusion.conclude(found, None, scores.not_finite)
        return found, stranger, conclusion.conclude(found, self.plan, scores.not_finite)


def fp8(state: State, plan: Plan, size: tuple[int, int] | None = None) -> State:
    """Return the FP8 form of a 16-bit checkpoint in blocks."""
    assert plan.block
    groups = block(*(size or (plan.block.n, plan.block.k)))
    result = dict(state)
    for tensor in plan.quantized:
        codes, scales = quantize(state[tensor.name], groups)
        result |= {tensor.name: codes, f"{tensor.name}_scale_inv": scales}
    return result


@contextlib.contextmanager
def victim(cli: Cli, model: Path, folder: Path) -> Iterator[Victim]:
    report = Reporter(json_mode=True, err=io.StringIO())
    plan = make_plan(model, "sglang", Mode.BLOCK)
    source = load_file(str(model / "model.safetensors"))
    noise = torch.Generator().manual_seed(7)
    older = {
        name: (w.float() + torch.randn(w.shape, generator=noise) * w.float().std() * 0.3).to(
            w.dtype
        )
        if "mlp" in name and w.dim() == 2
        else w
        for name, w in source.items()
    }
    with launched(cli, model, "block") as url:
        served = httpx.get(f"{url}/get_model_info", trust_env=False, timeout=60)
        yield Victim(
            url,
            plan,
            fp8(source, plan),
            fp8(older, plan),
            folder,
            Path(served.json()["model_path"]),
            hypotheses.expect(model, "sglang", report, plan),
        )


def scale(name: str) -> str:
    return f"{name}_scale_inv"


def middle(plan: Plan, part: str) -> str:
    """Return the weight of a part in the layer in the middle."""
    names = [t.name for t in plan.quantized if part in t.name]
    return names[len(names) // 2]


def scale_dropped(v: Victim) -> State:
    one = scale(middle(v.plan, "down_proj"))
    return v.right | {one: torch.ones_like(v.right[one])}


def scales_dropped(v: Victim) -> State:
    ones = {scale(t.name): torch.ones_like(v.right[scale(t.name)]) for t in v.plan.quantized}
    return v.right | ones


def scale_at_the_minimum(v: Victim) -> State:
    one = scale(middle(v.plan, "down_proj"))
    return v.right | {one: torch.full_like(v.right[one], torch.finfo(torch.float32).min)}


def previous_version(v: Victim) -> State:
    return v.older


def code_flipped(v: Victim) -> State:
    one = middle(v.plan, "down_proj")
    flipped = v.right[one].clone()
    flipped.view(torch.uint8)[3, 2] ^= 0x40
    return v.right | {one: flipped}


def shard_transposed(v: Victim) -> State:
    one = middle(v.plan, "o_proj")
    bits = v.right[one].view(torch.uint8).T.contiguous()
    return v.right | {one: bits.view(torch.float8_e4m3fn), scale(one): v.right[scale(one)].T}


def half_an_update(v: Victim) -> State:
    names = [t.name for t in v.plan.quantized]
    half = names[: len(names) // 2]
    return v.right | {n: v.older[n] for one in half for n in (one, scale(one))}


def blocks_of_another_size(v: Victim) -> State:
    """Codes of blocks half as high, under every other one of their scales."""
    assert v.plan.block
    source = load_file(str(v.plan.model / "model.safetensors"))
    wrong = fp8(source, v.plan, (v.plan.block.n // 2, v.plan.block.k))
    return wrong | {scale(t.name): wrong[scale(t.name)][::2] for t in v.plan.quantized}


def dummy_weights(v: Victim) -> State:
    random = torch.Generator().manual_seed(1)
    tiny = {
        t.name: (torch.rand(t.shape, generator=random) * 2e-3 - 1e-3).to(torch.float8_e4m3fn)
        for t in v.plan.quantized
    }
    return v.right | tiny | {scale(n): torch.ones_like(v.right[scale(n)]) for n in tiny}


def another_model(v: Victim) -> State:
    """The same shapes, every matrix of the decoder random."""
    random = torch.Generator().manual_seed(2)
    source = load_file(str(v.plan.model / "model.safetensors"))
    for t in v.plan.quantized:
        noise = torch.randn(t.shape, generator=random) * source[t.name].float().std()
        source[t.name] = noise.to(source[t.name].dtype)
    return fp8(source, v.plan)


def experts_swapped(v: Victim) -> State:
    result = dict(v.right)
    for part in ("gate_proj", "up_proj", "down_proj"):
        one = next(t.name for t in v.plan.quantized if f"experts.1.{part}" in t.name)
        other = one.replace("experts.1.", "experts.2.")
        for n, m in ((one, other), (scale(one), scale(other))):
            result[n], result[m] = v.right[m], v.right[n]
    return result


def router_quantised(v: Victim) -> State:
    """FP8 values in the router, which SGLang keeps in 16 bits: what a trainer's cast leaves."""
    result = dict(v.right)
    for name in v.right:
        if name.endswith("mlp.gate.weight"):
            codes, scales = quantize(v.right[name], block(128, 128))
            result[name] = (codes.float() * scales.repeat_interleave(128, 1)).bfloat16()
    return result


BROKEN = ("failed", "wrong-weights", "broken")
HEALTHY = ("ok", "fp8-ok", "fp8-block")
#: What a stranger sees of each fault. One flipped code is not visible from outside, which is the
#: weights level's to see; a router in FP8 moves less than FP8 itself does.
FAULTS: list[tuple[Any, tuple[str, str | None, str | None]]] = [
    (scale_dropped, BROKEN),
    (scales_dropped, BROKEN),
    (scale_at_the_minimum, BROKEN),
    (previous_version, BROKEN),
    (code_flipped, HEALTHY),
    (shard_transposed, BROKEN),
    (half_an_update, BROKEN),
    (blocks_of_another_size, BROKEN),
    (dummy_weights, BROKEN),
    (another_model, BROKEN),
]
OF_EXPERTS: list[tuple[Any, tuple[str, str | None, str | None]]] = [
    (experts_swapped, BROKEN),
    (router_quantised, HEALTHY),
]


@pytest.mark.long
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("of", ["dense", "experts"])
def test_planted_faults_seen_from_outside(
    cli: Cli, demo_model: Path, experts_model: Path, tmp_path: Path, of: str
) -> None:
    model = demo_model if of == "dense" else experts_model
    faults = FAULTS if of == "dense" else FAULTS + OF_EXPERTS
    with victim(cli, model, tmp_path) as v:
        wrong, table = [], []
        for plant, wanted in [(lambda v: v.right, HEALTHY), *faults, (lambda v: v.right, HEALTHY)]:
            v.plant(plant(v))
            found, stranger, planned = v.look()
            best = found.best
            line = (
                f"| {plant.__name__} | {best.name} {best.summary.mean_abs:.3f} | {best.ratio:.2f} "
                f"| {best.summary.top1:.2f} | {stranger.verdict} | {planned.verdict} |"
            )
            table.append(line)
            if (stranger.result, stranger.verdict, stranger.fits) != wanted:
                wrong.append((line, stranger.message))
            if wanted is BROKEN and planned.verdict != "wrong-weights":
                wrong.append((line, planned.message))
        sheet = "\n".join(table)
        if folder := os.environ.get("LOGPROBS_TABLES"):
            (Path(folder) / f"{of}.md").write_text(sheet + "\n")
        assert not wrong, f"{wrong}\n{sheet}"


@pytest.mark.long
@pytest.mark.usefixtures("home")
def test_dropped_scales_are_named_where_the_model_is_no_chaos_without_them(
    cli: Cli, small_model: Path, tmp_path: Path
) -> None:
    # The deeper a model is, the less is reproducible without scales; two layers are.
    with victim(cli, small_model, tmp_path) as v:
        v.plant(scales_dropped(v))
        found = look(v.url, small_model)
    assert (found["result"], found["verdict"]) == ("failed", "unscaled"), found["message"]
    assert found["fits"] == "unscaled-fp8-block"
