"""The Python on the pages, unrun: it compiles, and what it says of fp8ctl is there.

Most of it runs, too (test_settings, test_trainers, push/test_page); this finds the rest, and names
in running text.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
#: What the pages call an instance of what.
INSTANCES = {"rollout": "Rollout", "plan": "Plan"}
#: Where running text speaks of arguments, too.
TALKING = ("docs/kernels.md", "docs/library.md", "docs/trainers.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.M | re.S)


class Python:
    """What a page has imported of fp8ctl so far, and what is wrong with what it does with it."""

    def __init__(self) -> None:
        self.known: dict[str, object] = {}
        self.faults: list[str] = []

    def read(self, text: str) -> None:
        """Look at a block."""
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                self._import(node)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                self._call(node)
            elif isinstance(node, ast.Attribute):
                self._attribute(node)

    def accepts(self, keyword: str) -> bool:
        """Whether anything that the page has imported takes such an argument."""
        return any(
            keyword in inspect.signature(one).parameters
            for thing in self.known.values()
            for one in _callables(thing)
        )

    def _module(self, name: str) -> object:
        if name.split(".")[0] != "fp8ctl":
            return None
        try:
            return importlib.import_module(name)
        except ImportError as e:
            self.faults.append(str(e))
            return None

    def _import(self, node: ast.ImportFrom) -> None:
        module = self._module(node.module or "")
        for alias in node.names if module is not None else ():
            if hasattr(module, alias.name):
                self.known[alias.asname or alias.name] = getattr(module, alias.name)
            else:
                self.faults.append(f"{node.module} has no {alias.name}")

    def _attribute(self, node: ast.Attribute) -> None:
        """See that a class that was imported, and what is called as its instances are, has it."""
        of = node.value.attr if isinstance(node.value, ast.Attribute) else None
        of = node.value.id if isinstance(node.value, ast.Name) else of
        kind = self.known.get(INSTANCES.get(of or "", of or ""))
        if not isinstance(kind, type) or hasattr(kind, node.attr):
            return
        if node.attr not in getattr(kind, "__dataclass_fields__", ()):
            self.faults.append(f"{ast.unparse(node)}: {kind.__name__} has no {node.attr}")

    def _call(self, node: ast.Call) -> None:
        if any(isinstance(a, ast.Starred) for a in node.args) or any(
            k.arg is None for k in node.keywords
        ):
            return
        given = [a for a in node.args if not (isinstance(a, ast.Constant) and a.value is ...)]
        names = {k.arg: None for k in node.keywords if k.arg is not None}
        candidates = [*self._named(node.func)]
        wrong = []
        for one in candidates:
            try:
                inspect.signature(one).bind_partial(*given, **names)
            except TypeError as e:
                wrong.append(f"{ast.unparse(node)}: {e}")
        if wrong and len(wrong) == len(candidates):
            self.faults += wrong

    def _named(self, func: ast.expr) -> Iterator[Callable[..., object]]:
        """Yield what a call may mean: of a variable, any class that has such a method."""
        if isinstance(func, ast.Name) and callable(self.known.get(func.id)):
            yield self.known[func.id]  # type: ignore[misc]
            return
        name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
        for thing in self.known.values():
            if isinstance(thing, type) and callable(getattr(thing, name, None)):
                yield _bound(thing, name)


def _bound(kind: type, name: str) -> Callable[..., object]:
    """Return a method as an instance has it: without `self`."""
    found = inspect.getattr_static(kind, name)
    if isinstance(found, (classmethod, staticmethod)):
        method: Callable[..., object] = getattr(kind, name)
        return method
    function: Callable[..., object] = getattr(kind, name)

    def bound(*args: object, **kwargs: object) -> None:
        raise AssertionError("it is looked at, not called")

    parameters = [*inspect.signature(function).parameters.values()][1:]
    vars(bound)["__signature__"] = inspect.Signature(parameters)
    return bound


def _callables(thing: object) -> Iterator[Callable[..., object]]:
    if callable(thing):
        yield thing
    if isinstance(thing, type):
        for name, member in vars(thing).items():
            if not name.startswith("_") and inspect.isfunction(member):
                yield member


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_python_of_a_page_names_what_there_is(page: str) -> None:
    python = Python()
    for text in blocks(page):
        python.read(text)
    assert python.faults == []


@pytest.mark.parametrize("page", TALKING)
def test_the_arguments_in_running_text_exist(page: str) -> None:
    python = Python()
    for text in blocks(page):
        python.read(text)
    text = re.sub(r"^```\w*\n.*?^```$", "", PAGES[page], flags=re.M | re.S)
    found = 0
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[A-Za-z][\w.]*\([^()]*\)", span):
            python.read(span)
        elif named := re.match(r"([a-z]\w*)=", span):
            found += 1
            assert python.accepts(named[1]), span
    assert python.faults == []
    assert found or page == "docs/kernels.md"


@pytest.mark.parametrize(
    "wrong",
    [
        "from fp8ctl.nowhere import Rollout",
        "from fp8ctl.push import Rolout",
        "import fp8ctl.pushh",
        "from fp8ctl.push import Rollout\nRollout(urls, plan, transport='ipc')",
        "from fp8ctl.push import Rollout\nrollout.update(weights, 1, rank=0)",
        "from fp8ctl.push import Rollout\nself.rollout.update(weights, 1, 2)",
        "from fp8ctl.settings import Settings\nSettings.from_mode(size='64,64')",
        "from fp8ctl.push import Rollout\nself.rollout.updat(weights, 1)",
        "from fp8ctl.push import Rollout\nRollout.nope()",
    ],
)
def test_what_a_page_could_say_wrong_is_found(wrong: str) -> None:
    python = Python()
    python.read(wrong)
    assert len(python.faults) == 1


def test_python_that_does_not_compile_is_found() -> None:
    with pytest.raises(SyntaxError):
        Python().read("rollout.update(")
