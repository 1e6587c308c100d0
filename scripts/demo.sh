#!/usr/bin/env bash
# Installs what is needed, profiles the small model that comes with the package, and prints the report.
# Arguments go to `moe-trace run`:
#   scripts/demo.sh --mode generate --device cuda
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

moe-trace run --model demo --steps 4 --out runs/demo --force "$@"
moe-trace report runs/demo

printf '\nSee it in TensorBoard, in the tab "MoE":\n  %s\n' ".venv/bin/moe-trace view runs/demo --open"
