"""Pushes to the real SGLang 0.4.8 on a CPU: what is served, what runs meanwhile, what goes wrong.

The session itself is tested on a table of ranks (tests/engines/hooks, by `pushing.Server`); here
the weights are real, and so are the requests that an update meets.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file

from fp8ctl import wire
from tests.conftest import HOME, ROOT
from tests.e2e.conftest import free_port, logprobs, post, random_experts, write_model
from tests.e2e.entry import EntryModule
from tests.e2e.pushing import Bucket, Pusher, RefusedError, bucket, quantized

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Cli, Json

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

TEXT = "The capital of France is Paris. Water boils at one hundred degrees Celsius."
TOKENS = 24


def step(state: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    """Return weights one large training step later."""
    noise = torch.Generator().manual_seed(seed)
    return {
        name: (
            w.float() + torch.randn(w.shape, generator=noise) * w.float().std() * 0.3
            if w.dim() > 1
            else w.float() * 1.125
        ).to(w.dtype)
        for name, w in state.items()
    }


@dataclass(frozen=True)
class Served:
    """A server, and two checkpoints of its model.

    Attributes:
        name: of the server.
        url: of the server.
        plan: that it was started with.
        a, b: buckets of each checkpoint; the server was started on `a`.
        fresh: log-probabilities of TEXT right after the start.
    """

    name: str
    url: str
    plan: Json
    a: list[Bucket]
    b: list[Bucket]
    fresh: list[float]

    @property
    def logprobs(self) -> list[float]:
        return logprobs(self.url, TEXT)[1]

    @property
    def state(self) -> Json:
        found: Json = httpx.get(self.url + "/fp8ctl/state", trust_env=False).json()
        return found


@contextmanager
def serving(cli: Cli, model: Path, mode: str = "block", *more: str) -> Iterator[Served]:
    launched = cli.run(
        "launch",
        *("--backend", "sglang", "--python", str(cli.python), "--model", str(model)),
        *("--mode", mode, "--port", str(free_port()), "--detach", "--no-check", *more),
    )
    url, name = launched["url"], launched["name"]
    try:
        state = load_file(str(model / "model.safetensors"))
        manifest = HOME / "state" / "servers" / name / "manifest.json"
        plan = {} if mode == "online" else json.loads(manifest.read_text())
        a, b = _buckets(state, plan), _buckets(step(state), plan)
        yield Served(name, url, plan, a, b, logprobs(url, TEXT)[1])
    finally:
        cli.run("stop", name)


def _buckets(state: dict[str, torch.Tensor], plan: Json) -> list[Bucket]:
    if plan:
        return quantized(dict(sorted(state.items(), reverse=True)), plan)
    names = sorted(state, reverse=True)
    half = len(names) // 2
    return [bucket([(n, state[n]) for n in some]) for some in (names[:half], names[half:])]


def far(a: list[float], b: list[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.1


@pytest.fixture(scope="module")
def served(cli: Cli, small_model: Path) -> Iterator[Served]:
    with serving(cli, small_model) as one:
        yield one


@pytest.fixture
def pusher(served: Served) -> Iterator[Pusher]:
    with Pusher(served.url) as one:
        one.update("A", served.a)
        yield one


# --- an update ------------------------------------------------------------------------------------


def test_what_is_served_is_what_was_pushed(served: Served, pusher: Pusher) -> None:
    """A by the loaders, B and A by copies: the second A is a fresh server's, bit for bit."""
    count = sum(len(one.entries) for one in served.a)
    assert served.logprobs == served.fresh
    answer = pusher.update("B", served.b)
    assert (answer["state"], answer["missing"], answer["verified"]) == ("ready", 0, count)
    assert pusher.ways == {"loaders": 0, "copies": count}
    assert far(served.logprobs, served.fresh)
    assert served.state["version"] == "B"
    pusher.update("A", served.a)
    assert pusher.ways == {"loaders": 0, "copies": count}
    assert served.logprobs == served.fresh


# --- requests that run ----------------------------------------------------------------------------


