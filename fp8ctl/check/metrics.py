"""`check --watch --metrics`: the last round, as Prometheus reads it.

`Rounds` counts and writes the text, pure; `serving` answers GET /metrics at an address of
choice from a thread. Called by `watch`.
"""

from __future__ import annotations

import contextlib
import errno
import http.server
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fp8ctl.check.verdict import VERDICTS
from fp8ctl.errors import BusyError, NotPermittedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PATH: Final = "/metrics"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
LOOPBACK: Final = "127.0.0.1"
#: The verdict's label where no word fits, as after a live level without a fault.
NONE: Final = "none"
#: Seconds for a client to say what it wants.
_PATIENCE: Final = 5.0

#: Samples: their labels and values; what is not known has none.
_Samples = list[tuple[dict[str, str], float]]


@dataclass
class Rounds:
    """What the rounds of a watch have found; safe to be asked from another thread.

    Attributes:
        server: the address that is watched.
    """

    server: str
    _counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("ok", "failed", "not visible", "skipped"), 0)
    )
    _last: Mapping[str, Any] = field(default_factory=dict)
    _ended: float = 0.0
    _ok: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, data: Mapping[str, Any], result: str, ended: float) -> None:
        """Take a round in.

        Args:
            data: the document of `levels`.
            result: ok, failed, not visible, or skipped: an update was on its way.
            ended: seconds since the epoch.
        """
        with self._lock:
            self._counts[result] += 1
            if result == "skipped":
                return
            self._last, self._ended, self._ok = data, ended, result == "ok"

    def text(self) -> str:
        """Return all metrics in the text format."""
        with self._lock:
            counts, last, ended, ok = dict(self._counts), self._last, self._ended, self._ok
        lines = _family(
            self.server,
            "checks_total",
            "counter",
            "Rounds by result; skipped: an update was on its way.",
            [({"result": name}, float(count)) for name, count in counts.items()],
        )
        if not last:
            return "\n".join([*lines, ""])
        verdict = last["verdict"] or NONE
        live: Mapping[str, Any] = last["live"].get("facts") or {}
        latencies = [
            ({"request": name}, _value(live.get(key)))
            for name, key in (("chat", "latency_s"), ("generation", "generation_s"))
        ]
        counted: Mapping[str, Any] = last["weights"].get("counts") or {}
        tensors = [({"found": name}, _value(count)) for name, count in counted.items()]
        for name, kind, text, samples in (
            ("check_ok", "gauge", "1 where the last round found no fault.", [({}, float(ok))]),
            (
                "check_verdict",
                "gauge",
                "The last verdict: 1 for its word, 0 for the others.",
                [({"verdict": word}, float(word == verdict)) for word in (*VERDICTS, NONE)],
            ),
            (
                "check_last_timestamp_seconds",
                "gauge",
                "When the last round ended.",
                [({}, ended)],
            ),
            (
                "check_duration_seconds",
                "gauge",
                "What the last round took.",
                [({}, _value(last["seconds"]))],
            ),
            (
                "check_latency_seconds",
                "gauge",
                "Until the server had answered one request of the check.",
                latencies,
            ),
            ("check_tensors", "gauge", "Tensors by how they compare with the source.", tensors),
            (
                "check_logprob_mean_abs_difference",
                "gauge",
                "Mean absolute difference of log-probabilities from the hypothesis that fits.",
                [({}, _mean_abs(last["logprobs"]))],
            ),
        ):
            known = [(labels, value) for labels, value in samples if value is not None]
            if known:
                lines += _family(self.server, name, kind, text, known)
        return "\n".join([*lines, ""])


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; a port alone is loopback's, port 0 is any free one.

    Raises:
        UsageError: it is neither.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or LOOPBACK
    sound = port.isascii() and port.isdigit() and int(port) <= 0xFFFF
    if not sound or any(one.isspace() or one in "/@[]" for one in host):
        raise UsageError(
            f"--metrics {text!r} is not HOST:PORT such as {LOOPBACK}:9464",
            hint=f"--metrics {LOOPBACK}:9464",
        )
    return host, int(port)


@contextlib.contextmanager
def serving(text: str, tell: Callable[[], str]) -> Iterator[str]:
    """Answer GET /metrics until the end of the block; yield the address.

    Args:
        text: HOST:PORT.
        tell: returns the metrics; called in a thread of its own.

    Raises:
        UsageError: it is no address, or none of this machine.
        BusyError: the port is taken.
        NotPermittedError: it is not for this user.
    """
    host, port = parse_address(text)
    server = _listen(host, port, tell)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{shown}:{server.server_address[1]}{PATH}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # Who hangs on at the end must not keep the command.
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""


def _listen(host: str, port: int, tell: Callable[[], str]) -> _Server:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = _PATIENCE

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == PATH
            body = (tell() if found else f"see {PATH}\n").encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", CONTENT_TYPE if found else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

        def version_string(self) -> str:
            return "fp8ctl"

    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        kind = type("Server", (_Server,), {"address_family": family})
        made: _Server = kind(address[:2], Handler)
        return made
    except OSError as e:
        raise _refused(host, port, e) from e


def _refused(host: str, port: int, error: OSError) -> Exception:
    at = f"--metrics {host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return BusyError(
            f"{at}: the port is taken", hint=f"--metrics {host}:0 takes a free one",
            data={"host": host, "port": port},
        )  # fmt: skip
    if error.errno in {errno.EACCES, errno.EPERM}:
        return NotPermittedError(f"{at}: {error.strerror}", hint=f"--metrics {host}:9464")
    return UsageError(
        f"{at} is no address of this machine: {error.strerror}",
        hint=f"--metrics {LOOPBACK}:{port}",
    )


def _mean_abs(told: Mapping[str, Any]) -> float | None:
    hypotheses = told.get("hypotheses")
    found = hypotheses.get(told.get("fits")) if isinstance(hypotheses, dict) else None
    return _value(found.get("mean_abs")) if isinstance(found, dict) else None


def _value(value: Any) -> float | None:
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if sound else None


def _family(
    server: str,
    name: str,
    kind: str,
    text: str,
    samples: Sequence[tuple[Mapping[str, str], float | None]],
) -> list[str]:
    """Return one metric with its samples, each with the server as a label."""
    full = f"fp8ctl_{name}"
    lines = [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
    for labels, value in samples:
        pairs = {"server": server, **labels}
        inside = ",".join(f'{key}="{_label(one)}"' for key, one in pairs.items())
        lines.append(f"{full}{{{inside}}} {value!r}")
    return lines


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
