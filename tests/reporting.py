"""A reporter whose words a test can read."""

from __future__ import annotations

import io

from fp8ctl.render import Reporter


def reporter(*, json_mode: bool = False) -> tuple[Reporter, io.StringIO, io.StringIO]:
    """Return a reporter, and what it writes to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    return Reporter(json_mode=json_mode, out=out, err=err), out, err