class Request(threading.Thread):
    """A generation that an update meets.

    Attributes:
        answers: as they stream in.
        ended: when the last came, on the monotonic clock.
    """

    def __init__(self, url: str, **more: Any) -> None:
        super().__init__()
        self.answers: list[Json] = []
        self.begun = threading.Event()
        self.ended = 0.0
        self._url = url + "/generate"
        self._body = {
            "text": TEXT,
            "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
            "stream": True,
            **more,
        }
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=300, trust_env=False) as got:
            if not self._body["stream"]:
                self.answers.append(json.loads(got.read()))
            for line in got.iter_lines() if self._body["stream"] else ():
                if line.startswith("data: {"):
                    self.answers.append(json.loads(line.removeprefix("data: ")))
                    if len(self.answers) > 2:
                        self.begun.set()
        self.ended = time.monotonic()

    def meta(self) -> Json:
        """Wait for the end; return what is said of it."""
        self.join(240)
        assert not self.is_alive(), "it was forgotten"
        found: Json = self.answers[-1]["meta_info"]
        return found

    @property
    def tokens(self) -> list[int]:
        return [t[1] for t in self.meta()["output_token_logprobs"]]


def greedy(url: str, ids: list[int], count: int) -> list[int]:
    body = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
        "return_logprob": True,
    }
    answer = post(url, "/generate", body).json()
    return [t[1] for t in answer["meta_info"]["output_token_logprobs"]]


def test_a_paused_request_goes_on_with_the_new_weights(served: Served, pusher: Pusher) -> None:
    """Its keys and values are computed anew; every token is one that A or B would give."""
    _see_it_go_on(served, pusher)


def _see_it_go_on(served: Served, pusher: Pusher) -> None:
    ids, _ = logprobs(served.url, TEXT)
    by_a = greedy(served.url, ids, TOKENS)
    request = Request(served.url)
    assert request.begun.wait(120)
    pusher.update("B", served.b, in_flight="pause")
    so_far = len(request.answers)
    assert so_far < TOKENS, "the control: it was still running"
    assert request.meta()["finish_reason"]["type"] == "length"
    assert len(request.tokens) == TOKENS
    # Where it leaves what A would have said, B says the rest.
    left = next(i for i, (x, y) in enumerate(zip(request.tokens, by_a, strict=True)) if x != y)
    rest = greedy(served.url, ids + request.tokens[:left], TOKENS - left)
    assert request.tokens[left:] == rest


def test_an_aborted_request_is_answered(served: Served, pusher: Pusher) -> None:
    running = Request(served.url)
    whole = Request(served.url, stream=False)
    assert running.begun.wait(120)
    pusher.update("B", served.b, in_flight="abort")
    for meta in (running.meta(), whole.meta()):
        assert meta["finish_reason"]["type"] == "abort"
        assert meta["completion_tokens"] < TOKENS
    assert running.meta()["completion_tokens"] > 2


def test_an_update_waits_for_a_request_to_finish(served: Served, pusher: Pusher) -> None:
    ids, _ = logprobs(served.url, TEXT)
    by_a = greedy(served.url, ids, TOKENS)
    request = Request(served.url)
    assert request.begun.wait(120)
    with pytest.raises(RefusedError) as refused:
        pusher.begin("B", in_flight="finish", within=0.01)
    assert (refused.value.status, refused.value.id) == (408, "FP8-DRAIN")
    push = pusher.begin("B", in_flight="finish")
    assert request.tokens == by_a
    assert post(served.url, "/generate", {"text": "hi"}).status_code == 503
    for number, one in enumerate(served.b):
        pusher.send(push, number, one)
    assert pusher.end(push, len(served.b))["state"] == "ready"


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_client_that_dies_half_way_is_noticed_and_another_makes_it_good(
    served: Served, pusher: Pusher
) -> None:
    with Pusher(served.url) as dying:
        push = dying.begin("B", lease=0.5)
        dying.send(push, 0, served.b[0])
    until = time.monotonic() + 30
    while served.state["state"] == "updating" and time.monotonic() < until:
        time.sleep(0.1)
    assert served.state["state"] == "failed"
    refused = post(served.url, "/generate", {"text": "hi"})
    assert (refused.status_code, refused.json()["error"]["id"]) == (503, "FP8-GATE")
    with Pusher(served.url) as other:
        other.update("A", served.a)
        assert other.ways["copies"] == 0, "what broke off is trusted no more"
    assert served.logprobs == served.fresh


