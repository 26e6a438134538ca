"""The process: runs the command line and turns what goes wrong into an exit code."""

from __future__ import annotations


def main() -> None:
    """Run fp8ctl; the console script and `python -m fp8ctl` both come here."""
    from fp8ctl.cli import app

    app()


if __name__ == "__main__":
    main()
