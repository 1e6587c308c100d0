#!/usr/bin/env bash
# Installs all that the tests need, then runs every check of the project. Arguments go to pytest:
#   scripts/test.sh -k merge
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh --tests
export PATH="$PWD/.venv/bin:$PATH"

# Hundreds of processes import the same files: they are compiled once.
unset PYTHONDONTWRITEBYTECODE

ruff check .
ruff format --check .
# Each of these keeps one core busy, so they run beside each other.
mypy moe_trace & beside=($!)
if [ $# = 0 ]; then
    # The oldest transformers that setup.cfg admits; .venv has the newest, `make test-versions` runs the others.
    python scripts/test_versions.py --ci & beside+=($!)
    # The frameworks whose routers most people meet; `make test-hosts` runs all of them.
    python scripts/test_hosts.py --ci & beside+=($!)
fi
trap 'kill "${beside[@]}" 2>/dev/null || true' EXIT
for process in "${beside[@]}"; do wait "$process"; done
trap - EXIT
# One process a core and one more, since those that drive a browser often wait for it. Whole files each: files share
# their model, their TensorBoard, their browser. In the order of tests/conftest.py: files of minutes come first.
exec pytest -n $(($(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
