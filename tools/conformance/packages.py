"""Rows of packages that may be installed, or whose released wheel lies in a folder.

Nothing is imported before it is asked for, and everything by name: this project needs none of
them. Adapters do what the package's own callers do and no more; where a package has no
function that takes a weight and returns codes and scales, the comment says which of its
functions stand in a row.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import math
import typing
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from .cases import Adapter, NotQuantisedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Pair = tuple[torch.Tensor, torch.Tensor]
    Loader = Callable[[], list[Adapter]]

FP8 = torch.float8_e4m3fn
SIDE = 128
BLOCK = (SIDE, SIDE)
ROW, TENSOR = (1, 0), (0, 0)


def load(name: str) -> Any:
    """Import a module of another package."""
    return importlib.import_module(name)


# --- installed packages ---------------------------------------------------------------------------


def transformers() -> list[Adapter]:
    module = load("transformers.integrations.finegrained_fp8")

    def run(scale_fmt: str, block: tuple[int, int] | None) -> Callable[[torch.Tensor], Pair]:
        config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
        operation = module.Fp8Quantize(SimpleNamespace(quantization_config=config))

        def quantize(x: torch.Tensor) -> Pair:
            made = operation.convert({"a.weight": x})
            if "a.weight_scale_inv" not in made:
                raise NotQuantisedError
            return made["a.weight"], made["a.weight_scale_inv"]

        return quantize

    call = "`Fp8Quantize.convert`"
    return [
        Adapter("transformers", "transformers", call, BLOCK, run("float", BLOCK)),
        Adapter(
            "transformers ue8m0",
            "transformers",
            f"{call}, scale_fmt ue8m0",
            BLOCK,
            run("ue8m0", BLOCK),
        ),
        Adapter(
            "transformers per-tensor",
            "transformers",
            f"{call}, no block",
            TENSOR,
            run("float", None),
        ),
    ]


def torchao() -> list[Adapter]:
    granularity = load("torchao.quantization.granularity")
    weights = load("torchao.quantization").Float8Tensor
    training = load("torchao.float8.float8_scaling_utils")
    mx = load("torchao.prototype.mx_formats.mx_tensor")
    modes = load("torchao.prototype.mx_formats.config").ScaleCalculationMode

    def of(kind: Any) -> Callable[[torch.Tensor], Pair]:
        def run(x: torch.Tensor) -> Pair:
            made = weights.from_hp(x, granularity=kind)
            return made.qdata, made.scale

        return run

    def dynamic(power_of_two: bool) -> Callable[[torch.Tensor], Pair]:
        config = load("torchao.float8.float8_training_tensor").LinearMMConfig()

        def run(x: torch.Tensor) -> Pair:
            made = training.hp_tensor_to_float8_dynamic(
                x, FP8, config, round_scales_to_power_of_2=power_of_two
            )
            return made._data, made._scale.reciprocal()  # what it stores is the factor

        return run

    def micro(mode: Any) -> Callable[[torch.Tensor], Pair]:
        def run(x: torch.Tensor) -> Pair:
            made = mx.MXTensor.to_mx(x, FP8, 32, mode)
            return made.qdata, made.scale

        return run

    def row(
        name: str, call: str, sides: tuple[int, int], run: Callable[[torch.Tensor], Pair]
    ) -> Adapter:
        return Adapter(f"torchao {name}", "torchao", call, sides, run)

    hp = "`Float8Tensor.from_hp`"
    to_dynamic = "`float8.hp_tensor_to_float8_dynamic`"
    rows = [
        row(
            "PerBlock", f"{hp}, PerBlock([128, 128])", BLOCK, of(granularity.PerBlock(list(BLOCK)))
        ),
        row("PerRow", f"{hp}, PerRow()", ROW, of(granularity.PerRow())),
        row("PerTensor", f"{hp}, PerTensor()", TENSOR, of(granularity.PerTensor())),
        row("training", to_dynamic, TENSOR, dynamic(power_of_two=False)),
        row("training, powers of two", to_dynamic, TENSOR, dynamic(power_of_two=True)),
        row("MX floor", "`MXTensor.to_mx`, FLOOR", (1, 32), micro(modes.FLOOR)),
        row("MX rceil", "`MXTensor.to_mx`, RCEIL", (1, 32), micro(modes.RCEIL)),
    ]
    # Its module imports triton at the top, the function does not use it.
    path, name = "prototype/blockwise_fp8_training/kernels.py", "torch_blockwise_scale_weight_quant"
    folder = Path(load("torchao").__file__).parent
    given = {"e4m3_dtype": load("torchao.float8.config").e4m3_dtype}
    blockwise = functions(lambda p: (folder / p).read_bytes(), {path: ("EPS", name)}, given)
    return [*rows, row("blockwise training", f"`{name}`", BLOCK, getattr(blockwise, name))]


def _arguments(strategy: str) -> Any:
    given: dict[str, Any] = {"block_structure": list(BLOCK)} if strategy == "block" else {}
    return load("compressed_tensors.quantization").QuantizationArgs(
        num_bits=8, type="float", strategy=strategy, symmetric=True, **given
    )


_STRATEGIES = {"block": BLOCK, "channel": ROW, "tensor": TENSOR}


def compressed_tensors() -> list[Adapter]:
    """`calculate_qparams` takes least and largest numbers; here they are found in FP32."""
    helpers = load("compressed_tensors.quantization.utils.helpers")
    forward = load("compressed_tensors.quantization.lifecycle.forward")

    def of(strategy: str) -> Callable[[torch.Tensor], Pair]:
        arguments = _arguments(strategy)

        def run(x: torch.Tensor) -> Pair:
            if strategy == "block":
                padded = helpers.maybe_pad_tensor_for_block_quant(x.float(), BLOCK)
                n, k = padded.shape
                groups = padded.reshape(n // SIDE, SIDE, k // SIDE, SIDE).transpose(1, 2).flatten(2)
            else:
                groups = x.float() if strategy == "channel" else x.float().flatten()
            least, most = torch.aminmax(groups, dim=-1, keepdim=strategy != "block")
            scale, zero = helpers.calculate_qparams(least, most, arguments)
            return forward.quantize(x, scale, zero, arguments, dtype=FP8), scale

        return run

    call = "`calculate_qparams` of FP32 min and max, `quantize`, strategy"
    return [
        Adapter(f"compressed-tensors {s}", "compressed-tensors", f"{call} {s}", sides, of(s))
        for s, sides in _STRATEGIES.items()
    ]


def llmcompressor() -> list[Adapter]:
    """The observer that it uses for weights, which finds min and max in the weight's dtype."""
    observers = load("llmcompressor.observers")
    forward = load("compressed_tensors.quantization.lifecycle.forward")

    def of(strategy: str) -> Callable[[torch.Tensor], Pair]:
        def run(x: torch.Tensor) -> Pair:
            arguments = _arguments(strategy)
            observer = observers.Observer.load_from_registry(
                "memoryless_minmax", base_name="weight", args=arguments
            )
            observer(x)
            found = observer.get_qparams()
            scale, zero = found["scale"], found["zero_point"]
            return forward.quantize(x, scale, zero, arguments, dtype=FP8), scale

        return run

    call = "observer `memoryless_minmax`, then `quantize` of compressed-tensors, strategy"
    return [
        Adapter(f"llm-compressor {s}", "llmcompressor", f"{call} {s}", sides, of(s))
        for s, sides in _STRATEGIES.items()
    ]


