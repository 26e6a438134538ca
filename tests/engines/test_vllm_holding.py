"""An engine core of vLLM 0.9.1 at rest: its own scheduler, cache manager, core and batch, on a CPU.

vllm_scheduling.py says what is vLLM's and what stands in for the model: what is generated tells
which keys and values were read, and by which weights they were made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Run = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.wheels

SCENARIOS = "tests.engines.vllm_scheduling"
HELD = {"held": True, "begun": 3}
LENGTH = dict.fromkeys("abc", "length")


@pytest.fixture(scope="module")
def run(engine_sources: Callable[[str], Path]) -> Iterator[Run]:
    """Return a function that runs one scenario in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FP8CTL_", "VLLM_"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the sources are shared, and read-only
    with subprocess.Popen(
        [sys.executable, "-m", SCENARIOS, str(engine_sources("vllm").resolve())],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as scenarios:
        assert scenarios.stdin is not None
        assert scenarios.stdout is not None
        requests, answers = scenarios.stdin, scenarios.stdout

        def one(scenario: str, **options: object) -> dict[str, Any]:
            requests.write(json.dumps({"scenario": scenario, **options}) + "\n")
            requests.flush()
            answer: dict[str, Any] = json.loads(answers.readline())
            assert "traceback" not in answer, answer["traceback"]
            return answer

        yield one
        requests.close()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [4, 7, 16])
@pytest.mark.parametrize("steps", range(1, 12))
def test_what_is_paused_goes_on_as_if_nothing_had_been_with_keys_and_values_of_the_new_weights(
    steps: int, budget: int, caching: bool, run: Run
) -> None:
    found = run("pause", steps=steps, budget=budget, caching=caching, here=bool(steps % 2))
    assert found["held"]["held"] is True
    assert found["before"] == found["taken"]
    assert found["batch"] == [], "the workers would put new blocks behind the old ones"
    assert found["queue"][: len(found["running"])] == found["running"], "in their order"
    assert found["queue"][-1] == "late"
    assert found["waited"] == 20, "the core looks for work without end"
    assert found["stood"] is True
    assert found["flushed"] == {}
    assert found["again"]["held"] is True
    assert found["versions_read_after"] == [2]
    assert found["tokens"].pop("late")
    assert found["tokens"] == found["wanted"]
    assert found["ended"] == {**LENGTH, "late": "length"}
    assert found["left"] == [0, False]
    assert found["usage"] == pytest.approx(1 / 64), "blocks are left in use"


def test_a_pause_without_a_step_in_between_would_read_the_wrong_blocks(run: Run) -> None:
    """The rule that stands in for the model sees it: were it blind, the test above were none."""
    found = run("without-a-step", steps=2)
    assert found["batch"] == ["a", "b", "c"]
    assert {k: found["tokens"][k] for k in "abc"} != found["wanted"]


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_aborted_leaves_the_core_and_the_next_read_nothing_of_it(
    steps: int, batches: int, run: Run
) -> None:
    found = run("abort", steps=steps, queue_size=batches)
    assert found["held"] == HELD
    assert found["empty"] is True
    assert found["flushed"] == {}
    assert found["waited"] == 5
    assert found["late"] == found["wanted"]
    assert found["read"] == [2]
    assert not {"a", "b", "c"} & set(found["batch"])


def test_what_is_paused_can_be_ended(run: Run) -> None:
    found = run("abort-paused", steps=3)
    assert (found["held"], found["left"]) == (HELD, 0)
    assert found["usage"] == pytest.approx(1 / 64)


def test_a_core_rests_by_itself_only_when_all_that_began_has_ended(run: Run) -> None:
    found = run("finish")
    assert found["early"] == {"held": False, "begun": 3}
    assert found["done"] == {"held": True, "begun": 0}
    assert (found["waited"], found["late_while_held"]) == (5, None)
    assert found["ended"] == {**LENGTH, "late": "length"}


@pytest.mark.parametrize(
    ("what", "how", "why"),
    [
        ("connector", "pause", "keys and values are shared with other servers"),
        ("data", "abort", "data parallelism"),
        ("pipeline", "pause", "pipeline parallelism: requests cannot be paused"),
    ],
)
def test_a_core_that_cannot_rest_says_why_and_goes_on(
    what: str, how: str, why: str, run: Run
) -> None:
    found = run("refused", what=what, how=how)
    assert why in found["answer"]
    assert found["ended"] == LENGTH
    assert found["tokens"] == found["wanted"]


def test_log_probabilities_of_a_prompt_are_not_told_twice(run: Run) -> None:
    found = run("told")
    assert found["running"]["soon"] == 0
    assert found["workers"] == {"told": None, "plain": None, "soon": 1}
    assert found["schedulers"] == {"told": 1, "plain": None, "soon": 1}


def test_every_client_of_a_request_that_is_aborted_has_an_answer(run: Run) -> None:
    """By vLLM's own output processor; a client that waits for ever fails the scenario."""
    found = run("tell")
    assert found["first"] == [[5, 6]]
    assert found["told"] == {
        "stream": [[0, [], "abort", 0]],
        "stream-of-log-probabilities": [[0, [], "abort", 0]],
        "whole": [[0, [5, 6], "abort", 0]],
        "not-begun": [[0, [], "abort", 0]],
        "many": [[0, [5, 6], "abort", 0], [1, [], "abort", 0]],
        "many-streams": [[0, [5, 6], "abort", 0], [1, [], "abort", 0]],
    }
    assert found["left"] == ["late"]
    assert found["parents"] == []
    assert found["again"] == []


def test_keys_and_values_in_use_are_not_said_to_be_forgotten(run: Run) -> None:
    assert "cannot be forgotten" in run("in-use")["answer"]


@pytest.mark.parametrize("how", ["pause", "abort", "finish"])
def test_a_core_forgets_as_it_comes_to_rest_and_has_nothing_to_forget_later(
    how: str, run: Run
) -> None:
    """At an update's end all wait for it, and to go through all blocks takes milliseconds."""
    found = run("forgotten", steps=6, how=how, used=False)
    assert found["cached"] > 0
    assert [one > 0 for one in found["held"]] == [True]
    assert found["flushed"] == {}
    assert found["again"] == []
    assert found["hashes"] == 0
    assert (found["resumed"], found["rests"]) == ([True, False], False), "once"


def test_keys_and_values_that_are_in_use_are_no_clean_end(run: Run) -> None:
    found = run("forgotten", steps=6, how="abort", used=True)
    assert "in use and cannot be forgotten" in str(found["flushed"])
    assert len(found["again"]) == 1
    assert (found["resumed"], found["rests"]) == ([False, False], True)
