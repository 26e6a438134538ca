"""What both builders share: merging, masking, the environment, and the printed line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8ctl.engines import base
from fp8ctl.engines.base import CPU, Device, LaunchRequest, ModelFacts, Option
from fp8ctl.errors import UsageError


def test_the_users_words_come_verbatim_and_ours_only_where_they_said_nothing() -> None:
    ours = (Option("--a", ("1",)), Option("--b"), Option("--c", ("3",), ("--sea",)))
    extra = ("--b", "--sea=9", "value with -- in it", "--new", "x")
    assert base.merge(ours, extra) == ("--a", "1", *extra)
    assert base.merge(ours, ()) == ("--a", "1", "--b", "--c", "3")


def test_an_underscore_or_an_equals_sign_does_not_hide_an_option() -> None:
    assert base.merge((Option("--a-b", ("1",)),), ("--a_b=2",)) == ("--a_b=2",)
    assert base.option_value(("--a-b", "1", "--a_b=2"), "--a-b") == "2"
    assert base.option_value(("--a-b",), "--a-b") is None
    # A longer name is another option.
    assert base.merge((Option("--quant", ("1",)),), ("--quant-path", "p"))[:2] == ("--quant", "1")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("--api-key", "k", "--x"), ("--api-key", "***", "--x")),
        (("--api-key=k",), ("--api-key=***",)),
        (("--api_key", "k"), ("--api_key", "***")),
        (("--hf-token", "t"), ("--hf-token", "***")),
        (("--x", "k"), ("--x", "k")),
    ],
)
def test_keys_and_tokens_are_masked(words: tuple[str, ...], shown: tuple[str, ...]) -> None:
    assert base.masked(words) == shown


@pytest.mark.parametrize("text", ["m:f", "a.b.c:D.e", "_x:_y"])
def test_a_trace_point_is_a_module_and_a_function(text: str) -> None:
    assert base.parse_trace(text) == text


@pytest.mark.parametrize("text", ["", "m", "m:", ":f", "m:f:g", "m.:f", "a b:f", "m:f()", "1m:f"])
def test_what_is_no_trace_point_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="MODULE:FUNCTION"):
        base.parse_trace(text)


def request(**more: object) -> LaunchRequest:
    fields: dict[str, object] = {
        "python": Path("/env/bin/python"),
        "model": ModelFacts(Path("/models/m"), "m"),
        "source": "checkpoint",
        "device": CPU,
        "host": "127.0.0.1",
        "port": 30000,
        "run_dir": Path("/run/sglang-30000"),
        "hook_path": Path("/hook"),
    }
    return LaunchRequest(**{**fields, **more})  # type: ignore[arg-type]


def test_the_hook_path_goes_in_front_of_the_users_own() -> None:
    assert base.common_env(request())["PYTHONPATH"] == "/hook"
    env = base.common_env(request(environ={"PYTHONPATH": "/mine:/too"}))
    assert env["PYTHONPATH"] == "/hook:/mine:/too"
    # The current folder must not be able to shadow an engine, nor titles the marker of `stop`.
    assert (env["PYTHONSAFEPATH"], env["SPT_NOENV"]) == ("1", "1")
    assert env["FP8CTL_RUN_DIR"] == "/run/sglang-30000"


def test_the_users_word_on_being_offline_stands() -> None:
    assert base.common_env(request())["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in base.common_env(request(environ={"HF_HUB_OFFLINE": "0"}))


def test_trace_and_await_push_travel_by_environment() -> None:
    env = base.common_env(request(trace=base.parse_trace("m:f"), await_push=True))
    assert (env["FP8CTL_TRACE"], env["FP8CTL_AWAIT_PUSH"]) == ("m:f", "1")
    assert not {"FP8CTL_TRACE", "FP8CTL_AWAIT_PUSH"} & set(base.common_env(request()))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
        ("::1", "http://[::1]:1"),
        ("box", "http://box:1"),
    ],
)
def test_the_address_is_one_that_a_client_can_use(host: str, url: str) -> None:
    plan = base.LaunchPlan("sglang", ("p", "-m", "e"), (), (), host, 1, Path("/r"), "m")
    assert plan.url == url


def test_no_secret_is_part_of_a_plan() -> None:
    plan = base.LaunchPlan(
        "vllm",
        ("p", "-m", "e", "--api-key", "typed"),
        (),
        (("VLLM_API_KEY", "FP8CTL_API_KEY"),),
        "127.0.0.1",
        1,
        Path("/r"),
        "m",
    )
    assert 'VLLM_API_KEY="$FP8CTL_API_KEY"' in plan.command_line()
    assert "typed" not in str(plan.to_json())


def test_a_device_is_named_with_its_capability() -> None:
    assert Device("cuda", (9, 0), 1, "H100").describe() == "H100 (compute capability 9.0)"
    assert CPU.describe() == "CPU"


def test_a_server_that_a_trainer_under_torchrun_starts_has_no_part_in_its_store() -> None:
    variable = "TORCHELASTIC_USE_AGENT_STORE"
    assert base.common_env(request(environ={variable: "True"}))[variable] == ""
    assert variable not in base.common_env(request())
