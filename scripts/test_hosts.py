"""Test the routers of other frameworks, each framework in its own folder, and write docs/frameworks.md.

    python scripts/test_hosts.py                  # all frameworks
    python scripts/test_hosts.py torchtitan       # some of them
    python scripts/test_hosts.py --ci             # the quick ones, as in `scripts/test.sh`

Packages are installed without their dependencies and come before those of .venv on the path, so that torch
stays as it is. This file lists what else a framework's routers import. Folders are kept in the user's cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "frameworks.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_trace" / "hosts"
_GOOGLE = "google-api-core google-cloud-storage google-auth google-cloud-core google-resumable-media"
_MORE = "google-crc32c googleapis-common-protos proto-plus protobuf cachetools pyasn1 pyasn1_modules"
_AMAZON = "boto3 botocore s3transfer jmespath python-dateutil six requests cryptography cffi pycparser"


@dataclass(frozen=True)
class Host:
    """A framework: its package, further requirements, test file, and the texts of its table row."""

    package: str
    needs: str
    tests: str
    routers: str
    oracle: str


HOSTS = {
    "torchtitan": Host(
        "torchtitan==0.3.0",
        "spmd_types torch_checkpointing tyro docstring_parser typeguard einops",
        "torchtitan",
        "`TokenChoiceTopKRouter` in its `MoE`; eager, recomputed, compiled per block by its `apply_compile`",
        "its buffer `tokens_per_expert_E`; a bias that forces the choice",
    ),
    "olmo-core": Host(
        "ai2-olmo-core==3.0.0",
        f"cached_path omegaconf antlr4-python3-runtime dataclass-extensions bettermap dill {_GOOGLE} {_MORE} "
        f"{_AMAZON}",
        "olmo_core",
        "`MoELinearRouter`, `MoERouterV2`, with jitter and uniform assignment; experts of the test, theirs "
        "need Triton",
        "the sizes that its router hands the experts; `batch_size_per_expert`",
    ),
    "automodel": Host(
        "nemo-automodel==0.7.0",
        "torchao torchdata",
        "automodel",
        "`Gate` in its `MoE`: softmax, sigmoid, bias, groups, masked padding",
        "its `_last_expert_load`; weights that force the choice",
    ),
    "megatron-core": Host(
        "megatron-core==0.16.1",
        "",
        "megatron",
        "`TopKRouter` in its `MoELayer` of `SequentialMLP`: capacity, padding, groups, bias, noise",
        "rows that enter each expert; `local_tokens_per_expert`",
    ),
    "deepspeed": Host(
        "deepspeed==0.19.8",
        "hjson py-cpuinfo msgpack ninja pydantic pydantic-core annotated-types typing-inspection einops "
        "psutil",
        "deepspeed",
        "`TopKGate` of 1, 2 and 4 experts in its `MOELayer`, both of its forms: capacity, noise",
        "the routes that capacity kept",
    ),
    "trl": Host(
        "trl==1.16.0",
        "datasets xxhash dill multiprocess",
        "trl",
        "`OlmoeTopKRouter` of transformers 5, trained by its `SFTTrainer`",
        "the index that the experts receive",
    ),
    "transformers 4": Host(
        "transformers==4.57.6",
        "tokenizers==0.22.2 huggingface_hub==0.36.0",
        "transformers_4",
        "OLMoE, FlexOlmo, Mixtral, Qwen2-MoE, Qwen3-MoE, Phi-MoE, MiniMax, ERNIE 4.5, HunYuan, DeepSeek-V2 "
        "and V3, GLM-4, dots1, GPT-OSS",
        "rows that enter each expert; the same OLMoE in transformers 5; ids that the experts receive",
    ),
}
CI = ("transformers 4", "torchtitan")
HEAD = """| package | torch | routers | held against | passed | failed |
| --- | --- | --- | --- | ---: | ---: |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="*", choices=[[], *HOSTS], default=[], metavar="HOST")
    parser.add_argument("--ci", action="store_true", help=f"only {' and '.join(CI)}")
    arguments = parser.parse_args()
    chosen = arguments.hosts or list(CI if arguments.ci else HOSTS)
    rows = [_row(HOSTS[name], name) for name in chosen]
    print("\n".join(rows))
    failed = any(not row.endswith(" 0 |") for row in rows)
    if len(chosen) == len(HOSTS) and not failed:
        text = TABLE.read_text(encoding="utf-8").partition(HEAD)[0]
        TABLE.write_text(text + HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    return int(failed)


def _row(host: Host, name: str) -> str:
    folder = CACHE / name.replace(" ", "-")
    _install(host, folder)
    report = folder / "report.xml"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    tests = f"tests/hosts/test_host_{host.tests}.py"
    subprocess.run([*command, tests, f"--junitxml={report}"], cwd=ROOT, env=environment)
    suite = ElementTree.parse(report).getroot()[0]
    total, failed, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "skipped"))
    failed += int(suite.attrib["errors"])
    torch = next(d.version for d in distributions() if d.name == "torch")
    cells = (host.package, torch, host.routers, host.oracle, total - failed - skipped, failed or skipped)
    return f"| {' | '.join(map(str, cells))} |"


def _install(host: Host, folder: Path) -> None:
    done = folder / "installed"
    wanted = f"{host.package} {host.needs}"
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--no-compile", "--no-build-isolation", "--target", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *wanted.split()],
        check=True,
        env=os.environ | {"DS_BUILD_OPS": "0"},
    )
    done.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
