"""FP8 in a trainer, as one object: engine arguments, model configuration, metadata, snippets.

Made from a plan, or from a mode alone where there is no checkpoint to plan yet.
A trainer carries it from its own configuration to the server that it starts and
to the weights that it sends, so that no two places can disagree. Off means off:
every answer is empty and nothing is set.

    settings = Settings.from_plan(plan)
    llm = LLM(model=path, **settings.engine_arguments("vllm"))
    settings.set_on(model_config)
    meta = settings.update_metadata()

Used by trainers and by `planning` (`--snippet`). Imports no engine and no
trainer; what the engines' options are called is `engines`' to know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fp8ctl import formats, hfconfig, policy, snippets
from fp8ctl.engines import sglang, vllm
from fp8ctl.errors import PlanDoesNotFitError, UsageError
from fp8ctl.formats import BlockSize, Mode, RecipeName
from fp8ctl.manifest import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fp8ctl.engines.base import Option
    from fp8ctl.policy import Backend

__all__ = ["OFF", "Settings"]

SCHEMA = 1
DEFAULT_BLOCK = BlockSize(128, 128)
_OFF_WORDS = (None, "", "off")
# Options whose value is no string where the engine is called from Python.
_TYPED: dict[str, Callable[[str], object]] = {
    "tensor_parallel_size": int,
    "tp_size": int,
    "hf_overrides": json.loads,
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a trainer's rollout servers run in FP8, or that they do not.

    Attributes:
        mode: what shares a scale; None: off.
        block: in block mode.
        backend: the engine that it is for; None: either.
        tp: tensor-parallel size; None: the trainer's own business.
        plan: where it was made from one; it has every tensor.
    """

    mode: Mode | None = None
    block: BlockSize | None = None
    backend: Backend | None = None
    tp: int | None = None
    plan: Plan | None = None

    @classmethod
    def from_plan(cls, plan: Plan) -> Settings:
        """Return the settings under which a server takes what the plan makes.

        Raises:
            PlanDoesNotFitError: the engine would refuse the plan.
        """
        if plan.problems:
            first = plan.problems[0]
            raise PlanDoesNotFitError(
                f"the plan of {plan.model} does not fit: {first.tensor}: {first.message}",
                hint="fp8ctl plan --model MODEL --backend BACKEND says what does",
            )
        return cls(plan.mode, plan.block, plan.backend, plan.tp, plan)

    @classmethod
    def from_mode(
        cls,
        mode: str | None,
        block_size: str | None = None,
        *,
        backend: Backend | None = None,
        tp: int | None = None,
    ) -> Settings:
        """Return settings without a plan: nobody has looked whether the model fits them.

        Args:
            mode: `block` or `per-tensor`; `fp8`, as trainers say for blocks; None, "" and
                `off` for off.
            block_size: "N,K" in block mode; left out: 128,128.
            backend: the engine; left out: either.
            tp: tensor-parallel size, where the engine's arguments shall have it.

        Raises:
            UsageError: another mode, a block that is none, or one where there are none.
        """
        if mode in _OFF_WORDS:
            if block_size is not None:
                raise UsageError(f"block size {block_size} with FP8 off", hint='mode="block"')
            return OFF
        form = Mode.BLOCK if mode == "fp8" else formats.parse_mode(str(mode))
        if form is not Mode.BLOCK and block_size is not None:
            raise UsageError(
                f"block size {block_size} has no meaning in {form.value} mode", hint='mode="block"'
            )
        if tp is not None and tp < 1:
            raise UsageError(f"tensor-parallel size {tp} is not positive", hint="tp=1")
        block = None
        if form is Mode.BLOCK:
            block = DEFAULT_BLOCK if block_size is None else BlockSize.parse(block_size)
        return cls(form, block, None if backend is None else _known(backend), tp)

    def __bool__(self) -> bool:
        """Say whether FP8 is on."""
        return self.mode is not None

    @property
    def label(self) -> str:
        """The format in a few words: `off`, `per-tensor`, `blocks of 64x64`."""
        if self.mode is None:
            return "off"
        return self.mode.value if self.block is None else f"blocks of {self.block.label}"

    @property
    def recipe(self) -> RecipeName:
        """The arithmetic of scales and codes: the plan's."""
        return formats.RECIPE if self.plan is None else self.plan.recipe

    def quantization_config(self, backend: Backend | None = None) -> dict[str, object] | None:
        """Return a new `quantization_config` for config.json or an override; None where off.

        Args:
            backend: whose spelling of ignored layers; left out: the settings' own, both
                where they are for either engine.

        Raises:
            UsageError: the settings are for the other engine.
        """
        if self.mode is None:
            return None
        engine = self._engine(backend, needed=False)
        if self.plan is not None:
            return self.plan.quantization_config(engine)
        # The output head alone, which no engine fuses: both spell it the same.
        kept = policy.kept_modules(())
        return formats.quantization_config(
            self.mode, self.block, ignored_layers=kept, not_converted=kept
        )

    def engine_flags(self, backend: Backend | None = None) -> tuple[str, ...]:
        """Return what to add to the command line of an engine that is sent its weights.

        It starts from the 16-bit checkpoint with the FP8 configuration put over, as
        `fp8ctl launch --await-push` does. A checkpoint in FP8 needs none of it.

        Args:
            backend: `vllm` or `sglang`; left out: the settings' own.

        Raises:
            UsageError: no engine was named, or the settings are for the other one.
        """
        return _flags(self._options(backend))

    def engine_arguments(self, backend: Backend | None = None) -> dict[str, Any]:
        """Return the same as keyword arguments.

        Those of `vllm.LLM` and `AsyncEngineArgs`, or of `sglang.Engine` and `ServerArgs`.

        Args:
            backend: `vllm` or `sglang`; left out: the settings' own.

        Raises:
            UsageError: no engine was named, or the settings are for the other one.
        """
        return _arguments(self._options(backend))

    def engine_environment(self, backend: Backend | None = None) -> dict[str, str]:
        """Return the environment variables that belong to the arguments.

        `FP8CTL_AWAIT_PUSH` lets an engine with the patch unscaled-guard start without FP8
        weights. On SGLang, blocks other than 128x128 switch off the kernels that are made
        for 128x128 and would compute with that; on older GPUs those are off anyway.

        Args:
            backend: `vllm` or `sglang`; left out: the settings' own.

        Raises:
            UsageError: no engine was named, or the settings are for the other one.
        """
        if self.mode is None:
            return {}
        variables = {"FP8CTL_AWAIT_PUSH": "1"}
        other_blocks = self.block is not None and self.block != DEFAULT_BLOCK
        if self._engine(backend) == "sglang" and other_blocks:
            variables |= dict.fromkeys(sglang.KERNELS_FOR_128, "0")
        return variables

    def update_metadata(self, backend: Backend | None = None) -> dict[str, object]:
        """Return what whoever sends weights has to know, as JSON types; {} where off.

        `quantization` and `quantization_config` are what trainers pass on; `mode`,
        `block_size` and `recipe` say how to quantise; `tensors` has for each tensor the
        name, dtype and shape to send, and those of its scales or None. Without a plan
        `tensors` is None: `policy.should_quantize_param` then decides tensor by tensor.

        Args:
            backend: as in `quantization_config`.
        """
        if self.mode is None:
            return {}
        return {
            "quantization": "fp8",
            "quantization_config": self.quantization_config(backend),
            "mode": self.mode.value,
            "block_size": None if self.block is None else [self.block.n, self.block.k],
            "recipe": self.recipe,
            "plan_digest": None if self.plan is None else self.plan.digest,
            "tensors": None if self.plan is None else _tensors(self.plan),
        }

    def set_on(
        self, config: T, *, backend: Backend | None = None, inside: str | None = "hf_config"
    ) -> T:
        """Set the `quantization_config` of a model's configuration, and return `config`.

        Does nothing where off, or where it is set already.

        Args:
            config: a dict, an object with attributes, a dataclass, a transformers
                configuration or an OmegaConf one, in struct mode or not.
            backend: as in `quantization_config`.
            inside: under which name `config` holds the model's configuration; None:
                `config` is it.

        Raises:
            NotFoundError: there is no `hf_config` yet, or it is None or missing.
            ConflictError: another quantization_config is there.
            UnsupportedError: the configuration takes none: it is frozen or read-only.
        """
        wanted = self.quantization_config(backend)
        if wanted is not None:
            hfconfig.put(config, wanted, inside=inside)
        return config

    def snippet(self, kind: str, model: str | None = None, backend: Backend | None = None) -> str:
        """Return what to paste into a trainer's configuration or a shell; "" where off.

        Args:
            kind: one of `snippets.KINDS`.
            model: the 16-bit checkpoint; left out: the plan's.
            backend: the engine; left out: that of the kind or of the settings.

        Raises:
            UsageError: an unknown kind, or no engine, or another one than the settings'.
            UnsupportedError: the trainer cannot do this mode or block.
        """
        engine = self._engine(snippets.engine_of(kind, backend or self.backend))
        if self.mode is None:
            return ""
        path = model or (str(self.plan.model) if self.plan is not None else "/path/to/model")
        config = self.quantization_config(engine) or {}
        options = _override(engine, self.tp, config)
        return snippets.write(
            kind,
            snippets.Facts(
                backend=engine,
                model=path,
                mode=self.mode,
                block=self.block,
                recipe=self.recipe,
                tp=self.tp,
                config=config,
                flags=_flags(options),
                arguments=_arguments(options),
                environment=self.engine_environment(engine),
                quantized=() if self.plan is None else tuple(t.name for t in self.plan.quantized),
            ),
        )

    def to_json(self) -> dict[str, object]:
        """Return the settings as JSON types, the whole plan included."""
        return {
            "schema": SCHEMA,
            "mode": None if self.mode is None else self.mode.value,
            "block_size": None if self.block is None else str(self.block),
            "backend": self.backend,
            "tp": self.tp,
            "plan": None if self.plan is None else self.plan.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Settings:
        """Read settings back.

        Raises:
            UsageError: another schema, or a field that is missing or wrong.
            PlanDoesNotFitError: as `from_plan`.
        """
        hint = "write them anew with Settings.to_json"
        if document.get("schema") != SCHEMA:
            raise UsageError(
                f"settings of schema {document.get('schema')!r}; expected {SCHEMA}", hint=hint
            )
        try:
            if document["plan"] is not None:
                return cls.from_plan(Plan.from_json(document["plan"]))
            return cls.from_mode(
                document["mode"],
                document["block_size"],
                backend=document["backend"],
                tp=document["tp"],
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise UsageError(f"no settings: {type(e).__name__} {e}", hint=hint) from e

    def _engine(self, backend: Backend | None, *, needed: bool = True) -> Any:
        """Return the engine that is meant; None only where none is needed."""
        if backend is None:
            if self.backend is None and needed and self:
                raise UsageError(
                    "these settings are for either engine: say which", hint='backend="sglang"'
                )
            return self.backend
        _known(backend)
        if self.backend not in (None, backend):
            raise UsageError(
                f"these settings are for {self.backend}, whose rules were applied; "
                f"{backend} was asked",
                hint=f"make them for it: backend={backend!r}, or fp8ctl plan --backend {backend}",
            )
        return backend

    def _options(self, backend: Backend | None) -> list[Option]:
        engine = self._engine(backend)
        config = self.quantization_config(engine)
        return [] if config is None else _override(engine, self.tp, config)


OFF = Settings()
"""FP8 is off: every answer is empty, and nothing is set."""


def _override(backend: Backend, tp: int | None, config: Mapping[str, object]) -> list[Option]:
    rules = sglang if backend == "sglang" else vllm
    return [*rules.parallel_options(tp or 1), *rules.override_options(config)]


def _flags(options: Iterable[Option]) -> tuple[str, ...]:
    return tuple(word for option in options for word in (option.flag, *option.values))


def _arguments(options: Iterable[Option]) -> dict[str, Any]:
    """Return options as the keyword arguments of the same name."""
    arguments: dict[str, Any] = {}
    for option in options:
        name = option.flag.removeprefix("--").replace("-", "_")
        arguments[name] = _TYPED.get(name, str)(*option.values)
    return arguments


def _known(backend: Backend) -> Backend:
    if backend not in ("vllm", "sglang"):
        raise UsageError(
            f"unknown engine {backend!r}; expected vllm or sglang", hint="sglang or vllm"
        )
    return backend


def _tensors(plan: Plan) -> list[dict[str, object]]:
    """Return every tensor of a complete update, in the plan's order."""
    found: list[dict[str, object]] = []
    for tensor in plan.tensors:
        scale: dict[str, object] | None = None
        if tensor.quantize:
            scale = {
                "name": formats.scale_name(tensor.name, plan.mode),
                "dtype": formats.SCALE_DTYPE,
                "shape": list(plan.scale_shape(tensor)),
            }
        found.append(
            {
                "name": tensor.name,
                "dtype": formats.CODE_DTYPE if tensor.quantize else tensor.dtype,
                "shape": list(tensor.shape),
                "scale": scale,
            }
        )
    return found