def test_nothing_wrong_is_ever_served(served: Served, pusher: Pusher) -> None:
    """Old weights or a closed gate; a whole push makes all of it good."""
    first, *others = served.b
    scale = next(e for e in first.entries if e.name.endswith("_scale_inv"))
    kept = next(e for e in first.entries if e.dtype == "bfloat16")

    def refused(sent: list[Bucket]) -> tuple[str, str]:
        with pytest.raises(RefusedError) as raised:
            pusher.update("B", sent)
        return raised.value.id, raised.value.body["state"]

    # Seen before a weight was written.
    assert refused([first.say(kept.name, name="model.other.weight"), *others]) == (
        "FP8-TENSOR",
        "ready",
    )
    assert refused([first.say(kept.name, dtype="float8_e4m3fn"), *others])[1] == "ready"
    assert refused([first.say(scale.name, shape=(1, *scale.shape)), *others])[1] == "ready"
    assert served.logprobs == served.fresh

    # Seen afterwards: by counting, and by digests.
    without = bucket([(n, t) for n, t in first.named if n != scale.name])
    assert refused([without, *others]) == ("FP8-INCOMPLETE", "failed")
    flipped = [(n, t.clone()) for n, t in first.named]
    for name, tensor in flipped:
        if name == scale.name:
            tensor.view(torch.int32)[0, 0] ^= 1
    wrong = Bucket(tuple(flipped), first.entries, first.nbytes)
    assert refused([wrong, *others]) == ("FP8-UNEQUAL", "failed")
    assert post(served.url, "/generate", {"text": "hi"}).status_code == 503

    # A bucket again is no other bucket, and one too early is none.
    push = pusher.begin("A")
    taken = pusher.send(push, 0, served.a[0])
    assert pusher.tell(push, 0, served.a[0]) == {**taken, "repeated": True}
    for number, one in ((0, served.a[1]), (2, served.a[1])):
        with pytest.raises(RefusedError) as early:
            pusher.send(push, number, one)
        assert early.value.id == "FP8-ORDER"
    for number, one in enumerate(served.a[1:], 1):
        pusher.send(push, number, one)
    assert pusher.end(push, len(served.a))["state"] == "ready"
    assert served.logprobs == served.fresh


def test_the_engines_own_routes_wait_while_a_push_is_open(served: Served, pusher: Pusher) -> None:
    push = pusher.begin("B")
    update = post(served.url, "/update_weights_from_disk", {"model_path": "/nowhere"})
    assert (update.status_code, update.json()["error"]["id"]) == (409, "FP8-BUSY")
    answer = pusher.call(wire.ABORT, push=push, reason="a test")
    assert (answer["outcome"], answer["state"]) == ("rejected", "ready")


# --- every way, many times ------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mode", ["block", "per-tensor", "online"])
def test_ten_updates_by_memory_by_a_group_and_from_disk(
    mode: str, cli: Cli, small_model: Path, tmp_path: Path
) -> None:
    with serving(cli, small_model, mode) as one:
        seen: dict[str, list[float]] = {"A": one.fresh}
        for kind in ("memory", "group"):
            with Pusher(one.url, kind) as pusher:
                for i in range(10):
                    version = "BA"[i % 2]
                    pusher.update(f"{version}{i}", one.b if version == "B" else one.a)
                    assert seen.setdefault(version, one.logprobs) == one.logprobs, (kind, i)
        assert far(seen["A"], seen["B"])
        with Pusher(one.url, "disk") as disk:
            for i in range(10):
                version = "BA"[i % 2]
                made = one.b if version == "B" else one.a
                disk.update_from(tmp_path / str(i), version, made)
                assert seen[version] == one.logprobs, ("disk", i)


@pytest.fixture(scope="module")
def experts_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_experts(demo_model, tmp_path_factory.mktemp("experts") / "random-experts")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["block", "per-tensor", "online"])
def test_ten_updates_of_experts(mode: str, cli: Cli, experts_model: Path, tmp_path: Path) -> None:
    """By every way; A and B are what servers say that were started on them."""
    state = step(load_file(str(experts_model / "model.safetensors")))
    with serving(cli, write_model(tmp_path / "B", experts_model, state, {}), mode) as other:
        seen = {"B": other.fresh}
    with serving(cli, experts_model, mode) as one:
        seen["A"] = one.fresh
        assert far(seen["A"], seen["B"])
        for kind in ("memory", "group"):
            with Pusher(one.url, kind) as pusher:
                for i in range(10):
                    version = "BA"[i % 2]
                    pusher.update(f"{version}{i}", one.b if version == "B" else one.a)
                    assert seen[version] == one.logprobs, (kind, i)
                if mode != "online":  # there the loaders quantise
                    sent = [e for bucket in one.a for e in bucket.entries]
                    copied = [e for e in sent if not e.name.endswith("weight_scale")]
                    assert pusher.ways["copies"] == len(copied)
        with Pusher(one.url, "disk") as disk:
            for i in range(10):
                version = "BA"[i % 2]
                made = one.b if version == "B" else one.a
                disk.update_from(tmp_path / str(i), version, made)
                assert seen[version] == one.logprobs, ("disk", i)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_updates_of_several_ranks_from_disk_by_memory_and_by_a_group(
    ranks: int, cli: Cli, even_model: Path, tmp_path: Path
) -> None:
    """Of four, two and two hold the same heads of keys and values."""
    with serving(cli, even_model, "block", "--tp", str(ranks)) as one:
        seen: dict[str, list[float]] = {"A": one.fresh}
        for kind in ("memory", "group"):
            with Pusher(one.url, kind, ranks) as pusher:
                for i in range(4):
                    version = "BA"[i % 2]
                    pusher.update(f"{version}{i}", one.b if version == "B" else one.a)
                    assert seen.setdefault(version, one.logprobs) == one.logprobs, (kind, i)
                request = Request(one.url)
                assert request.begun.wait(120)
                pusher.update("B", one.b, in_flight="pause")
                assert len(request.tokens) == TOKENS
                pusher.update("A", one.a)
        assert far(seen["A"], seen["B"])
        with Pusher(one.url, "disk") as disk:
            for version in "BA":
                disk.update_from(tmp_path / version, version, one.b if version == "B" else one.a)
                assert seen[version] == one.logprobs, version


