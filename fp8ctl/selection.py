"""A user's own rules about tensors: `--keep RULE` and `--quantize RULE`.

A rule is an exact name, of a tensor, of a module, or of anything that holds them;
or a glob; or `re:` and a regular expression. Pure: names in, decisions out.
Called by `planning`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8ctl.errors import UsageError
from fp8ctl.policy import Decision, Reason, loadable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from fp8ctl.models import TensorInfo

_GLOB = re.compile(r"[*?\[]")
_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as typed.

    Attributes:
        quantize: what becomes of the tensors that it matches.
        pattern: of a glob or an expression, which must match a whole name; None: an exact name.
    """

    text: str
    quantize: bool
    pattern: re.Pattern[str] | None

    @property
    def option(self) -> str:
        """The rule as a user types it."""
        return f"{'--quantize' if self.quantize else '--keep'} {shlex.quote(self.text)}"

    def matches(self, name: str) -> bool:
        """Say whether a tensor is meant: by its own name, or by its module's."""
        if self.pattern is None:
            return name == self.text or name.startswith(self.text + ".")
        module = name.rpartition(".")[0]
        return bool(self.pattern.fullmatch(name) or self.pattern.fullmatch(module))


def parse(keep: Sequence[str], quantize: Sequence[str]) -> tuple[Rule, ...]:
    """Return the rules, those that keep first.

    Raises:
        UsageError: an empty rule, or an expression that is none.
    """
    return tuple(_rule(text, False) for text in keep) + tuple(
        _rule(text, True) for text in quantize
    )


def _rule(text: str, quantize: bool) -> Rule:
    option = "--quantize" if quantize else "--keep"
    if not text.strip() or text == "re:":
        raise UsageError(f"{option} {text!r} is empty", hint=f"{option} model.layers.0.mlp")
    if text.startswith("re:"):
        try:
            return Rule(text, quantize, re.compile(text[3:]))
        except re.error as e:
            raise UsageError(
                f"{option} {text!r} is not a regular expression: {e}",
                hint=rf"{option} 're:model\.layers\.0\.mlp\..*'",
            ) from e
    if _GLOB.search(text):
        return Rule(text, quantize, re.compile(fnmatch.translate(text)))
    return Rule(text, quantize, None)


def apply(
    rules: Sequence[Rule], decisions: Mapping[str, Decision], tensors: Mapping[str, TensorInfo]
) -> dict[str, Decision]:
    """Return the decisions under the rules.

    An exact name wins over a glob or an expression, a longer one over a shorter one.

    Args:
        rules: from `parse`.
        decisions: of every tensor, by name.
        tensors: the same, as the checkpoint has them.

    Raises:
        UsageError: a rule matches nothing, two contradict each other, or one wants in FP8
            what no engine could load so.
    """
    result = dict(decisions)
    matched: set[Rule] = set()
    able: set[Rule] = set()
    refused: dict[Rule, str] = {}
    for name, decision in decisions.items():
        mine = [rule for rule in rules if rule.matches(name)]
        if not mine:
            continue
        matched.update(mine)
        rule = _strongest(name, mine)
        if not rule.quantize:
            if decision.quantize:
                result[name] = Decision(False, Reason.USER, decision.role, f"keep {rule.text}")
            continue
        info = tensors[name]
        role = loadable(decision, name, info.shape, info.dtype)
        if role is None:
            refused.setdefault(rule, name)
            continue
        able.add(rule)
        if not decision.quantize:
            result[name] = Decision(True, Reason.USER, role, f"quantize {rule.text}")
    for rule in rules:
        if rule not in matched:
            raise _unmatched(rule, decisions)
        if rule in refused and rule not in able:
            name = refused[rule]
            raise UsageError(
                f"{rule.option}: {name} cannot become FP8 ({decisions[name].reason.value});"
                " an engine loads FP8 into a Linear of a decoder layer only",
                hint=f"leave {rule.option} out",
            )
    return result


def _strongest(name: str, rules: Sequence[Rule]) -> Rule:
    """Return the rule that decides a tensor."""
    strength = max(_strength(rule) for rule in rules)
    best = [rule for rule in rules if _strength(rule) == strength]
    if len({rule.quantize for rule in best}) > 1:
        keep = next(rule for rule in best if not rule.quantize)
        other = next(rule for rule in best if rule.quantize)
        raise UsageError(
            f"{keep.option} and {other.option} contradict each other about {name}",
            hint=f"an exact name wins: --keep {shlex.quote(name)}",
        )
    return best[0]


def _strength(rule: Rule) -> int:
    return len(rule.text) if rule.pattern is None else 0


def _unmatched(rule: Rule, names: Collection[str]) -> UsageError:
    """Say that a rule matches nothing, with the name that comes nearest."""
    wanted = _NUMBER.sub("*", rule.text.removeprefix("re:").replace("\\", ""))
    modules = {_NUMBER.sub("*", name.rpartition(".")[0]): name.rpartition(".")[0] for name in names}
    tensors = {_NUMBER.sub("*", name): name for name in names}
    near = difflib.get_close_matches(wanted, [*modules, *tensors], 1, 0.0)
    if not near:
        return UsageError(f"{rule.option} matches nothing")
    found = modules.get(near[0]) or tensors[near[0]]
    option = "--quantize" if rule.quantize else "--keep"
    if rule.pattern is not None:
        return UsageError(
            f"{rule.option} matches no tensor; the nearest name is {found}",
            hint=f"{option} {shlex.quote(near[0] if '*' in near[0] else found)}",
        )
    # The same module of the layer that was meant, where there is one.
    numbers = iter(_NUMBER.findall(rule.text))
    meant = re.sub(r"\*", lambda star: next(numbers, star[0]), near[0])
    if any(name == meant or name.startswith(meant + ".") for name in names):
        found = meant
    return UsageError(
        f"{rule.option} matches no tensor; the nearest name is {found}",
        hint=f"{option} {shlex.quote(found)}",
    )
