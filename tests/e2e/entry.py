"""SGLang on a CPU, started by fp8ctl's entry module with what `launch` would not give it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from tests.e2e.conftest import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Cli

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class EntryModule:
    """A server to be.

    Attributes:
        cli: whose engine it is.
        model: the folder that it is started on.
        plan: the manifest that it is told, whatever the folder holds.
        run: its run folder, which is made.
    """

    cli: Cli
    model: Path
    plan: dict[str, Any]
    run: Path

    @contextlib.contextmanager
    def served(self, *more: str, **environment: str) -> Iterator[str]:
        """Start it, yield its address, and end all of it.

        Args:
            more: arguments of the engine.
            environment: variables beside its own.
        """
        self.run.mkdir()
        (self.run / "manifest.json").write_text(json.dumps(self.plan))
        port, log = free_port(), self.run / "server.log"
        argv = [
            *(str(self.cli.python), "-m", "fp8ctl.engines.hooks.sglang_server"),
            *("--model-path", str(self.model), "--host", "127.0.0.1", "--port", str(port)),
            *("--device", "cpu", "--attention-backend", "torch_native"),
            *("--sampling-backend", "pytorch", "--disable-cuda-graph"),
            *("--disable-custom-all-reduce", "--sleep-on-idle"),
            *("--max-total-tokens", "2048", "--max-running-requests", "8", *more),
        ]
        variables = {
            **self.cli.environment(),
            "PYTHONPATH": str(ROOT),
            "FP8CTL_RUN_DIR": str(self.run),
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "SPT_NOENV": "1",
            **environment,
        }
        with log.open("w") as file:
            server = subprocess.Popen(argv, cwd=self.run, env=variables, stdout=file, stderr=file)
        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
            while not _is_up(url):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until
                time.sleep(0.5)
            yield url
        finally:
            one = psutil.Process(server.pid)
            family = [one, *one.children(recursive=True)]
            for process in family:
                process.kill()
            psutil.wait_procs(family, timeout=60)
            server.wait(60)


def _is_up(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url + "/fp8ctl/state", trust_env=False).status_code == 200
    return False