@pytest.mark.long
@pytest.mark.parametrize("mode", ["block", "per-tensor", "online"])
def test_a_fresh_server_on_the_other_checkpoint_says_the_same(
    mode: str, cli: Cli, small_model: Path, tmp_path: Path
) -> None:
    state = step(load_file(str(small_model / "model.safetensors")))
    other = write_model(tmp_path / "other", small_model, state, {})
    with serving(cli, small_model, mode) as one, Pusher(one.url) as pusher:
        pusher.update("B", one.b)
        pushed = one.logprobs
        assert far(pushed, one.fresh)
    with serving(cli, other, mode) as fresh:
        assert pushed == fresh.fresh


@pytest.mark.long
@pytest.mark.parametrize("mode", ["block", "online"])
def test_without_a_tensor_no_complete_update_is_served(
    mode: str, cli: Cli, small_model: Path
) -> None:
    """The head is tied to the embedding, and nobody sends it."""
    with serving(cli, small_model, mode) as one, Pusher(one.url) as pusher:
        named = [pair for sent in one.b for pair in sent.named]
        assert not any("lm_head" in name for name, _ in named)
        without = [pair for pair in named if pair[0] != "model.norm.weight"]
        half = len(without) // 2
        with pytest.raises(RefusedError) as refused:
            pusher.update("B", [bucket(without[:half]), bucket(without[half:])])
        assert refused.value.id == "FP8-INCOMPLETE"
        assert refused.value.body["error"]["data"]["names"] == ["model.norm.weight"]
        assert one.state["state"] == "failed"
        pusher.update("A", one.a)
        assert one.logprobs == one.fresh


# --- ends of processes ----------------------------------------------------------------------------

# A trainer that stops for ever when the servers have been given so many buckets; 0: none yet.
_TRAINER = """
import json, sys, time
from pathlib import Path
from fp8ctl.manifest import Plan
from fp8ctl.push import Rollout, session
from fp8ctl.source import read_tensors
session.LEASE = 1.0
url, plan, model, stop = sys.argv[1:]

def told(progress):
    if 0 < int(stop) <= progress.buckets:
        hang()

def hang():
    print("stopped", flush=True)
    time.sleep(600)

def tensors():
    for i, pair in enumerate(read_tensors(Path(model))):
        if stop == "0" and i == 1:
            hang()
        yield pair

rollout = Rollout(url, Plan.read(Path(plan)), bucket_bytes=8 << 20)
rollout.update(tensors(), "B", on_progress=told)
"""


@pytest.mark.long
def test_a_trainer_that_is_killed_at_any_bucket_leaves_the_old_weights_or_none(
    cli: Cli, small_model: Path, served: Served, pusher: Pusher, tmp_path: Path
) -> None:
    state = step(load_file(str(small_model / "model.safetensors")))
    other = write_model(tmp_path / "other", small_model, state, {})
    plan = HOME / "state" / "servers" / served.name / "manifest.json"
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    found: dict[int, str] = {}
    for stop in range(9):
        with subprocess.Popen(
            [sys.executable, str(script), served.url, str(plan), str(other), str(stop)],
            stdout=subprocess.PIPE,
            env=cli.environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
        ) as trainer:
            assert trainer.stdout is not None
            try:
                said = trainer.stdout.readline().strip()
            finally:
                trainer.kill()
        if not said:
            break  # there are no more buckets: it went through
        until = time.monotonic() + 60
        while served.state["state"] == "updating" and time.monotonic() < until:
            time.sleep(0.1)
        found[stop] = served.state["state"]
        if found[stop] == "ready":
            assert served.logprobs == served.fresh, stop
        else:
            assert found[stop] == "failed", stop
            assert post(served.url, "/generate", {"text": "hi"}).status_code == 503
        with Pusher(served.url) as again:
            again.update("A", served.a)
        assert served.logprobs == served.fresh, stop
    assert len(found) >= 3, found
    assert found.pop(0) == "ready"
    assert "failed" in found.values(), "weights were written"


