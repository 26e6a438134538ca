"""Doctor's rules about what is around an engine: packages, GPUs, the caller's shell.

Pure but for one file that is read (triton's cache module).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8ctl.environment import install_hint
from fp8ctl.findings import Facts, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.hardware import Gpu


def packages(facts: Facts) -> Iterator[Finding]:
    """Judge the versions of what the engines import."""
    held, pip = facts.environment.packages, facts.pip
    sglang, vllm = facts.has("sglang"), facts.has("vllm")
    if not sglang and not vllm:
        return
    torch = held.get("torch")
    if facts.environment.python is None and torch is None:
        # A bare folder may be one of several on somebody's path.
        yield Finding("torch", "torch", "info", "not in this folder, and no interpreter is known")
        return
    if torch is None:
        yield Finding("torch", "torch", "fail", "torch is not installed", f"{pip} torch==2.7.1")
    else:
        gpu, build = bool(facts.machine.gpus), facts.environment.cuda
        if gpu and torch.endswith("+cpu"):
            yield Finding(
                "torch",
                "torch",
                "warn",
                f"torch {torch} is a CPU build, and this machine has a GPU",
                install_hint("sglang" if sglang else "vllm", stays=True),
            )
        elif gpu and not torch.startswith("2.7."):
            yield Finding(
                "torch",
                "torch",
                "warn",
                f"torch {torch}; the engines' CUDA extensions were built for torch 2.7",
                f"{pip} torch==2.7.1",
            )
        else:
            yield Finding(
                "torch", "torch", "ok", f"torch {torch}{f', CUDA {build}' if build else ''}"
            )
    if sglang:
        yield from _triton(facts)
        if facts.machine.gpus and held.get("sgl-kernel") != "0.1.9":
            yield Finding(
                "sgl-kernel",
                "sgl-kernel",
                "fail",
                f"sgl-kernel is {held.get('sgl-kernel', 'missing')}, SGLang 0.4.8 needs 0.1.9",
                f"{pip} --no-deps sgl-kernel==0.1.9",
            )
    yield from _transformers(held.get("transformers"), pip, sglang=sglang)
    numpy = held.get("numpy")
    if numpy and _release(numpy) >= (2, 3):
        yield Finding(
            "numpy",
            "numpy",
            "warn",
            f"numpy {numpy} is newer than these engines were made for (below 2.3)",
            f'{pip} "numpy<2.3"',
        )


def _triton(facts: Facts) -> Iterator[Finding]:
    version = facts.environment.packages.get("triton")
    fix = f"{facts.pip} --no-deps triton==3.3.1"
    if version is None:
        yield Finding(
            "triton", "triton", "fail", "triton is missing, and SGLang imports it on a CPU too", fix
        )
        return
    # sglang/srt/utils.py imports it; read rather than guessed from the version.
    module = facts.environment.site_packages / "triton" / "runtime" / "cache.py"
    try:
        source = module.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    if "def default_cache_dir" in source:
        yield Finding("triton", "triton", "ok", f"triton {version}")
    else:
        yield Finding(
            "triton",
            "triton",
            "fail",
            f"triton {version} has no triton.runtime.cache.default_cache_dir, "
            "which SGLang 0.4.8 imports; 3.3.1 has it",
            fix,
        )


def _transformers(version: str | None, pip: str, *, sglang: bool) -> Iterator[Finding]:
    if version is None:
        yield Finding(
            "transformers",
            "transformers",
            "fail",
            "transformers is not installed",
            f"{pip} transformers==4.52.3",
        )
    elif sglang and version != "4.52.3":
        yield Finding(
            "transformers",
            "transformers",
            "warn",
            f"transformers {version}, SGLang 0.4.8 pins 4.52.3",
            f"{pip} transformers==4.52.3",
        )
    elif _release(version) >= (4, 54):
        # transformers 4.54 brings a model type `aimv2`, which vLLM 0.9.1 registers
        # itself, without exist_ok (transformers_utils/configs/ovis.py:76).
        yield Finding(
            "transformers",
            "transformers",
            "fail",
            f"transformers {version} is too new for vLLM 0.9.1, which needs 4.51.1 to 4.53",
            f"{pip} transformers==4.52.3",
        )
    else:
        yield Finding("transformers", "transformers", "ok", f"transformers {version}")


def gpus(facts: Facts) -> Iterator[Finding]:
    """Judge the GPUs and their driver."""
    machine = facts.machine
    if machine.problem:
        yield Finding(
            "driver", "driver", "warn", f"a driver is here, but {machine.problem}", "nvidia-smi"
        )
    elif not machine.gpus:
        words = "none from NVIDIA; SGLang runs on the CPU with the patch cpu-fp8"
        if facts.has("vllm"):
            words += "; vLLM's released wheel needs a GPU"
        yield Finding("gpu", "GPU", "info", words)
        return
    built, runs = facts.environment.cuda, machine.cuda
    if built and runs and int(built.split(".")[0]) > runs[0]:
        yield Finding(
            "driver",
            "driver",
            "fail",
            f"driver {machine.driver} runs CUDA {runs[0]}.{runs[1]}, torch was built for {built}",
            "install a newer driver",
        )
    for index, gpu in enumerate(machine.gpus):
        yield _gpu(facts, index, gpu)
    if len({g.capability for g in machine.gpus}) > 1:
        yield Finding(
            "gpu-mixed",
            "GPU",
            "warn",
            "GPUs of several kinds; kernels are chosen by the first",
            "export CUDA_VISIBLE_DEVICES=0",
        )
    if facts.has("sglang"):
        yield Finding(
            "int8dq",
            "SGLang torchao",
            "info",
            "--torchao-config int8dq dies while CUDA graphs are captured; "
            "fp8ctl launch adds --disable-cuda-graph for it",
        )
        if any(gpu.capability == (9, 0) for gpu in machine.gpus):
            yield from _deep_gemm(facts)


def _deep_gemm(facts: Facts) -> Iterator[Finding]:
    """Tell who multiplies blocks, where it makes them slower than what they came from.

    `sglang/srt/layers/quantization/deep_gemm_wrapper/configurer.py`; docs/evidence has the figures.
    """
    setting = facts.variables.get("SGL_ENABLE_JIT_DEEPGEMM")
    if setting and not _true(setting):
        why, fix = f"SGL_ENABLE_JIT_DEEPGEMM={setting}", "unset SGL_ENABLE_JIT_DEEPGEMM"
    elif not (facts.environment.site_packages / "deep_gemm").is_dir():
        why = "sgl-kernel's DeepGEMM is missing"
        fix = f"{facts.pip} --force-reinstall --no-deps sgl-kernel==0.1.9"
    else:
        return
    yield Finding(
        "deep-gemm",
        "DeepGEMM",
        "warn",
        f"{why}: SGLang multiplies blocks by Triton, slower than 16 bits "
        "(seen on an H100: 0.74 to 0.91 of its tokens a second); --mode per-tensor is not affected",
        fix,
    )


def _gpu(facts: Facts, index: int, gpu: Gpu) -> Finding:
    """Judge one GPU by its compute capability, under the kernels of the two releases."""
    capability = gpu.capability
    check = f"GPU {index}"
    if capability is None:
        return Finding(
            "gpu", check, "warn", f"{gpu.name} does not tell its capability", "nvidia-smi"
        )
    name = f"{gpu.name}, compute capability {capability[0]}.{capability[1]}"
    data: dict[str, object] = {"name": gpu.name, "capability": list(capability)}
    if capability < (8, 0):
        # Fp8Config.get_min_capability is 80 in both engines.
        return Finding(
            "gpu",
            check,
            "fail",
            f"{name}: FP8 needs 8.0 in both engines, and 8.9 for FP8 arithmetic",
            "use a GPU of compute capability 8.9 or 9.0",
            data,
        )
    if capability < (8, 9):
        return Finding(
            "gpu",
            check,
            "warn",
            f"{name}: no FP8 arithmetic below 8.9, weights only (Marlin); "
            "torchao's fp8wo and fp8dq do not run",
            "use a GPU of compute capability 8.9 or 9.0",
            data,
        )
    if capability[0] == 12:
        fix = "use a GPU of compute capability 8.9 or 9.0"
        if facts.has("vllm"):
            fix = f"fp8ctl patch --backend vllm --patch disable-cutlass-fp8{facts.target}"
        return Finding(
            "gpu",
            check,
            "warn",
            f"{name}: these releases have no CUTLASS FP8 kernels for it (block FP8 came later)",
            fix,
            data,
        )
    if capability[0] == 10 and facts.has("sglang"):
        return Finding(
            "gpu",
            check,
            "warn",
            f"{name}: DeepGEMM wants power-of-two scales there, FP32 scales give wrong numbers",
            "export SGL_ENABLE_JIT_DEEPGEMM=0",
            data,
        )
    return Finding("gpu", check, "ok", name, None, data)


def variables(facts: Facts) -> Iterator[Finding]:
    """Judge settings of the caller's shell that change what an engine does."""
    set_ = {k: v for k, v in facts.variables.items() if v}
    gpu = bool(facts.machine.gpus)
    rules: list[tuple[str, bool, str]] = [
        (
            "PYTHONPYCACHEPREFIX",
            True,
            "compiled files lie elsewhere, and a patch cannot drop the stale ones; "
            "only servers of `fp8ctl launch` do without them",
        ),
        (
            "VLLM_USE_V1",
            facts.has("vllm") and set_.get("VLLM_USE_V1") == "0",
            "fp8ctl works with vLLM's V1 engine",
        ),
        (
            "VLLM_TEST_FORCE_FP8_MARLIN",
            facts.has("vllm") and _true(set_.get("VLLM_TEST_FORCE_FP8_MARLIN")),
            "forces weight-only FP8: activations stay in 16 bits",
        ),
        (
            "SGLANG_FORCE_FP8_MARLIN",
            facts.has("sglang") and _true(set_.get("SGLANG_FORCE_FP8_MARLIN")),
            "forces weight-only FP8: activations stay in 16 bits",
        ),
        (
            "SGLANG_USE_CPU_ENGINE",
            facts.has("sglang") and gpu and _true(set_.get("SGLANG_USE_CPU_ENGINE")),
            "sends SGLang to the CPU, and this machine has a GPU",
        ),
    ]
    for name, applies, why in rules:
        if name in set_ and applies:
            yield Finding("variable", name, "warn", f"{name}={set_[name]}: {why}", f"unset {name}")


def _true(value: str | None) -> bool:
    return (value or "").strip().lower() in ("1", "true")


def _release(version: str) -> tuple[int, ...]:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version).release
    except InvalidVersion:
        return (0,)
