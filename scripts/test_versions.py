"""Run tests/versions on other versions of Python, torch and transformers; called by test_versions.sh.

An environment contains the packages that differ from .venv. They come first on the path, followed by .venv.
With another Python it contains everything. Environments are kept in the user's cache, because torch takes
some gigabytes, and serve every checkout.
"""

from __future__ import annotations

import argparse
import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "versions.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_trace" / "versions"
OLDEST = "torch==2.9.1 transformers==5.0.0"
CI = ("transformers==5.0.0",)
"""The newest transformers is in .venv. A torch with CUDA, such as the oldest, is a download of 6 GB."""
ALL = (
    OLDEST,
    "transformers==5.0.0",
    "transformers==5.5.4",
    "transformers==5.6.0",
    "transformers==5.24.0",
    "torch==2.14.1 transformers==5.24.0",
    "torch==2.15.0 transformers==5.24.0",
    "python==3.12 torch==2.14.1 transformers==5.24.0",
    "python==3.13 torch==2.14.1 transformers==5.24.0",
)
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "pandas", "setuptools")
COLUMNS = ("Python", "torch", "transformers", "run on", "passed", "failed", "skipped", "minutes")
HEAD = """# Versions

The range that `setup.cfg` admits is what passes here, its ends included. `tests/versions` compares what
moe_trace records with what it did not compute itself: counts with the experts' inputs and with an experiment
on their weights, stages and padding with the model's inputs, figures of logits with the routers' weights,
compiled code with eager code, and the trace with the calls. A profiler that starts must have nothing compiled
again. `scripts/test_versions.sh` writes this table; a row is one environment.

torch 2.15 needs nothing beyond its own wheel. Not run on any version: a GPU with the profiler's backend
`cupti_monitor`; that ranges are opened where it listens is tested without one.

"""


@dataclass(frozen=True)
class Row:
    """One environment: its installed versions and test results."""

    versions: tuple[str, ...]
    passed: int
    failed: int
    skipped: int
    minutes: float

    def __str__(self) -> str:
        figures = (str(self.passed), str(self.failed), str(self.skipped), f"{self.minutes:.1f}")
        return f"| {' | '.join((*self.versions, *figures))} |"


def main() -> int:
    """Run the requested environments; return 1 if any test failed."""
    parser = argparse.ArgumentParser(description="Run tests/versions on other versions.")
    parser.add_argument(
        "versions",
        nargs="*",
        help="requirements of an environment, such as 'python==3.12 torch==2.14.1 transformers==5.24.0'",
    )
    parser.add_argument("--ci", action="store_true", help=f"only {' and '.join(CI)}")
    arguments = parser.parse_args()
    rows = []
    for requirements in arguments.versions or (CI if arguments.ci else ALL):
        print(f"== {requirements}", flush=True)
        python = environment(requirements)
        run(python)
        rows.append(last_row(python))
        print(rows[-1], flush=True)
    if not arguments.ci:
        write_table()
    return int(any(row.failed or not row.passed for row in rows))


def write_table() -> None:
    """Write the last run of each environment of the matrix; an environment without a run has no row."""
    pythons = [folder_of(requirements) / "bin" / "python" for requirements in ALL]
    rows = [last_row(python) for python in pythons if report_of(python).exists()]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(str, rows)]
    where = f"{os.cpu_count()} cores, no GPU."
    TABLE.write_text(HEAD + "\n".join([*lines, "", where, ""]), "utf-8")


def folder_of(requirements: str) -> Path:
    """Return the folder of the environment of these requirements."""
    own = f"python=={sys.version_info.major}.{sys.version_info.minor}"
    words = requirements.split() if requirements.startswith("python==") else [own, *requirements.split()]
    return CACHE / "_".join(words).replace("==", "-")


def report_of(python: Path) -> Path:
    return python.parents[1] / "report.xml"


def environment(requirements: str) -> Path:
    """Return the Python of an environment with `requirements`, creating it if it is missing.

    Raises:
        SystemExit: if the Python is missing or a package cannot be installed.
    """
    wanted = [word for word in requirements.split() if not word.startswith("python==")]
    version = next((word[8:] for word in requirements.split() if word.startswith("python==")), "")
    folder = folder_of(requirements)
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        check("make", [interpreter(version), "-m", "venv", "--clear", str(folder)])
    if version:
        wanted += [*declared(), *TOOLS]
    else:
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not ready.exists():
        check("install", [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *wanted])
        ready.touch()
    return python


def check(what: str, command: list[str]) -> None:
    """Run a command and exit if it fails: a matrix without what failed to install would look like a pass."""
    if subprocess.run(command).returncode:
        sys.exit(f"test_versions: cannot {what} an environment: {' '.join(command)}")


def interpreter(version: str) -> str:
    """Return a Python of that version, from PATH or from pyenv; the running one if `version` is empty."""
    if not version:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python{version}"), *map(str, pyenv.glob(f"versions/{version}.*/bin/python"))]
    for path in filter(None, found):
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:  # pyenv's shims may fail
            return path
    sys.exit(f"test_versions: found no python{version}. Install it, or name other versions to test.")


def declared() -> list[str]:
    """Return the requirements of setup.cfg, except torch and transformers, which the matrix varies."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].strip().splitlines()
    return [line for line in lines if not line.startswith(("torch>", "transformers>"))]


def run(python: Path) -> None:
    """Run the tests in that environment; pytest writes the results to a file."""
    report_of(python).unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "--durations=0", "--durations-min=20"]
    command = [str(python), "-m", "pytest", *options, f"--junit-xml={report_of(python)}", "tests/versions"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def last_row(python: Path) -> Row:
    """Return versions and results of the last run, from pytest's XML."""
    if not report_of(python).exists():
        sys.exit(f"test_versions: {python} has run no test")
    suite = next(iter(ElementTree.parse(report_of(python)).getroot().iter("testsuite")))
    noted = {entry.get("name"): entry.get("value", "") for entry in suite.iter("property")}
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    minutes, day = float(suite.get("time", 0)) / 60, suite.get("timestamp", "")[:10]
    versions = tuple(noted.get(name, "?") for name in COLUMNS[:3])
    return Row((*versions, day), tests - failed - skipped, failed, skipped, minutes)


if __name__ == "__main__":
    sys.exit(main())
