"""Tests that every block of the guides runs as written, the notebook executes, and links have targets."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import moe_trace
from fork_server import ForkServer
from paths import ROOT

DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])
# Their shell blocks run too, and they hold nothing but python, bash and text.
GUIDES = {
    "tutorial.md",
    "howto.md",
    "proofs.md",
    "quickstart.md",
    "olmoe.md",
    "metrics.md",
    "troubleshooting.md",
    "recipes.md",
}
# Their shell blocks read what their Python blocks wrote, which therefore run there.
CONTINUED = {"tutorial.md", "howto.md"}
# Where most people begin: a Python that starts anew runs these; one that has torch already the others.
FIRST = {"README.md", "quickstart.md", "index.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"^# needs: ([\w, ]+)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    code: str
    line: int

    @property
    def missing(self) -> list[str]:
        """Packages that the block needs and that are not installed."""
        names = [name.strip() for found in NEEDS.findall(self.code) for name in found.split(",")]
        return [name for name in names if importlib.util.find_spec(name) is None]


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text("utf-8")
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 2) for match in FENCE.finditer(text)
    ]


def as_script(document: Path, blocks: list[Block]) -> str:
    """The Python blocks as one file, each on the lines on which it stands in the document."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"


def environment() -> dict[str, str]:
    """Offline, with this package and its commands first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(command: list[str], folder: Path) -> None:
    options = {"cwd": folder, "env": environment(), "timeout": 280}
    succeeded(subprocess.run(command, capture_output=True, text=True, **options))


def succeeded(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name not in CONTINUED], ids=lambda path: path.name
)
def test_python_blocks_run_one_after_the_other(
    document: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    run_python_blocks(document, tmp_path, fork_server)


def run_python_blocks(document: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    blocks = [block for block in blocks_of(document) if block.language == "python"]
    if not blocks:
        pytest.skip("holds no python block")
    runnable = [block for block in blocks if not block.missing]
    script = tmp_path / document.with_suffix(".py").name
    script.write_text(as_script(document, runnable), "utf-8")
    if document.name in FIRST:
        run([sys.executable, str(script)], tmp_path)
    else:
        succeeded(fork_server.run(tmp_path, str(script)))
    left_out = sorted({name for block in blocks for name in block.missing})
    if left_out:
        pytest.skip(f"all but the blocks that need {', '.join(left_out)} passed")


@pytest.mark.parametrize("name", sorted(GUIDES))
def test_shell_blocks_run(name: str, tmp_path: Path, fork_server: ForkServer) -> None:
    blocks = blocks_of(ROOT / "docs" / name)
    assert {block.language for block in blocks} <= {"python", "bash", "text"}
    shell = "".join(block.code for block in blocks if block.language == "bash")
    if name in CONTINUED:
        run_python_blocks(ROOT / "docs" / name, tmp_path, fork_server)
    if shell:
        run(["bash", "-euo", "pipefail", "-c", shell], tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in LINK.findall(document.read_text("utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_guides_name_every_key_of_the_summary_and_column_of_the_rows() -> None:
    from moe_trace.simple.metrics import COLUMNS

    text = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    known = set(re.findall(r"`([\w…]+)`", text))
    prefixes = {"step", "layer", "name", "tokens", "device"}  # they say what they are
    assert set(COLUMNS) - known - prefixes - {"latency_clock"} == set()


def test_a_failing_block_fails() -> None:
    """The runner itself: an assertion in the second block is found, on its own line."""
    text = "```python\nx = 1\n```\n\nwords\n\n```python\nassert x == 2\n```\n"
    document = Path("made_up.md")
    blocks = [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in FENCE.finditer(text)]
    script = as_script(document, blocks)
    with pytest.raises(AssertionError) as caught:
        exec(compile(script, "made_up", "exec"), {})
    assert caught.traceback[-1].lineno == 8 - 1


def test_the_notebook_executes(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", extra_arguments=[])
    client.create_kernel_manager()
    assert client.km is not None
    client.km.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.execute(cwd=str(tmp_path), env=environment())
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    printed = "".join(out.get("text", "") for cell in code for out in cell.outputs)
    assert "L03" in printed and "two experts" in printed


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    run([*build, "--config-file", str(ROOT / ".mkdocs.yml"), "--site-dir", str(site)], ROOT)
    pages = sorted(site.glob("*.html"))
    assert {page.stem for page in pages} >= {path.stem for path in (ROOT / "docs").glob("*.md")}
    script = r"""<(?:script|img|iframe)[^>]*\bsrc=["']?https?:"""
    loaded = re.compile(script + r"""|<link[^>]*rel=["']?stylesheet[^>]*https?:""")
    assert not [page.name for page in pages if loaded.search(page.read_text("utf-8"))]


def test_the_page_of_commands_is_what_help_prints() -> None:
    run([sys.executable, str(ROOT / "scripts" / "list_commands.py"), "--check"], ROOT)


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    assert set(re.findall(r"^::: moe_trace\.(\w+)$", text, re.MULTILINE)) == set(moe_trace.__all__) - {
        "__version__"
    }


def test_what_the_proofs_name_exists() -> None:
    text = (ROOT / "docs" / "proofs.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/.]+)`", text)
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []
