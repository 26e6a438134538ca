"""Every error has an id of its own, a code of the contract, and survives a process boundary."""

from __future__ import annotations

import ast
import importlib
import pickle
import pkgutil
from pathlib import Path

import pytest

import fp8ctl
from fp8ctl import errors, interpreter
from fp8ctl.errors import Fp8ctlError

CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130}
KINDS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, Fp8ctlError)
]


def test_ids_are_unique_and_of_one_form() -> None:
    ids = [kind.id for kind in KINDS]
    assert len(ids) == len(set(ids)) > 10
    assert all(id_.startswith("FP8-") and id_ == id_.upper() for id_ in ids)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_an_exit_code_is_one_of_the_contract(kind: type[Fp8ctlError]) -> None:
    assert kind.exit_code in CODES - {0}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_an_error_carries_message_hint_and_data(kind: type[Fp8ctlError]) -> None:
    error = kind("found 'x'", hint="type y", data={"found": "x"})
    assert (str(error), error.message) == ("found 'x'", "found 'x'")
    assert (error.hint, error.data) == ("type y", {"found": "x"})
    assert (kind("m").hint, kind("m").data) == (None, {})


def test_two_errors_do_not_share_their_data() -> None:
    first, second = Fp8ctlError("a"), Fp8ctlError("b")
    first.data["x"] = 1
    assert second.data == {}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_a_workers_error_comes_back_as_the_same_class(kind: type[Fp8ctlError]) -> None:
    body = {"id": kind.id, "message": "m", "hint": "h", "data": {"a": 1}}
    error = interpreter._error(body)
    assert type(error) is kind
    assert (error.message, error.hint, error.data) == ("m", "h", {"a": 1})


def test_an_id_that_nobody_knows_comes_back_as_the_root() -> None:
    error = interpreter._error({"id": "FP8-OF-TOMORROW", "message": "m"})
    assert type(error) is Fp8ctlError
    assert error.exit_code == 1


def test_an_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(errors.BusyError("port 1", hint="--port 2", data={"p": 1})))
    assert (error.message, error.hint, error.data) == ("port 1", "--port 2", {"p": 1})


def test_no_other_module_makes_a_class_of_errors() -> None:
    root = Path(fp8ctl.__file__).parent
    names = [module.name for module in pkgutil.walk_packages([str(root)], "fp8ctl.")]
    assert "fp8ctl.check.weights" in names
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and name != "fp8ctl.errors":
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                assert not bases & {kind.__name__ for kind in KINDS}, f"{name}: {node.name}"