@pytest.mark.long
@pytest.mark.parametrize("who", ["server", "scheduler"])
def test_a_server_that_is_killed_within_an_update_is_named_and_its_successor_is_connected(
    who: str, cli: Cli, small_model: Path, tmp_path: Path
) -> None:
    from fp8ctl.errors import Fp8ctlError
    from fp8ctl.manifest import Plan
    from fp8ctl.push import Rollout

    weights = load_file(str(small_model / "model.safetensors"))
    port = str(free_port())
    launch = (
        *("launch", "--backend", "sglang", "--python", str(cli.python)),
        *("--model", str(small_model), "--port", port, "--detach", "--no-check"),
    )
    first = cli.run(*launch)
    url, plan_path = first["url"], tmp_path / "plan.json"
    manifest = HOME / "state" / "servers" / first["name"] / "manifest.json"
    plan_path.write_bytes(manifest.read_bytes())
    server = psutil.Process(httpx.get(url + "/fp8ctl/state", trust_env=False).json()["pid"])
    family = [server, *server.children(recursive=True)]
    named = [p for p in family if "scheduler" in p.name() or "scheduler" in " ".join(p.cmdline())]

    def kill(progress: Any) -> None:
        if progress.buckets == 1:
            for process in family if who == "server" else named:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    try:
        assert named, [p.cmdline() for p in family]
        with Rollout(url, Plan.read(plan_path), bucket_bytes=8 << 20, timeout=60) as rollout:
            before = time.monotonic()
            with pytest.raises(Fp8ctlError, match=url):
                rollout.update(weights.items(), "B", on_progress=kill)
            assert time.monotonic() - before < 90
            cli.raw("stop", first["name"])
            second = cli.run(*launch)
            try:
                done = rollout.update(weights.items(), "B")
                assert done.verified == done.sent
            finally:
                cli.run("stop", second["name"])
    finally:
        cli.raw("stop", first["name"])


# --- the overlap schedule -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def overlapping(
    cli: Cli, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Return a server with the schedule of a GPU, and prefills in chunks of 64.

    `launch` switches that schedule off on a CPU, so the engine is started by its entry module.
    """
    run = tmp_path_factory.mktemp("run")
    fp8 = run / "fp8"
    cli.run("quantize", "--model", str(small_model), "--out", str(fp8), "--backend", "sglang")
    plan = json.loads((fp8 / "fp8ctl.json").read_text())["plan"]
    entry = EntryModule(cli, fp8, plan, run / "run")
    more = ("--mem-fraction-static", "0.8", "--chunked-prefill-size", "64")
    with entry.served(*more, OMP_WAIT_POLICY="PASSIVE") as url:
        state = load_file(str(small_model / "model.safetensors"))
        a, b = _buckets(state, plan), _buckets(step(state), plan)
        yield Served("", url, plan, a, b, logprobs(url, TEXT)[1])


@pytest.mark.long
def test_what_the_overlap_schedule_has_under_way_is_taken_in_first(overlapping: Served) -> None:
    with Pusher(overlapping.url) as pusher:
        pusher.update("A", overlapping.a)
        _see_it_go_on(overlapping, pusher)


@pytest.mark.long
@pytest.mark.parametrize("in_flight", ["pause", "abort"])
def test_a_prompt_that_is_prefilled_in_part_begins_anew(
    in_flight: str, overlapping: Served
) -> None:
    """All its log-probabilities are those of the new weights."""
    prompt = [i * 37 % 2000 + 5 for i in range(500)]
    sampling = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
    with Pusher(overlapping.url) as pusher:
        pusher.update("A", overlapping.a)
        request = Request(overlapping.url, text=None, input_ids=prompt, sampling_params=sampling)
        time.sleep(1)
        pusher.update("B", overlapping.b, in_flight=in_flight)
        meta = request.meta()
        if in_flight == "abort":
            assert (meta["finish_reason"]["type"], meta["completion_tokens"]) == ("abort", 0)
            return
        fresh = Request(overlapping.url, text=None, input_ids=prompt, sampling_params=sampling)
        assert meta["input_token_logprobs"] == fresh.meta()["input_token_logprobs"]
