#!/usr/bin/env bash
# Everything on a bare machine with Python: set up, check the style, run the tests.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# torch by itself and pinned: the version the tests were written with, and one download.
make_environment "torch==2.13.0"
make_environment --editable ".[test]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Three processes keep two cores busy; BLAS with threads of its own would be in their way.
OPENBLAS_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 3 "$@"
