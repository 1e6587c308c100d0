#!/usr/bin/env bash
# Runs the truth-first tests (tests/versions) on other versions of Python, torch and transformers than the pinned
# ones, each in an environment of its own. They are kept in ~/.cache/moe_trace/versions, some gigabytes each where
# they hold a torch.
#   scripts/test_versions.sh                 all, and writes the table docs/versions.md
#   scripts/test_versions.sh --ci            the oldest transformers; .venv holds the newest
#   scripts/test_versions.sh transformers==5.6.0 'python==3.12 torch==2.14.1 transformers==5.24.0'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
exec .venv/bin/python scripts/test_versions.py "$@"
