"""Build wheel and sdist, and test them as a user would: clean environment, empty folder, no checkout.

The environment is created once from the package index, without extras (a few minutes, mostly torch), and kept
in the user's cache; `--fresh` recreates it. The tests run all blocks of the README and the quickstart, the
notebook and TensorBoard's tab, and check that installing the package leaves an installed torch unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_trace" / "release"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
PIP = ("-m", "pip", "--disable-pip-version-check", "-q")
NOTEBOOK = ("nbclient", "ipykernel")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHECKOUT_ONLY = ("bash scripts/", "pip install", "moe-trace view", "torchrun")
RUN_NOTEBOOK = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
"""
OUR_TORCH = "import torch, moe_trace; print(torch.__version__, torch.__file__, moe_trace.__file__)"


def main() -> int:
    """Run all steps in turn. The first failure ends the script with the output of that step."""
    parser = argparse.ArgumentParser(description="Check the wheel and the sdist of this checkout.")
    parser.add_argument("--fresh", action="store_true", help="recreate the clean environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moe_trace_release_") as scratch:
        wheel, sdist = build(Path(scratch))
        python = clean_environment(wheel, fresh=arguments.fresh)
        for archive in (wheel, sdist):
            folder = Path(scratch) / archive.suffix.strip(".")
            folder.mkdir()
            install(python, archive, folder)
            step(f"{archive.name}: the README", documents, python, ROOT / "README.md", folder)
        beside = Path(scratch) / "quickstart"
        beside.mkdir()
        step("the quickstart", documents, python, ROOT / "docs" / "quickstart.md", beside)
        step("the notebook", notebook, python, folder)
        step("the tab", tab, python, folder)
    return 0


def step(name: str, function: object, *arguments: object) -> None:
    began = time.perf_counter()
    assert callable(function)
    function(*arguments)
    print(f"{name}: passed ({time.perf_counter() - began:.0f} s)", flush=True)


def build(scratch: Path) -> tuple[Path, Path]:
    """Build wheel and sdist from tracked files. The wheel is built from the sdist, to test it."""
    source, out = scratch / "source", scratch / "dist"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    step("build", run, [sys.executable, "-m", "build", "--outdir", out, source], scratch)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def clean_environment(wheel: Path, *, fresh: bool) -> Path:
    """Return the Python of an environment with torch, then the wheel and its requirements, without extras."""
    torch = f"torch=={importlib.metadata.version('torch')}"
    asked = (ROOT / "setup.cfg").read_bytes() + CONSTRAINTS.read_bytes() + torch.encode()
    folder = CACHE / hashlib.sha256(asked + sys.version.encode()).hexdigest()[:12]
    python, ready = folder / "bin" / "python", folder / "ready"
    if fresh or not ready.exists():
        print("making a clean environment (some minutes)", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        constrained = ["install", "-c", CONSTRAINTS]
        step("install torch", run, [python, *PIP, *constrained, torch], folder)
        before = torch_files(python)
        step("install the wheel", run, [python, *PIP, *constrained, wheel], folder)
        assert torch_files(python) == before, "installing the wheel changed torch"
        run([python, *PIP, *constrained, *NOTEBOOK], folder)
        ready.touch()
    return python


def torch_files(python: Path) -> tuple[str, float]:
    """Return the version of torch and its time of installation."""
    code = "import importlib.metadata as m; d = m.distribution('torch'); print(d.version, d.locate_file(''))"
    version, place = run([python, "-c", code], python.parent).split()
    return version, (Path(place) / "torch").stat().st_mtime


def install(python: Path, archive: Path, folder: Path) -> None:
    """Replace the installed build by this one, whose requirements must be installed."""
    before = torch_files(python)
    run([python, *PIP, "install", "--force-reinstall", "--no-deps", archive], folder)
    run([python, *PIP, "check"], folder)
    plan = run([python, *PIP, "install", "--dry-run", archive], folder)
    assert not re.search(r"\btorch-\d", plan) and torch_files(python) == before, "installing changes torch"
    *_, place = run([python, "-c", OUR_TORCH], folder).split()
    assert str(ROOT) not in place, f"moe_trace is imported from the checkout: {place}"
    run([python, "-c", "import importlib.metadata as m; assert m.version('moe_trace')"], folder)


def documents(python: Path, document: Path, folder: Path) -> None:
    """Run the Python blocks of a document as one program, then its shell blocks."""
    blocks = FENCE.findall(document.read_text("utf-8"))
    program = folder / "program.py"
    program.write_text("\n".join(code for language, code in blocks if language == "python"), "utf-8")
    run([python, program], folder)
    lines = "".join(code for language, code in blocks if language in ("bash", "console"))
    lines = "".join(line for line in lines.splitlines(True) if not line.startswith(CHECKOUT_ONLY))
    run(["bash", "-euo", "pipefail", "-c", lines], folder, python)


def notebook(python: Path, folder: Path) -> None:
    """Run the notebook in a kernel of that environment."""
    source = shutil.copy2(ROOT / "docs" / "notebooks" / "quickstart.ipynb", folder)
    run([python, "-c", RUN_NOTEBOOK, source], folder)


def tab(python: Path, folder: Path) -> None:
    """Check that TensorBoard serves the recorded run, and names what to install if plotly is missing."""
    command = [python.parent / "moe-trace", "view", "runs/demo", "--port", "16017"]
    server = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(python),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        said = ""
        for line in server.stdout:
            said += line
            if "Ctrl-C ends it" in line:
                break
        else:
            raise SystemExit(f"check_release: no tab:\n{said}")
        address = re.search(r"http://localhost:\d+", said)
        assert address and "pip install 'moe_trace[report]'" in said, said
        with urlopen(f"{address[0]}/data/plugin/moe/runs", timeout=60) as answer:
            assert b"pt.trace.json" in answer.read()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


def environment(python: Path) -> dict[str, str]:
    """Return the variables of a user's shell: that environment's commands, offline hub, no checkout."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1"}


def run(command: list[object], folder: Path, python: Path | None = None) -> str:
    """Return the output of a command; if it fails, end the script with that output."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=environment(python or Path(words[0])), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"check_release: {' '.join(words)[:200]} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
