"""Tests of the package's structure: allowed imports, no cycles, size limits, torch in one half only.

The rules are in `architecture.py`. `KNOWN_*` are violations to be fixed; remove an entry when it is fixed.
`EXCEPTIONS` are permanent, each with its reason.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import architecture as rules
from paths import ROOT

PACKAGE = ROOT / "moe_trace"

KNOWN_FILE_CIRCLES: set[rules.Arrow] = set()
KNOWN_FOLDER_CIRCLES: set[rules.Arrow] = set()
KNOWN_TOO_LONG: set[str] = set()
EXCEPTIONS = {
    "record/tracer.py:MoETracer": "the public face of recording: its methods are documented, and stay",
    "record/reduce/triton_kernels.py:_sum_chunks": "one GPU kernel: its values stay in registers",
    "record/reduce/triton_kernels.py:fused_routing_stats": "one kernel's launch: an argument per line",
}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in files}


@pytest.fixture(scope="module")
def arrows(sources: dict[str, str]) -> set[rules.Arrow]:
    return rules.file_arrows(sources)


def test_files_import_each_other_in_no_circle(arrows: set[rules.Arrow]) -> None:
    assert arrows >= KNOWN_FILE_CIRCLES, "mended: take these off the list"
    assert rules.circle(arrows - KNOWN_FILE_CIRCLES) == []


def test_folders_import_each_other_in_no_circle(arrows: set[rules.Arrow]) -> None:
    folders = rules.folder_arrows(arrows)
    assert folders >= KNOWN_FOLDER_CIRCLES, "mended: take these off the list"
    assert rules.circle(folders - KNOWN_FOLDER_CIRCLES) == []


def test_folders_import_only_what_the_table_allows(arrows: set[rules.Arrow]) -> None:
    assert rules.forbidden_arrows(arrows) == set()


def test_every_folder_stands_in_the_table(sources: dict[str, str]) -> None:
    assert {rules.folder_of(path).split("/")[0] for path in sources} == set(rules.ALLOWED)


def test_torch_is_imported_by_the_recording_half_alone(sources: dict[str, str]) -> None:
    assert rules.torch_imports(sources) == set()


def test_no_folder_is_too_full(sources: dict[str, str]) -> None:
    assert rules.full_folders(sources) == {}


def test_no_module_function_or_class_is_too_big(sources: dict[str, str]) -> None:
    found, listed = rules.too_long(sources), KNOWN_TOO_LONG | EXCEPTIONS.keys()
    assert {name: size for name, size in found.items() if name not in listed} == {}
    assert listed - found.keys() == set(), "mended: take these off the list"


# -- each rule can fail -------------------------------------------------------------------------------


def broken(**files: str) -> dict[str, str]:
    return {f"{name.replace('__', '/')}.py": text for name, text in files.items()}


def test_the_rule_of_file_circles_can_fail() -> None:
    lazily = broken(
        read__a="import moe_trace.read.b", read__b="def f():\n    from moe_trace.read import a", read__c=""
    )
    assert set(rules.circle(rules.file_arrows(lazily))) == {"read/a.py", "read/b.py"}
    for_types = broken(a="from moe_trace.b import B", b="if TYPE_CHECKING:\n    from moe_trace.a import A")
    assert set(rules.circle(rules.file_arrows(for_types))) == {"a.py", "b.py"}


def test_the_rule_of_folder_circles_can_fail() -> None:
    """A parent and its subfolder are two nodes; other files of theirs close the circle."""
    sources = broken(read__a="import moe_trace.read.file.a", read__file__b="import moe_trace.read.b")
    arrows = rules.file_arrows({**sources, **broken(read__b="", read__file__a="")})
    assert rules.circle(arrows) == []
    assert set(rules.circle(rules.folder_arrows(arrows))) == {"read", "read/file"}


@pytest.mark.parametrize(
    ("name", "source", "arrow"),
    [
        ("data/a", "from moe_trace.record.tracer import MoETracer", ("data", "record")),
        ("timeline/a", "import moe_trace.read.reader", ("timeline", "read")),
        ("record/reduce/a", "def f():\n    from moe_trace.cli import main", ("record", "cli")),
        ("read/a", "from moe_trace import __version__", ("read", "")),
        ("show/figures/a", "from moe_trace.timeline import merge", ("show", "timeline")),
    ],
)
def test_the_rule_of_arrows_can_fail(
    name: str, source: str, arrow: rules.Arrow, sources: dict[str, str]
) -> None:
    assert rules.forbidden_arrows(rules.file_arrows({**sources, f"{name}.py": source})) == {arrow}


@pytest.mark.parametrize("source", ["import torch", "def f():\n    from torch import nn", "import triton"])
def test_the_rule_of_torch_can_fail(source: str) -> None:
    assert rules.torch_imports({"show/text.py": source, "record/a.py": source}) == {"show/text.py"}


def test_the_rule_of_full_folders_can_fail() -> None:
    files = [f"{i}.py" for i in range(4)] + [f"read/file/{i}.py" for i in range(15)]
    assert rules.full_folders([*files, "data/schema.py"]) == {"": 4, "read/file": 15}


def test_the_rule_of_sizes_can_fail() -> None:
    method = "    def m{}(self): ...\n"
    sources = {
        "long.py": "x = 1\n" * 301,
        "function.py": "def f():\n" + "    pass\n" * 40,
        "class.py": "class C:\n" + "".join(method.format(i) for i in range(13)) + "    def _m(self): ...\n",
        "fine.py": "def f():\n" + "    pass\n" * 39 + "x = 1\n" * 260,
    }
    assert rules.too_long(sources) == {"long.py": 301, "function.py:f": 41, "class.py:C": 13}


# -- what is loaded -----------------------------------------------------------------------------------


def loaded_modules(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import moe_trace",
        "import moe_trace; moe_trace.read_summary; moe_trace.merge_into; moe_trace.Summary",
        "import moe_trace.cli\ntry: moe_trace.cli.main(['report', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_reading_never_loads_torch(code: str) -> None:
    assert "torch" not in loaded_modules(code)


def test_the_test_of_loading_can_fail(tmp_path: Path) -> None:
    """An empty module in torch's place is found as soon, and loads in no time."""
    (tmp_path / "torch.py").touch()
    recording = f"sys.path.insert(0, {str(tmp_path)!r})\ntry: import moe_trace.record.reduce.streams"
    assert "torch" in loaded_modules(f"{recording}\nexcept (ImportError, AttributeError): pass")


