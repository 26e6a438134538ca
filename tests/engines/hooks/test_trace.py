"""A trace tells how a function is reached, once, and changes nothing else."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fp8ctl.engines.hooks import imports, trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOURCE = """\
def load(name, scale=1):
    '''Load.'''
    if name == "bad":
        raise ValueError(name)
    return name * scale


class Model:
    def forward(self, x, *, positions):
        return (x, positions)

    class Inner:
        def run(self):
            return "inner"


    @classmethod
    def make(cls, x):
        return cls.__name__, x

    @staticmethod
    def add(x):
        return x + 1


class Small(Model):
    pass


async def later(x):
    return x


LIMIT = 3
"""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("fp8_traced")
    exec(compile(SOURCE, "<fp8_traced>", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "fp8_traced", module)
    monkeypatch.setattr(imports, "_pending", {})
    return module


def test_the_first_call_is_told_with_its_arguments_and_the_way_to_it(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.install("fp8_traced:load")

    def caller_in_the_stack() -> Any:
        return engine.load("ab", scale=3)

    assert caller_in_the_stack() == "ababab"
    told = capsys.readouterr()
    assert told.out == ""
    head, _, stack = told.err.partition("\n")
    assert head == f"fp8ctl trace: fp8_traced:load(str, scale=3) in process {os.getpid()}"
    places = [line for line in stack.splitlines() if line.startswith("  File ")]
    assert places[-1].endswith(", in caller_in_the_stack"), "who called it comes last"
    assert __file__ in places[-1]


def test_later_calls_are_not_told(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trace.install("fp8_traced:load")
    engine.load("a")
    capsys.readouterr()
    assert engine.load("b") == "b"
    assert capsys.readouterr().err == ""


def test_threads_that_call_at_once_are_told_of_once(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.install("fp8_traced:load")
    at_once = threading.Barrier(4)

    def call() -> None:
        at_once.wait()
        engine.load("a")

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err.count("fp8ctl trace:") == 1


def test_what_the_function_raises_is_raised(engine: Any) -> None:
    trace.install("fp8_traced:load")
    with pytest.raises(ValueError, match="bad"):
        engine.load("bad")
    assert engine.load("good") == "good"


def test_a_method_and_one_of_a_nested_class_can_be_traced(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.install("fp8_traced:Model.forward")
    trace.install("fp8_traced:Model.Inner.run")
    assert engine.Model().forward([1, 2], positions=None) == ([1, 2], None)
    assert engine.Model.Inner().run() == "inner"
    err = capsys.readouterr().err
    assert "fp8_traced:Model.forward(Model, list[2], positions=None) in" in err
    assert "fp8_traced:Model.Inner.run(Inner) in" in err


def test_class_methods_and_static_ones_stay_what_they_are(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.install("fp8_traced:Model.make")
    trace.install("fp8_traced:Model.add")
    assert engine.Small.make(1) == ("Small", 1)
    assert engine.Model().make(2) == ("Model", 2)
    assert (engine.Model.add(1), engine.Small().add(2)) == (2, 3)
    err = capsys.readouterr().err
    assert "fp8_traced:Model.make(type, 1) in" in err
    assert "fp8_traced:Model.add(1) in" in err


@pytest.mark.parametrize(("path", "kind"), [("Model", "type"), ("LIMIT", "int")])
def test_what_is_no_function_is_told_and_left_alone(
    engine: Any, path: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(vars(engine))
    trace.install(f"fp8_traced:{path}")
    said = f"fp8ctl trace: fp8_traced:{path} is a {kind}, no function: nothing is traced\n"
    assert capsys.readouterr().err == said
    assert vars(engine) == before
    assert isinstance(engine.Small(), engine.Model)


class Odd:
    shape, dtype = 3, "x"


class Lazy:
    @property
    def shape(self) -> object:
        raise RuntimeError("not loaded yet")


class Full:
    def write(self, _text: str) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("value", [Odd(), Lazy()])
def test_an_odd_argument_does_not_end_the_call(engine: Any, value: object) -> None:
    trace.install("fp8_traced:Model.make")
    assert engine.Model.make(value)[1] is value


def test_a_log_that_is_full_does_not_end_the_call(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace.install("fp8_traced:load")
    monkeypatch.setattr(sys, "stderr", Full())
    assert engine.load("a") == "a"


def test_a_coroutine_function_still_gives_a_coroutine(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.install("fp8_traced:later")
    coroutine = engine.later(7)
    with pytest.raises(StopIteration) as done:
        coroutine.send(None)
    assert done.value.value == 7
    assert "fp8_traced:later(7)" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["absent", "Model.absent", "absent.forward", "load.absent", ""])
def test_a_name_that_is_not_there_is_told_and_not_raised(
    engine: Any, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(vars(engine))
    trace.install(f"fp8_traced:{path}")
    assert capsys.readouterr().err == (
        f"fp8ctl trace: fp8_traced has no {path!r}, nothing is traced\n"
    )
    assert vars(engine) == before


def test_the_name_and_the_text_of_the_function_stay(engine: Any) -> None:
    trace.install("fp8_traced:load")
    assert (engine.load.__name__, engine.load.__doc__) == ("load", "Load.")
    # A spawned worker finds its target by this name.
    assert pickle.loads(pickle.dumps(engine.load)) is engine.load


def test_a_module_is_traced_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fp8_traced_later.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(imports, "_pending", {})
    monkeypatch.setenv(trace.ENVIRONMENT, "fp8_traced_later:load")
    try:
        trace.install()
        assert importlib.import_module("fp8_traced_later").load("x") == "x"
    finally:
        sys.modules.pop("fp8_traced_later", None)
    assert "fp8_traced_later:load(str)" in capsys.readouterr().err


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_nothing_is_watched(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "_pending", {})
    if value is None:
        monkeypatch.delenv(trace.ENVIRONMENT, raising=False)
    else:
        monkeypatch.setenv(trace.ENVIRONMENT, value)
    trace.install()
    assert imports._pending == {}


class Batch:
    pass


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.zeros(2, 576, dtype=torch.bfloat16), "Tensor[2, 576] bfloat16 cpu"),
        (lambda: torch.zeros((), dtype=torch.float8_e4m3fn), "Tensor[] float8_e4m3fn cpu"),
        (lambda: torch.nn.Parameter(torch.zeros(3)), "Parameter[3] float32 cpu"),
        (lambda: torch.zeros(4, device="meta"), "Tensor[4] float32 meta"),
        (lambda: [1, 2, 3], "list[3]"),
        (lambda: (1,), "tuple[1]"),
        (lambda: {"a": 1}, "dict[1]"),
        (lambda: {1, 2}, "set[2]"),
        (lambda: None, "None"),
        (lambda: True, "True"),
        (lambda: 7, "7"),
        (lambda: 0.5, "0.5"),
        (lambda: "a prompt of somebody", "str"),  # what users wrote has no place in a log
        (lambda: b"secret", "bytes"),
        (Batch, "Batch"),
        (lambda: Batch, "type"),
    ],
)
def test_a_value_is_described_by_its_type(make: Callable[[], object], text: str) -> None:
    assert trace.describe(make()) == text


def test_an_array_of_numpy_is_described_like_a_tensor() -> None:
    assert trace.describe(np.zeros((2, 3), dtype=np.int32)).startswith("ndarray[2, 3] int32")
