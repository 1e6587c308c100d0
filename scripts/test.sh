#!/usr/bin/env bash
# Installs all that the tests need, then runs every check of the project. Arguments go to pytest:
#   scripts/test.sh -k merge
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh --tests
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy moe_trace
# The oldest transformers that setup.cfg admits; .venv has the newest, `make test-versions` runs the others.
if [ $# = 0 ]; then python scripts/test_versions.py --ci; fi
# The frameworks whose routers most people meet; `make test-hosts` runs all of them.
if [ $# = 0 ]; then python scripts/test_hosts.py --ci; fi
# One process a core, whole files each: files share their model, their TensorBoard, their browser.
exec pytest -n auto --maxprocesses 4 --dist loadfile "$@"