def quanto() -> list[Adapter]:
    package = load("optimum.quanto")

    def of(axis: int | None) -> Callable[[torch.Tensor], Pair]:
        def run(x: torch.Tensor) -> Pair:
            qtype = package.qfloat8_e4m3fn
            scale = package.AbsmaxOptimizer()(x, qtype=qtype, axis=axis)
            codes = torch.ops.quanto.quantize_symmetric(x, dtype=FP8, axis=axis, scale=scale)
            return codes, scale

        return run

    call = "`AbsmaxOptimizer`, `quanto::quantize_symmetric`"
    return [
        Adapter("quanto axis 0", "optimum-quanto", f"{call}, axis 0", ROW, of(0)),
        Adapter("quanto per-tensor", "optimum-quanto", f"{call}, no axis", TENSOR, of(None)),
    ]


def modelopt() -> list[Adapter]:
    tensor = load("modelopt.torch.quantization.qtensor").FP8QTensor

    def of(**given: Any) -> Callable[[torch.Tensor], Pair]:
        def run(x: torch.Tensor) -> Pair:
            made, scales = tensor.quantize(x, **given)
            return made._quantized_data, scales

        return run

    call = "`FP8QTensor.quantize`"
    sizes = {-1: SIDE, -2: SIDE}
    return [
        Adapter(
            "modelopt", "nvidia-modelopt", f"{call}, block_sizes", BLOCK, of(block_sizes=sizes)
        ),
        Adapter("modelopt axis 0", "nvidia-modelopt", f"{call}, axis=0", ROW, of(axis=0)),
        Adapter("modelopt per-tensor", "nvidia-modelopt", call, TENSOR, of()),
    ]


