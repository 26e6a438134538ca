#!/bin/sh
# Repeats on this machine what docs/evidence/ tells of GPUs, in one command:
#
#     sh tests/gpu/run.sh [--python ENGINE_PYTHON] [--out FOLDER] [LEG...]
#
# ENGINE_PYTHON has vLLM 0.9.1, SGLang 0.4.8 or both. Without a GPU or an engine the legs that
# want it are skipped with the reason, and that is exit 0. fp8ctl runs in .venv, or in $PYTHON.
set -eu
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
if ! "$PYTHON" -c 'import fp8ctl, typer, httpx, psutil' 2>/dev/null; then
    echo "skip: $PYTHON has not what fp8ctl needs: make test, or PYTHON=/path/to/python"
    exit 0
fi
exec "$PYTHON" -m tests.gpu "$@"
