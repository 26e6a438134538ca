"""The command line: stubs that name options and hand over to a module.

No logic and no import of anything heavy: `fp8ctl --help` must cost little more
than `import typer` (tests/test_startup.py). The contract of commands, options
and exit codes is docs/commands.md, which a test compares with this file.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8ctl import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8ctl.render import Reporter

# UsageError, root of what the parser raises: Typer publishes its subclasses only.
_PARSER_ERROR: Any = typer.BadParameter.__base__

_ELSEWHERE = "df -h, or send the output to a file on another disk"

_commands: list[tuple[Callable[..., None], dict[str, Any]]] = []


def command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: make a function a command of fp8ctl, named after it or by `name`."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        named = {"name": body.__name__, **settings}
        _commands.append((body, named))
        return body

    return register


def build(only: str | None = None) -> typer.Typer:
    """Return the program.

    Args:
        only: the one command that will run; the others get a name and a first line
            and no options. Reading the options of all commands is a fifth of the
            time that `fp8ctl --help` takes, and of no use to it.
    """
    app = typer.Typer(
        name="fp8ctl",
        help="Turn on FP8 in vLLM 0.9.1 and SGLang 0.4.8, and prove that it is on.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for body, settings in _commands:
        if only is None or settings["name"] == only:
            app.command(**settings)(body)
        else:
            app.command(name=settings["name"], help=body.__doc__)(_without_options)
    return app


def main() -> None:
    """Run the command line of this process."""
    # What is not an option is the command: fp8ctl itself has no option with a value.
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        sys.exit(build(name)(standalone_mode=False))
    except _PARSER_ERROR as e:
        if name:
            sys.exit(_refuse(name, e.format_message()))
        if "--json" in sys.argv:
            sys.exit(_refuse("", "a command is missing"))
        e.show()  # no command at all: the help
        sys.exit(e.exit_code)
    except OSError as e:
        # A help or the version was printed: what a command raises never comes here.
        sys.exit(_lost(name, f"cannot write to stdout: {e.strerror}"))


def _lost(name: str, why: str) -> int:
    """Tell that stdout took nothing."""
    from fp8ctl.errors import NotPermittedError
    from fp8ctl.render import Reporter, forget

    forget(sys.stdout)
    error = NotPermittedError(why, hint=_ELSEWHERE)
    Reporter().fail(name, error)
    return error.exit_code


def _refuse(name: str, message: str) -> int:
    """Tell what the command line lacks or has too much of, in the form of any other error."""
    from fp8ctl.errors import UsageError
    from fp8ctl.render import Reporter

    words = sys.argv[1:]
    options = words[: words.index("--")] if "--" in words else words
    hint = f"fp8ctl {name} --help" if any(s["name"] == name for _, s in _commands) else "fp8ctl -h"
    error = UsageError(message.rstrip("."), hint=hint)
    Reporter(json_mode="--json" in options).fail(name, error)
    return error.exit_code


# typer reads these annotations at run time; so they are imported, not deferred.
Python = Annotated[
    Path | None, typer.Option("--python", help="Interpreter of the environment to work on.")
]
SitePackages = Annotated[
    Path | None, typer.Option("--site-packages", help="Its site-packages folder instead.")
]
Overlay = Annotated[
    Path | None, typer.Option("--overlay", help="Folder of a patched copy, in front of it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Backends = Annotated[
    list[str] | None, typer.Option("--backend", help="vllm or sglang; may be repeated.")
]
Backend = Annotated[str, typer.Option("--backend", help="vllm or sglang.")]
PatchIds = Annotated[list[str] | None, typer.Option("--patch", help="Patch id; may be repeated.")]
Mode = Annotated[str, typer.Option("--mode", help="block or per-tensor.")]
LaunchMode = Annotated[
    str | None, typer.Option("--mode", help="block (default), per-tensor or online.")
]
Model = Annotated[str, typer.Option("--model", help="A checkpoint folder or a Hub id.")]
OptionalModel = Annotated[
    str | None, typer.Option("--model", help="A checkpoint folder or a Hub id.")
]
Tp = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel size.")]
BlockSize = Annotated[
    str | None, typer.Option("--block-size", help="Block as N,K; chosen to fit if left out.")
]
OptionalMode = Annotated[str | None, typer.Option("--mode", help="block (default) or per-tensor.")]
OptionalTp = Annotated[
    int | None, typer.Option("--tp", min=1, help="Tensor-parallel size; default 1.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", help="Leave in 16 bits: a name, glob or re:...; may be repeated."),
]
Quantize = Annotated[
    list[str] | None,
    typer.Option("--quantize", help="Make FP8: a name, glob or re:...; may be repeated."),
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", help="Compute capability to serve on, or none; default 9.0."),
]
Scale = Annotated[
    str | None,
    typer.Option("--scale", help="Scales: fp32 (default), or ue8m0: powers of two, in FP32."),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="A manifest that `fp8ctl plan --out` wrote.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]
PrintDiff = Annotated[
    bool, typer.Option("--print-diff", help="Print the change to stdout as one git diff.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 8 on a warning.")]


def _run(command: str, json_mode: bool, body: Callable[[Reporter], dict[str, object]]) -> None:
    """Run a command's body and leave with its exit code."""
    from fp8ctl.errors import AbortedError, Fp8ctlError, NotPermittedError
    from fp8ctl.render import Reporter, StdoutError

    report = Reporter(json_mode=json_mode)
    error: Fp8ctlError
    try:
        report.finish(command, body(report))
    except Fp8ctlError as e:
        error = e
    except KeyboardInterrupt:
        error = AbortedError("interrupted")
    except StdoutError as e:
        error = NotPermittedError(str(e.strerror), hint=_ELSEWHERE)
    except Exception as e:
        if os.environ.get("FP8CTL_TRACEBACK"):
            raise
        error = Fp8ctlError(
            f"unexpected {type(e).__name__}: {e}",
            hint="FP8CTL_TRACEBACK=1 " + shlex.join(["fp8ctl", *sys.argv[1:]]),
        )
    else:
        return
    report.fail(command, error)
    raise typer.Exit(error.exit_code)


