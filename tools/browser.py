"""Looks at a page in a real Chromium: `python -m tools.browser PAGE.html --out DIR`.

Speaks the DevTools protocol over two pipes, with the standard library. `tests/check` asks it
what a page does there; as a command it makes the pictures of docs/check.md.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: Pictures of a page: name, width, height, whether dark.
VIEWS = (
    ("desktop-light", 1100, 1500, False),
    ("desktop-dark", 1100, 1500, True),
    ("phone", 360, 1500, False),
)
TIMEOUT = 60.0
# It reads commands from descriptor 3 and writes to 4. Both go out of the way first.
_PLACE = """
import fcntl, os, sys
high = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]]
for source, target in zip(high, (3, 4)):
    os.dup2(source, target, inheritable=True)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Browser:
    """A headless Chromium with one page.

    Attributes:
        process: of the browser.
        into: descriptor that takes our messages.
        out: descriptor that gives its.
        session: of the page.
        events: what happened, in order.
    """

    process: subprocess.Popen[bytes]
    into: int
    out: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0
    _rest: bytes = b""

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command, and return its result; events that come first are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(TIMEOUT)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, url: str, width: int = 1100, height: int = 900, *, dark: bool = False) -> float:
        """Open a page and wait until it has loaded; return the seconds that took."""
        self.view(width, height, dark=dark)
        self.events.clear()
        began = time.monotonic()
        self.call("Page.navigate", url=url)
        while not any(one.get("method") == "Page.loadEventFired" for one in self.events):
            self.events.append(self._read(TIMEOUT))
        # Two frames later all of it has been laid out and painted.
        frames = "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
        self.call("Runtime.evaluate", expression=frames, awaitPromise=True)
        return time.monotonic() - began

    def view(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window, and whether the system is dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page, as JSON types."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write what is seen as a PNG; `whole`: the page to its end."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def of(self, *methods: str) -> list[dict[str, Any]]:
        """Return the parameters of events of these names."""
        return [one["params"] for one in self.events if one.get("method") in methods]

    def _read(self, timeout: float) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.out], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self.out, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError("Chromium does not answer")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def started(program: str) -> Iterator[Browser]:
    """Start a Chromium with a profile of its own; afterwards both are gone."""
    theirs_in, into = os.pipe()
    out, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(prefix="fp8ctl-browser-", ignore_cleanup_errors=True) as home:
        argv = [
            *(program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={home}"),
            *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--hide-scrollbars", "--force-color-profile=srgb", "about:blank"),
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", _PLACE, str(theirs_in), str(theirs_out), *argv],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": home},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        browser = Browser(process, into, out)
        try:
            targets = browser.call("Target.getTargets")["targetInfos"]
            [page] = [one for one in targets if one["type"] == "page"]
            attached = browser.call(
                "Target.attachToTarget", targetId=page["targetId"], flatten=True
            )
            browser.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                browser.call(f"{domain}.enable")
            yield browser
        finally:
            browser.session = ""
            try:
                browser.call("Browser.close")
                process.wait(timeout=10)
            except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()
            os.close(into)
            os.close(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take pictures of a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at", default="", help="id of a section to begin with")
    parser.add_argument("--name", default="", help="put in front of the pictures' names")
    asked = parser.parse_args()
    program = find()
    if program is None:
        raise SystemExit(f"no Chromium here: {', '.join(NAMES)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    with started(program) as browser:
        for name, width, height, dark in VIEWS:
            browser.open(asked.page.absolute().as_uri(), width, height, dark=dark)
            if asked.at:
                browser.ask(f"document.getElementById({json.dumps(asked.at)}).scrollIntoView()")
            path = asked.out / f"{asked.name}{name}.png"
            browser.picture(path)
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
