"""What is refused before an engine starts, with the reason that it would die of.

Pure, like `base`: a request in, nothing or an error out. Called by `sglang` and
`vllm`, which say what of it holds for their engine.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from fp8ctl.engines.base import (
    API_KEY_VARIABLE,
    FP8_CAPABILITY,
    SECRET_FLAGS,
    is_loopback,
    option_name,
    option_value,
    override_json,
)
from fp8ctl.errors import ConflictError, PlanDoesNotFitError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8ctl.engines.base import Device, LaunchRequest, ModelFacts

_UNDERSTOOD: Final = frozenset({"--host", "--port", "--load-format", "--served-model-name"})


def refuse_own_options(extra: Sequence[str], own: Mapping[str, str]) -> None:
    """Refuse engine arguments that fp8ctl's plan depends on.

    Args:
        extra: the user's engine arguments.
        own: engine's flag -> fp8ctl's option for it.

    Raises:
        UsageError: the option has to be given to fp8ctl, in front of `--`.
    """
    for word in extra:
        name = option_name(word)
        if name is not None and name in own:
            value = option_value(extra, name)
            typed = own[name] if value is None else f"{own[name]} {shlex.quote(value)}"
            raise UsageError(
                f"{name} behind `--` would go around the plan; fp8ctl has {own[name]} for it",
                hint=f"{typed} in front of `--`",
            )


def refuse_abbreviations(extra: Sequence[str], guarded: Iterable[str]) -> None:
    """Refuse a shortened flag: the engines' parsers take `--hos` for `--host`, unseen by us.

    Raises:
        UsageError: a word is the beginning of a flag that fp8ctl has to understand.
    """
    flags = {*guarded, *_UNDERSTOOD, *SECRET_FLAGS}
    for word in extra:
        name = option_name(word)
        if name is None or name in flags:
            continue
        meant = sorted(flag for flag in flags if flag.startswith(name))
        if meant:
            raise UsageError(
                f"{name} may be short for {' or '.join(meant)}; write the flag in full",
                hint=f"{meant[0]} in the place of {name}",
            )


def refuse_unproven(extra: Sequence[str], flags: Mapping[str, str]) -> None:
    """Refuse a way of spreading a model of which the hooks would see a part only.

    Args:
        extra: the user's engine arguments.
        flags: engine's flag -> what it is called.

    Raises:
        UnsupportedError: one of them is there.
    """
    for word in extra:
        name = option_name(word) or word.split("=", 1)[0]
        if name in flags:
            raise UnsupportedError(
                f"{name}: {flags[name]} is not covered, expected tensor parallelism only "
                "(updates and checks would see a part of the workers)",
                hint=f"leave {name} out; --tp, in front of `--`, is how fp8ctl spreads a model",
            )


def refuse_dummy_weights(request: LaunchRequest) -> None:
    """Refuse to serve the random numbers that an engine makes up to be overwritten.

    Raises:
        ConflictError: --load-format dummy without --await-push.
    """
    if option_value(request.extra, "--load-format") == "dummy" and not request.await_push:
        raise ConflictError(
            "--load-format dummy serves random weights, and nothing says that others will come",
            hint="--await-push in front of `--`, or leave --load-format dummy out",
        )


def refuse_open_door(host: str, environ: Mapping[str, str], extra: Sequence[str]) -> None:
    """Refuse an address that others reach without a key.

    The weight-update routes of both engines take pickled data: whoever reaches
    them runs code as this user.

    Raises:
        ConflictError: the host is not loopback and there is no API key.
    """
    if is_loopback(host) or environ.get(API_KEY_VARIABLE) or option_value(extra, "--api-key"):
        return
    raise ConflictError(
        f"--host {host} is reachable by others, {API_KEY_VARIABLE} is not set, and the engine's "
        "weight-update routes run code from whoever reaches them",
        hint=f"export {API_KEY_VARIABLE}=$(openssl rand -hex 16)",
    )


def refuse_missing_patch(request: LaunchRequest, backend: str, patch: str, reason: str) -> None:
    """Refuse to start what only a patched engine can do.

    Raises:
        ConflictError: the patch is not applied; its data has it as `missing_patch`.
    """
    if patch not in request.applied:
        raise ConflictError(
            f"patch {patch} of {backend} is not applied, and {reason}",
            hint=f"fp8ctl patch --python {shlex.quote(str(request.python))} --backend {backend}",
            data={"missing_patch": patch, "applied": sorted(request.applied)},
        )


def refuse_old_gpu(device: Device, what: str, needed: tuple[int, int] = FP8_CAPABILITY) -> None:
    """Refuse what the GPU has no instruction for; says nothing about a CPU.

    Raises:
        UnsupportedError: the compute capability is lower than `needed`.
    """
    if device.capability is not None and device.capability < needed:
        raise UnsupportedError(
            f"{what} needs compute capability >= {needed[0]}.{needed[1]}; "
            f"this machine has {device.describe()}",
            hint="use --torchao-config int8wo (SGLang), or a newer GPU",
            data={"capability": list(device.capability), "needed": list(needed)},
        )


def refuse_foreign_checkpoint(
    method: str, model: ModelFacts, kinds: frozenset[str], files: frozenset[str], makes: str
) -> None:
    """Refuse a method whose checkpoint is of another kind than the model.

    Args:
        method: the value of --quantization.
        model: the model.
        kinds: values of quant_method that the method loads; empty: it never loads a folder.
        files: JSON files beside config.json from which the engine would take the method.
        makes: what a fitting checkpoint is, in words.

    Raises:
        PlanDoesNotFitError: the model is 16-bit, or quantised in another way.
    """
    if model.quant_method in kinds or (model.quant_method is None and model.sidecars & files):
        return
    found = (
        "is a 16-bit checkpoint (no quantization_config in its config.json)"
        if model.quant_method is None
        else f"is quantised with {model.quant_method!r}"
    )
    raise PlanDoesNotFitError(
        f"--quantization {method} loads {makes} and quantises nothing itself, "
        f"but {model.path} {found}",
        hint="drop --quantization: fp8ctl launch --mode block quantises a 16-bit checkpoint",
        data={"method": method, "found": model.quant_method, "expected": sorted(kinds)},
    )


def refuse_lost_override(request: LaunchRequest, flag: str) -> None:
    """Refuse a user's override argument that would drop the FP8 configuration.

    Raises:
        ConflictError: the source is an override, and the user's JSON has none.
    """
    given = option_value(request.extra, flag)
    if request.source != "override" or given is None or '"quantization_config"' in given:
        return
    raise ConflictError(
        f"{flag} behind `--` replaces the one that carries the FP8 configuration",
        hint=f"add this key to your JSON: {override_json(request.override or {})[1:-1]}",
    )
