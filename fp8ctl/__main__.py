"""The process: runs the command line and turns what goes wrong into an exit code."""

from __future__ import annotations

from fp8ctl.cli import main

if __name__ == "__main__":
    main()
