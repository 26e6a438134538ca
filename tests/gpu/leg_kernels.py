"""The kernels, measured and compared bit for bit; and the tests of the project that want a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.gpu.leg import ROOT, FailedError

if TYPE_CHECKING:
    from tests.gpu.host import Host


def run(host: Host) -> None:
    """Do the leg."""
    leg = host.leg

    def bench() -> None:
        with leg.step("bench kernel") as seen:
            quick = ("--device", "cpu", "--quick") if host.device == "cpu" else ()
            python = ("--python", str(host.torch_python))
            data = host.data("bench", "kernel", *quick, *python, limit=240)
            seen |= {"rows": len(data["rows"]), "best_copy_gb_s": data["best_copy_gb_s"]}
            seen["seen"] = f"{len(data['rows'])} rows, all equal to the reference: {data['ok']}"

    def tests() -> None:
        with leg.step("pytest -m gpu") as seen:
            argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
            # Packages of the host warn of what is none of ours.
            argv += ["-o", "filterwarnings=default", "-o", "timeout=100"]
            done = leg.run([host.torch_python, *argv], host.env | {"PYTHONPATH": str(ROOT)}, 300)
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            seen["seen"] = lines[-1] if lines else done.stderr[-300:]
            if done.returncode not in (0, 5):
                raise FailedError(f"exit {done.returncode}: {seen['seen']}")

    leg.job("bench", bench)
    leg.job("tests", tests)