def auto_round() -> list[Adapter]:
    """Scales as its rounding finds them, codes as its export packs them into a layer."""
    types = load("auto_round.data_type.fp8")
    export = load("auto_round.export.export_to_autoround.export_to_fp8")

    def run(x: torch.Tensor) -> Pair:
        _, scale, _ = types.quant_block_fp_sym(x, group_size=BLOCK)
        layer: Any = torch.nn.Linear(x.shape[1], x.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(x, requires_grad=False)
        layer.scale, layer.zp, layer.group_size = scale, None, BLOCK
        layer.bits, layer.act_bits = 8, 8
        model: Any = torch.nn.Sequential(layer)
        model.dtype = x.dtype
        export.pack_layer("0", model, "block_fp8")
        return model[0].weight, model[0].weight_scale_inv

    call = "`quant_block_fp_sym`, `export_to_fp8.pack_layer`"
    return [Adapter("auto-round block", "auto-round", call, BLOCK, run)]


def quark() -> list[Adapter]:
    """Its observers for scales, then what its export calls for codes.

    Its observer of blocks refuses by name: blocks are for checkpoints that are quantised already.
    """
    config = load("quark.torch.quantization.config.config").QTensorConfig
    types = load("quark.torch.quantization.config.type")
    observers = load("quark.torch.quantization.observer.observer")
    kernel = load("quark.torch.kernel")

    def of(observer: Any, scheme: Any, axis: int | None) -> Callable[[torch.Tensor], Pair]:
        def run(x: torch.Tensor) -> Pair:
            wanted = config(
                dtype=types.Dtype.fp8_e4m3,
                qscheme=scheme,
                observer_cls=observer,
                symmetric=True,
                scale_type=types.ScaleType.float,
                round_method=types.RoundType.half_even,
                is_dynamic=False,
                **({} if axis is None else {"ch_axis": axis}),
            )
            seen = observer(wanted)
            seen(x)
            scale, zero = seen._calculate_qparams()
            least, most = seen.quant_min, seen.quant_max
            half_even = types.RoundType.half_even.value
            codes = kernel.scaled_real_quantize(
                "fp8_e4m3", x, scale, zero, axis, None, least, most, half_even, scheme.value
            )
            return codes, scale

        return run

    call = "observer, `scaled_real_quantize`"
    schemes = types.QSchemeType
    kinds = (
        ("per-channel", observers.PerChannelMinMaxObserver, schemes.per_channel, ROW, 0),
        ("per-tensor", observers.PerTensorMinMaxObserver, schemes.per_tensor, TENSOR, None),
    )
    return [
        Adapter(f"quark {name}", "amd-quark", f"{name} {call}", sides, of(observer, scheme, axis))
        for name, observer, scheme, sides, axis in kinds
    ]


INSTALLED: Mapping[str, Loader] = {
    "transformers": transformers,
    "torchao": torchao,
    "compressed-tensors": compressed_tensors,
    "llmcompressor": llmcompressor,
    "optimum-quanto": quanto,
    "nvidia-modelopt": modelopt,
    "auto-round": auto_round,
    "amd-quark": quark,
}


def installed(distribution: str) -> tuple[list[Adapter], str]:
    """Return the rows of an installed distribution and its version.

    Raises:
        ImportError: it is not installed, or something that it needs is not.
    """
    version = importlib.metadata.version(distribution)
    return INSTALLED[distribution](), version


# --- functions out of a released wheel ------------------------------------------------------------
# Engines pin another torch and import a device at their top. The functions below need nothing
# but torch, so they are compiled out of the wheel's own source, to the letter.


def functions(
    read: Callable[[str], bytes],
    wanted: Mapping[str, tuple[str, ...]],
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Compile functions, and constants that they use, out of modules.

    Args:
        read: path of a module to its source.
        wanted: path of a module to the names in it.
        given: other names that they use.

    Raises:
        ImportError: one of them is not there.
    """
    names: dict[str, Any] = {"torch": torch, **vars(typing), **(given or {})}
    for path, listed in wanted.items():
        tree = ast.parse(read(path))
        tree.body = [node for node in tree.body if _defines(node) & set(listed)]
        missing = set(listed) - {name for node in tree.body for name in _defines(node)}
        if missing:
            raise ImportError(f"{path} has no {', '.join(sorted(missing))}")
        exec(compile(tree, path, "exec"), names)
    return SimpleNamespace(**{name: names[name] for listed in wanted.values() for name in listed})


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def in_wheel(wheel: Path) -> Callable[[str], bytes]:
    """Return a function that reads a member of a wheel.

    Raises (the function): ImportError, there is none.
    """

    def read(path: str) -> bytes:
        with zipfile.ZipFile(wheel) as archive:
            try:
                return archive.read(path)
            except KeyError:
                raise ImportError(f"{wheel.name} has no {path}") from None

    return read


def vllm(wheel: Path, name: str) -> list[Adapter]:
    utils = "vllm/model_executor/layers/quantization/utils"
    of = functions(
        in_wheel(wheel),
        {
            f"{utils}/fp8_utils.py": ("input_to_float8",),
            f"{utils}/quant_utils.py": ("scaled_quantize", "_normalize_quant_group_shape"),
        },
    )
    return [
        Adapter(
            f"{name} block",
            "vllm",
            "`scaled_quantize`",
            BLOCK,
            lambda x: of.scaled_quantize(x, BLOCK, FP8),
        ),
        Adapter(
            f"{name} per-tensor",
            "vllm",
            "`input_to_float8`",
            TENSOR,
            lambda x: of.input_to_float8(x, FP8),
        ),
    ]


def sglang(wheel: Path, name: str) -> list[Adapter]:
    utils = "sglang/srt/layers/quantization/fp8_utils.py"
    names = ("input_to_float8", "per_block_cast_to_fp8", "ceil_to_ue8m0")

    def align(x: int, y: int) -> int:
        return math.ceil(x / y) * y

    of = functions(
        in_wheel(wheel),
        {utils: names},
        # What these names are on every GPU that is no AMD one.
        {"fp8_dtype": FP8, "_is_fp8_fnuz": False, "align": align, "ceil_align": align},
    )
    rows = [
        Adapter(
            f"{name} block", "sglang", "`per_block_cast_to_fp8`", BLOCK, of.per_block_cast_to_fp8
        ),
        Adapter(f"{name} per-tensor", "sglang", "`input_to_float8`", TENSOR, of.input_to_float8),
    ]
    test, native = "sglang/test/test_block_fp8.py", "native_per_token_group_quant_fp8"
    try:
        group = getattr(functions(in_wheel(wheel), {test: (native,)}), native)
    except ImportError:  # in the older one only
        return rows
    call = f"`{native}` of its tests"
    return [*rows, Adapter(f"{name} 1x128", "sglang", call, (1, SIDE), lambda x: group(x, SIDE))]


def flashinfer(wheel: Path, name: str) -> list[Adapter]:
    einops = load("einops")
    given = {key: getattr(einops, key) for key in ("rearrange", "reduce", "repeat")}
    wanted = {"flashinfer/testing/utils.py": ("quantize_fp8",)}
    quantize = functions(in_wheel(wheel), wanted, given)

    def run(x: torch.Tensor) -> Pair:
        shape = -(-x.shape[0] // SIDE), -(-x.shape[1] // SIDE)
        codes, scales = quantize.quantize_fp8(x, shape, BLOCK, "K")
        return codes, scales

    return [Adapter(name, "flashinfer-python", "`testing.utils.quantize_fp8`", BLOCK, run)]


# The wheels that have a row: distribution, version, how its rows begin, adapters.
RELEASED: tuple[tuple[str, str, Callable[[Path, str], list[Adapter]]], ...] = (
    ("sglang", "0.4.8", sglang),
    ("sglang", "0.5.23", sglang),
    ("vllm", "0.9.1", vllm),
    ("flashinfer-python", "0.7.2.post1", flashinfer),
)


def released(
    folder: Path, distribution: str, version: str, rows: Callable[[Path, str], list[Adapter]]
) -> list[Adapter]:
    """Return the rows of a wheel in a folder.

    Raises:
        ImportError: it is not there, or not what it was.
    """
    wheels = sorted(folder.glob(f"{distribution.replace('-', '_')}-{version}-*.whl"))
    if not wheels:
        raise ImportError(f"no wheel of {distribution} {version} in {folder}")
    return rows(wheels[0], f"{distribution.removesuffix('-python')} {version}")
