"""What both builders turn down before anything starts, and with which words."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fp8ctl.engines import base, refusals
from fp8ctl.engines.base import CPU, LaunchRequest, ModelFacts
from fp8ctl.errors import ConflictError, UnsupportedError, UsageError


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


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str) -> None:
    refusals.refuse_open_door(host, {}, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "localhost.example.org", "127.0.0"])
def test_any_other_address_needs_one(host: str) -> None:
    with pytest.raises(ConflictError, match="FP8CTL_API_KEY") as caught:
        refusals.refuse_open_door(host, {}, ())
    assert caught.value.exit_code == 5
    refusals.refuse_open_door(host, {"FP8CTL_API_KEY": "k"}, ())
    refusals.refuse_open_door(host, {}, ("--api-key", "k"))


def test_an_option_of_fp8ctl_is_hinted_with_the_value_that_was_given() -> None:
    with pytest.raises(UsageError) as caught:
        refusals.refuse_own_options(("--model_path=/my models/m",), {"--model-path": "--model"})
    assert caught.value.hint == "--model '/my models/m' in front of `--`"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--hos", "--host"),
        ("--hos=0.0.0.0", "--host"),
        ("--po", "--port"),
        ("--load_f", "--load-format"),
        ("--api", "--api-key"),
        ("--tens", "--tensor-parallel-size"),
    ],
)
def test_a_flag_that_must_be_understood_is_written_in_full(word: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"may be short for {meant}") as caught:
        refusals.refuse_abbreviations((word, "s3cret"), ("--tensor-parallel-size",))
    assert meant in str(caught.value.hint)
    assert "s3cret" not in f"{caught.value.message}{caught.value.hint}"
    # In full it is what the builder reads; a longer or another name is none of these.
    full = (meant, "x", "--hostess", "--seed", "1", "hos", "-h", "--")
    refusals.refuse_abbreviations(full, ("--tensor-parallel-size",))


@pytest.mark.parametrize("words", [("--dp", "2"), ("--dp=2",), ("-pp", "2"), ("-pp=2",)])
def test_a_spread_over_workers_that_nobody_asks_is_refused(words: tuple[str, ...]) -> None:
    flags = {"--dp": "data parallelism", "-pp": "pipeline parallelism"}
    with pytest.raises(UnsupportedError, match=f"{words[0][:4].rstrip('=')}: .* parallelism"):
        refusals.refuse_unproven(words, flags)
    refusals.refuse_unproven(("--dpx", "2", "dp", "-p"), flags)


def test_random_weights_are_served_to_nobody_unless_others_will_come() -> None:
    for extra in (("--load-format", "dummy"), ("--load_format=dummy",)):
        with pytest.raises(ConflictError, match="random weights") as caught:
            refusals.refuse_dummy_weights(request(extra=extra))
        assert "--await-push" in str(caught.value.hint)
        refusals.refuse_dummy_weights(request(extra=extra, await_push=True))
    refusals.refuse_dummy_weights(request(extra=("--load-format", "auto")))


def test_the_patch_command_of_a_folder_with_a_space_can_be_typed() -> None:
    python = Path("/my envs/a/bin/python")
    with pytest.raises(ConflictError, match="patch refit of sglang is not applied") as caught:
        refusals.refuse_missing_patch(request(python=python), "sglang", "refit", "it is needed")
    words = shlex.split(str(caught.value.hint))
    assert words[words.index("--python") + 1] == str(python)
    refusals.refuse_missing_patch(request(applied=frozenset({"refit"})), "sglang", "refit", "")


def test_no_hint_of_a_refusal_leaves_a_gap() -> None:
    # `...` is nothing that can be typed.
    source = Path(refusals.__file__).read_text() + Path(base.__file__).read_text()
    assert '..."' not in source
    assert " ... " not in source
