"""The truth-first tests on other versions of transformers and torch; see test_versions.sh, which calls this.

An environment holds only what differs from .venv: its packages come first, and .venv's stand behind them.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import sysconfig
import time
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "versions.md"
CI = ("transformers==5.24.0", "transformers==5.0.0")
ALL = (
    "transformers==5.0.0",
    "transformers==5.5.4",
    "transformers==5.6.0",
    "transformers==5.17.0",
    "transformers==5.23.0",
    "transformers==5.24.0",
    "torch==2.9.1 transformers==5.23.0",
    "torch==2.14.1 transformers==5.24.0",
)
COLUMNS = ("Python", "torch", "transformers", "passed", "failed", "skipped", "minutes")
HEAD = """# Versions

What `setup.cfg` admits, tried: `tests/versions` compares counts with the experts' inputs, stages and padding
with the model's own inputs, figures of logits with the router's weights, compiled code with eager code, and
the trace with the calls. Written by `scripts/test_versions.sh`; a row is one environment.

"""


@dataclass(frozen=True)
class Row:
    """One environment: what was installed, and how its tests ended."""

    torch: str
    transformers: str
    passed: int
    failed: int
    skipped: int
    minutes: float

    def __str__(self) -> str:
        python = platform.python_version()
        figures = f"{self.passed} | {self.failed} | {self.skipped} | {self.minutes:.1f}"
        return f"| {python} | {self.torch} | {self.transformers} | {figures} |"


def main() -> int:
    """Run all that were asked for; returns 1 if one test failed anywhere."""
    parser = argparse.ArgumentParser(description="Run tests/versions on other versions.")
    parser.add_argument(
        "versions", nargs="*", help="what to install, such as 'torch==2.14.1 transformers==5.24.0'"
    )
    parser.add_argument("--ci", action="store_true", help=f"only {' and '.join(CI)}")
    arguments = parser.parse_args()
    wanted = arguments.versions or (CI if arguments.ci else ALL)
    rows = []
    for requirements in wanted:
        print(f"== {requirements}", flush=True)
        rows.append(run(environment(requirements)))
        print(rows[-1], flush=True)
    if not arguments.versions and not arguments.ci:
        head = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
        where = f"{os.cpu_count()} cores, no GPU, {date.today()}."
        TABLE.write_text(HEAD + "\n".join([head, *map(str, rows), "", where, ""]), "utf-8")
    return int(any(row.failed for row in rows))


def environment(requirements: str) -> Path:
    """The Python of an environment in which `requirements` are installed; made when it is missing."""
    folder = ROOT / ".versions" / requirements.replace(" ", "_").replace("==", "-")
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    venv.create(folder, with_pip=True, clear=True, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (own / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *requirements.split()]
    subprocess.run([str(part) for part in install], check=True)
    (folder / "ready").touch()
    return python


def run(python: Path) -> Row:
    """Run the tests there, and count them from pytest's own XML."""
    report = python.parents[1] / "report.xml"
    report.unlink(missing_ok=True)
    names = "import torch, transformers; print(torch.__version__.split('+')[0], transformers.__version__)"
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([python, "-c", names], env=variables, capture_output=True, text=True, check=True)
    torch_version, transformers_version = found.stdout.split()
    start = time.monotonic()
    options = ["-q", "-p", "no:cacheprovider", "--durations=0", "--durations-min=20", f"--junit-xml={report}"]
    subprocess.run([str(python), "-m", "pytest", *options, "tests/versions"], cwd=ROOT, env=variables)
    minutes = (time.monotonic() - start) / 60
    suite = next(iter(ElementTree.parse(report).getroot().iter("testsuite")))
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return Row(torch_version, transformers_version, tests - failed - skipped, failed, skipped, minutes)


if __name__ == "__main__":
    sys.exit(main())
