"""Puts a `quantization_config` on a model's configuration, whatever kind of object that is.

Trainers keep the model's configuration (`hf_config`) in dicts, in objects, in
dataclasses or in OmegaConf, and make it at different times. Setting the key
before the configuration is there, or on an OmegaConf object in struct mode,
fails far from its cause (verl-project/verl#5675). OmegaConf and transformers are
told by what they look like, and imported only where an object of theirs is there
already. Called by `settings`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fp8ctl.errors import ConflictError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

KEY: Final = "quantization_config"


def put(config: object, wanted: dict[str, object], *, inside: str | None) -> None:
    """Set `quantization_config` to `wanted`; do nothing where it is that already.

    Args:
        config: the model's configuration, or what holds it.
        wanted: the value, plain JSON types; it is the configuration's from then on.
        inside: the name under which `config` holds it; None: `config` is it.

    Raises:
        NotFoundError: `config` does not hold it yet.
        ConflictError: another value is there.
        UnsupportedError: the configuration is frozen, read-only or has no place for it.
    """
    target, name = config, type(config).__name__
    if inside is not None:
        target, name = _read(config, inside), inside
        if target is None:
            raise NotFoundError(
                f"{type(config).__name__} has no {inside} yet: the model's configuration must be "
                f"there before its {KEY} can be set",
                hint=f"set it after the model's configuration was loaded; inside=None where the "
                f"{type(config).__name__} is the model's configuration itself",
            )
    found = _plain(_read(target, KEY))
    if found == wanted:
        return
    if found:
        raise ConflictError(
            f"{name}.{KEY} is {_describe(found, wanted)}; {_describe(wanted, found)} was asked",
            hint=f"start from the 16-bit model, or remove {KEY} from its configuration",
            data={"found": found, "wanted": wanted},
        )
    _write(target, name, wanted)


def _read(config: object, name: str) -> Any:
    """Return an item of a mapping or an attribute of an object, None where there is none."""
    if isinstance(config, Mapping):
        # OmegaConf calls what is marked as missing (`???`) not there.
        if name not in config:
            return None
        return config[name]
    return getattr(config, name, None)


def _write(target: Any, name: str, value: dict[str, object]) -> None:
    """Set the key, also where the configuration forbids new keys.

    Raises:
        UnsupportedError: it cannot be set, or would be lost again.
    """
    if dataclasses.is_dataclass(target) and not any(
        field.name == KEY for field in dataclasses.fields(target)
    ):
        raise UnsupportedError(
            f"{name} is a dataclass {type(target).__name__} without a field {KEY}: "
            "dataclasses.replace() and asdict() would drop it",
            hint=f"add the field to the class: {KEY}: dict[str, object] | None = None",
        )
    try:
        with _opened(target):
            if isinstance(target, MutableMapping):
                target[KEY] = value
            else:
                setattr(target, KEY, value)
    except Exception as e:  # a configuration may refuse in any way it likes
        text = str(e).partition("\n")[0]
        raise UnsupportedError(
            f"{name} ({type(target).__name__}) does not let its {KEY} be set: "
            f"{type(e).__name__}: {text}",
            hint="set it on a copy that can be changed, before it is frozen",
        ) from e


def _opened(target: object) -> AbstractContextManager[object]:
    """Return what lets new keys in for a moment: for OmegaConf; for others, nothing."""
    if not any(base.__module__.startswith("omegaconf.") for base in type(target).__mro__):
        return contextlib.nullcontext()
    from omegaconf import open_dict

    opened: AbstractContextManager[object] = open_dict(target)
    return opened


def _plain(value: Any) -> Any:
    """Return a value of any of the kinds as plain types, to be compared."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    # transformers' own QuantizationConfigMixin.
    as_dict = getattr(value, "to_dict", None)
    return _plain(as_dict()) if callable(as_dict) else value


def _describe(one: Any, other: Any) -> str:
    """Return the method of a configuration, and what the other has not or has otherwise."""
    if not isinstance(one, Mapping):
        return repr(one)
    against = other if isinstance(other, Mapping) else {}
    absent = object()
    differs = {
        key: value
        for key, value in one.items()
        if key != "quant_method" and against.get(key, absent) != value
    }
    parts = [f"quant_method {one.get('quant_method')!r}"]
    for key, value in differs.items():
        text = repr(value)
        parts.append(f"{key} {text if len(text) <= 60 else text[:57] + '...'}")
    return ", ".join(parts)