def _behind_dashes(words: list[str]) -> list[str]:
    """Return the engine's arguments; a word in front of `--` is none of them."""
    from fp8ctl.errors import UsageError

    if words and sys.argv[-len(words) - 1 :] != ["--", *words]:
        raise UsageError(
            f"unexpected argument {words[0]!r}: the engine's arguments go behind --",
            hint="fp8ctl launch --backend sglang -- --max-running-requests 8",
        )
    return words


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fp8ctl {__version__}")
        raise typer.Exit


def _without_options() -> None:
    raise AssertionError("built without this command")


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@command()
def doctor(
    python: Python = None,
    site_packages: SitePackages = None,
    overlay: Overlay = None,
    strict: Strict = False,
    json_: Json = False,
) -> None:
    """Say what is here, what is wrong and what to type next."""
    from fp8ctl import doctor as m

    _run(
        "doctor",
        json_,
        lambda r: m.run(
            r, python=python, site_packages=site_packages, front=overlay, strict=strict
        ),
    )


@command()
def install(
    engine: Annotated[str, typer.Argument(help="sglang or vllm.")],
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda.")] = None,
    dir_: Annotated[Path | None, typer.Option("--dir", help="Folder of the environment.")] = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Make a managed environment with the pinned engine."""
    from fp8ctl import install as m

    _run(
        "install",
        json_,
        lambda r: m.run(r, engine=engine, device=device, folder=dir_, dry_run=dry_run),
    )


@command()
def plan(
    model: Model,
    backend: Backend,
    mode: Mode = "block",
    tp: Tp = 1,
    block_size: BlockSize = None,
    keep: Keep = None,
    quantize_: Quantize = None,
    gpu: Gpu = None,
    scale: Scale = "fp32",
    out: Annotated[Path | None, typer.Option("--out", help="Write the manifest here.")] = None,
    snippet: Annotated[
        str | None, typer.Option("--snippet", help="Print what to paste into a trainer instead.")
    ] = None,
    json_: Json = False,
) -> None:
    """Say which tensors would be quantised, and why; needs no GPU."""
    from fp8ctl import planning as m

    _run(
        "plan",
        json_,
        lambda r: m.run(
            r,
            model=model,
            backend=backend,
            mode=mode,
            tp=tp,
            block_size=block_size,
            out=out,
            snippet=snippet,
            gpu=gpu,
            keep=keep or (),
            quantize=quantize_ or (),
            scale=scale,
        ),
    )


@command()
def patch(
    python: Python = None,
    site_packages: SitePackages = None,
    overlay: Overlay = None,
    backend: Backends = None,
    patch_: PatchIds = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the patches and their state.")
    ] = False,
    dry_run: DryRun = False,
    print_diff: PrintDiff = False,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Patch a file of another build of this version.")
    ] = False,
    allow_running: Annotated[
        bool, typer.Option("--allow-running", help="Go on although a server runs on it.")
    ] = False,
    json_: Json = False,
) -> None:
    """Apply the known patches to an installed engine."""
    from fp8ctl.patching import commands as m

    _run(
        "patch",
        json_,
        lambda r: m.patch(
            r,
            python=python,
            site_packages=site_packages,
            front=overlay,
            backends=backend,
            patch_ids=patch_,
            list_only=list_,
            dry_run=dry_run,
            print_diff=print_diff,
            allow_drift=allow_drift,
            allow_running=allow_running,
        ),
    )


@command()
def revert(
    python: Python = None,
    site_packages: SitePackages = None,
    overlay: Overlay = None,
    backend: Backends = None,
    patch_: PatchIds = None,
    dry_run: DryRun = False,
    print_diff: PrintDiff = False,
    allow_running: Annotated[
        bool, typer.Option("--allow-running", help="Go on although a server runs on it.")
    ] = False,
    json_: Json = False,
) -> None:
    """Put every byte of the engine back."""
    from fp8ctl.patching import commands as m

    _run(
        "revert",
        json_,
        lambda r: m.revert(
            r,
            python=python,
            site_packages=site_packages,
            front=overlay,
            backends=backend,
            patch_ids=patch_,
            dry_run=dry_run,
            print_diff=print_diff,
            allow_running=allow_running,
        ),
    )


@command()
def quantize(
    out: Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint.")],
    model: OptionalModel = None,
    plan_: PlanFile = None,
    mode: OptionalMode = None,
    block_size: BlockSize = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Fit it to vllm or sglang only.")
    ] = None,
    tp: OptionalTp = None,
    keep: Keep = None,
    quantize_: Quantize = None,
    gpu: Gpu = None,
    scale: Scale = None,
    verify: Annotated[
        str, typer.Option("--verify", help="Read the result again: auto, all, sample or off.")
    ] = "auto",
    python: Python = None,
    json_: Json = False,
) -> None:
    """Convert a 16-bit checkpoint to FP8."""
    from fp8ctl import quantizing as m

    _run(
        "quantize",
        json_,
        lambda r: m.run(
            r,
            model=model,
            out=out,
            mode=mode,
            block_size=block_size,
            backend=backend,
            tp=tp,
            python=python,
            plan_file=plan_,
            keep=keep or (),
            quantize=quantize_ or (),
            gpu=gpu,
            scale=scale,
            verify=verify,
        ),
    )


@command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def launch(
    ctx: typer.Context,
    backend: Backend,
    python: Python = None,
    site_packages: SitePackages = None,
    overlay: Overlay = None,
    model: OptionalModel = None,
    plan_: PlanFile = None,
    mode: LaunchMode = None,
    block_size: BlockSize = None,
    keep: Keep = None,
    quantize_: Quantize = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="Another method of the engine.")
    ] = None,
    torchao_config: Annotated[
        str | None, typer.Option("--torchao-config", help="A torchao configuration (SGLang).")
    ] = None,
    await_push: Annotated[
        bool, typer.Option("--await-push", help="Answer 503 until FP8 weights were pushed.")
    ] = False,
    trace: Annotated[
        str | None, typer.Option("--trace", help="MODULE:FUNCTION to trace once per worker.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port.")] = None,
    tp: OptionalTp = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return and leave it running.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="With --detach: wait until it is ready.")
    ] = True,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds until ready.")] = 600,
    check: Annotated[
        str | None,
        typer.Option(
            "--check", metavar="LEVEL", help="End with: live (default), weights or logprobs."
        ),
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="End without a check.")] = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Start a server in FP8; engine arguments go behind `--`."""
    from fp8ctl import launching as m

    _run(
        "launch",
        json_,
        lambda r: m.run(
            r,
            backend=backend,
            python=python,
            site_packages=site_packages,
            front=overlay,
            model=model,
            mode=mode,
            block_size=block_size,
            quantization=quantization,
            torchao_config=torchao_config,
            await_push=await_push,
            trace=trace,
            host=host,
            port=port,
            tp=tp,
            detach=detach,
            wait=wait,
            timeout=timeout,
            check=check,
            no_check=no_check,
            dry_run=dry_run,
            extra=_behind_dashes(ctx.args),
            plan_file=plan_,
            keep=keep or (),
            quantize=quantize_ or (),
        ),
    )


@command()
def check(
    url: Annotated[
        str, typer.Argument(help="Address of a server, such as http://127.0.0.1:30000.")
    ],
    model: OptionalModel = None,
    level: Annotated[
        str | None, typer.Option("--level", help="live (default), weights or logprobs.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", help="Write this server's log-probabilities to this file."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Compare with a file of --record.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--report", help="Write all of it as one HTML page.")
    ] = None,
    every: Annotated[
        float | None,
        typer.Option("--watch", metavar="SECONDS", min=0.1, help="Go on, with so long a pause."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="HOST:PORT", help="With --watch: tell Prometheus."),
    ] = None,
    json_: Json = False,
) -> None:
    """Say what a live server really serves."""
    from fp8ctl.check import command as m

    _run(
        "check",
        json_,
        lambda r: m.run(
            r,
            url=url,
            model=model,
            level=level,
            record=record,
            against=against,
            page=page,
            every=every,
            metrics=metrics,
        ),
    )


@command()
def push(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL", help="Addresses of servers of fp8ctl.")
    ],
    model: Model,
    via: Annotated[
        str, typer.Option("--via", help="How they travel: ipc (this host), nccl or disk.")
    ] = "ipc",
    version: Annotated[
        str | None,
        typer.Option("--version", help="Name of these weights in logs; default: the time."),
    ] = None,
    delta: Annotated[
        bool, typer.Option("--delta", help="Send only tensors that the servers do not hold.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="Append a JSON line a tensor to this file.")
    ] = None,
    in_flight: Annotated[
        str, typer.Option("--in-flight", help="Running requests: finish, abort or pause.")
    ] = "finish",
    bucket_size: Annotated[
        int, typer.Option("--bucket-size", min=1, help="MB of a transfer buffer; two are held.")
    ] = 512,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds of a request, and for running requests.")
    ] = 600.0,
    master: Annotated[
        str | None, typer.Option("--master", help="This host's address; for --via nccl.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where --via disk writes, for the servers.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="End with a check.")] = True,
    dry_run: DryRun = False,
    python: Python = None,
    json_: Json = False,
) -> None:
    """Send a checkpoint's weights to running servers, in FP8."""
    from fp8ctl import pushing as m

    _run(
        "push",
        json_,
        lambda r: m.run(
            r,
            urls=urls,
            model=model,
            via=via,
            version=version,
            delta=delta,
            record=record,
            in_flight=in_flight,
            bucket_size=bucket_size,
            timeout=timeout,
            master=master,
            folder=folder,
            check=check,
            dry_run=dry_run,
            python=python,
        ),
    )


@command(name="push-log")
def push_log(
    source: Annotated[
        str, typer.Argument(metavar="URL|FILE", help="A server, or a file of `push --record`.")
    ],
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option("--diff", metavar="V1 V2", help="Compare two versions instead."),
    ] = None,
    json_: Json = False,
) -> None:
    """Say which weights a server was sent when, and what differs."""
    from fp8ctl import history as m

    _run("push-log", json_, lambda r: m.run(r, source=source, versions=diff))


@command()
def ps(json_: Json = False) -> None:
    """List the servers that fp8ctl started."""
    from fp8ctl import server as m

    _run("ps", json_, m.run_ps)


@command()
def logs(
    name: Annotated[str, typer.Argument(help="Name of a server, see `fp8ctl ps`.")],
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="One worker's log.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows.")] = False,
    json_: Json = False,
) -> None:
    """Print the log of a server."""
    from fp8ctl import server as m

    _run("logs", json_, lambda r: m.run_logs(r, name=name, rank=rank, follow=follow))