def test_importing_the_package_loads_no_numpy() -> None:
    assert "numpy" not in loaded_modules("import moe_trace")


def test_a_report_of_one_rank_loads_nothing_that_only_others_need() -> None:
    """Each of these takes longer to load than the report takes to compute."""
    trace = ROOT / "tests" / "data" / "h200" / "prefill_grouped_mm.pt.trace.json.gz"
    loaded = loaded_modules(f"import moe_trace.cli\nmoe_trace.cli.main(['report', {str(trace)!r}])")
    others = {"hashlib", "numpy.ma", "plotly", "rich", "tempfile", "moe_trace.read.ranks.report"}
    assert "moe_trace.read.analysis" in loaded
    assert loaded & others == set()


def test_the_public_names_are_those_of_before_and_read_recording() -> None:
    """Names that users import are never taken away."""
    import moe_trace

    before = {
        *("MoEProfiler", "MoETraceCallback", "MoETraceError", "MoETracer", "NoRoutersFound", "RouterOutput"),
        *("RouterSite", "RoutingSample", "ScalarLogger", "SimpleBenchmark", "Summary", "find_routers"),
        *("merge_into", "profile", "read_summary", "register_adapter", "replace_router"),
        "tensorboard_trace_handler",
    }
    assert {*before, "read_recording"} <= set(moe_trace.__all__)
    assert all(getattr(moe_trace, name) is not None for name in moe_trace.__all__)


# -- what is said of files --------------------------------------------------------------------------------

NAMED = re.compile(r"`([\w/]+\.(?:py|md))`")


def unknown_files(text: str, beside: Path | None = None) -> set[str]:
    """Files that the text names, and that stand neither in the project, nor in the package, nor `beside`."""
    places = [ROOT, PACKAGE, *([] if beside is None else [beside, beside.parent])]
    return {name for name in NAMED.findall(text) if not any((place / name).exists() for place in places)}


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/design_facts.md", "CONTRIBUTING.md"])
def test_the_pages_on_the_code_name_files_that_exist(page: str) -> None:
    beside = ROOT / "tests" if page == "CONTRIBUTING.md" else None
    assert unknown_files((ROOT / page).read_text(encoding="utf-8"), beside) == set()


def test_modules_name_files_that_exist() -> None:
    found = {
        path: unknown_files(path.read_text(encoding="utf-8"), path.parent) for path in PACKAGE.rglob("*.py")
    }
    assert {str(path): names for path, names in found.items() if names} == {}


def test_the_rule_of_named_files_can_fail() -> None:
    assert unknown_files("as `read/nothing.py` says, and `read/reader.py`") == {"read/nothing.py"}
