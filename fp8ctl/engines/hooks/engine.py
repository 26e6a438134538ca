"""What an engine says of its models, for what loads weights into them and looks at them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from fp8ctl.engines.hooks.shards import Form, More

#: What a layer has since the patch `unscaled-guard` counts what its loaders write.
COUNTERS = "fp8ctl_written"


class Own(NamedTuple):
    """What a model shows whose engine made codes and scales of its own, in a way that is known.

    Attributes:
        word: "online": the engine quantised 16-bit weights, with a scale for each row; "shared": of
            a per-tensor checkpoint, with one scale for all that it fuses.
        form: gives a parameter the form [out, in] that it has in a checkpoint.
        more: yields the scales that are no parameters, as `weight_scale` [out, 1].
    """

    word: Literal["online", "shared"]
    form: Form
    more: More | None = None


@dataclass(frozen=True)
class Engine:
    """What an engine says of its models.

    Attributes:
        form: gives a parameter the form that it has in a checkpoint, from what the kernels
            really read; None for a model in which some layer cannot show it.
        copies: gives the parameter in that form where memory has this form and its loader
            does nothing but copy into it, None for every other one; None for a model in
            which something is derived from the weights after they are loaded.
        obstacles: returns why a model cannot be loaded a second time; empty where it can.
        guard: calls `fp8ctl_unfilled` or `fp8ctl_forget` of the engine's unscaled guard;
            {} where that patch is not applied.
        settle: brings up to date what the engine derived from the weights.
        own: returns how a model shows what its engine made itself; None where it made nothing, or
            in a way that is not known.
        resume: lets the engine compute again, from within a question to its one rank; False where
            it cannot from there, or did not rest.
    """

    form: Callable[[torch.nn.Module], Form | None]
    copies: Callable[[torch.nn.Module], Form | None]
    obstacles: Callable[[torch.nn.Module], Iterable[str]]
    guard: Callable[[str, torch.nn.Module], Any]
    settle: Callable[[torch.nn.Module], None] = lambda _model: None
    own: Callable[[torch.nn.Module], Own | None] = lambda _model: None
    resume: Callable[[], bool] = lambda: False


def guard_in(module: str) -> Callable[[str, torch.nn.Module], Any]:
    """Return what calls the unscaled guard of a patched engine, as `Engine.guard` says.

    Args:
        module: of the engine, that the patch puts it in.
    """

    def guard(function: str, model: torch.nn.Module) -> Any:
        known = getattr(importlib.import_module(module), function, None)
        return known(_Counted(model)) if known is not None else {}

    return guard


class _Counted:
    """A model as the guard goes through it: the layers alone that it counts in.

    Every update asks, and a module takes microseconds to say that it has no such attribute.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def modules(self) -> Iterator[torch.nn.Module]:
        """Yield the layers that have counters."""
        return (one for one in self._model.modules() if COUNTERS in vars(one))