@command()
def stop(
    name: Annotated[str | None, typer.Argument(help="Name of a server.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Stop every server of fp8ctl.")] = False,
    json_: Json = False,
) -> None:
    """Stop a server and every process of it."""
    from fp8ctl import server as m

    _run("stop", json_, lambda r: m.run_stop(r, name=name, everything=all_))


@command()
def bench(
    what: Annotated[
        str, typer.Argument(help="kernel: the bundled kernels; push: updates of a server.")
    ],
    url: Annotated[str | None, typer.Argument(metavar="URL", help="Of push: the server.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; of a push, where weights lie.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Of kernel: ieee, reciprocal, inverse-scale or ue8m0."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Of kernel: fewer and smaller tensors, less often.")
    ] = False,
    updates: Annotated[
        int | None,
        typer.Option("--updates", min=1, help="Of push: how many, behind the first; else 3."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Of push: the weights that it serves.")
    ] = None,
    via: Annotated[
        str | None, typer.Option("--via", help="Of push: ipc, nccl or disk; else ipc.")
    ] = None,
    bucket_size: Annotated[
        int | None,
        typer.Option("--bucket-size", min=1, help="Of push: MB of a transfer buffer; else 512."),
    ] = None,
    python: Python = None,
    json_: Json = False,
) -> None:
    """Measure the kernels beside a copy of as many bytes, or updates of a server."""
    from fp8ctl import bench as m

    _run(
        "bench",
        json_,
        lambda r: m.run(
            r,
            what=what,
            device=device,
            recipe=recipe,
            quick=quick,
            python=python,
            url=url,
            push={"updates": updates, "model": model, "via": via, "bucket_size": bucket_size},
        ),
    )


@command()
def demo(
    mode: Mode = "block",
    json_: Json = False,
) -> None:
    """Run the whole path on an embedded model: doctor to revert."""
    from fp8ctl import demo as m

    _run("demo", json_, lambda r: m.run(r, mode=mode))
