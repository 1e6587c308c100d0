"""Rules of the package's structure, as functions from sources to violations.

`Sources` maps a file's path inside the package to its text, so that a rule can be tested on a package that
violates it. Imports count everywhere: at the top, inside a function, or for type checking only.

A folder is one node: the Python files directly in it. A folder and its subfolder are two nodes, so
an arrow from `read/` to `read/file/` forbids one back.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

Sources = Mapping[str, str]
Arrow = tuple[str, str]

# What the files of a folder, and of the folders in it, may import of the others; nothing imports the root.
ALLOWED: dict[str, set[str]] = {
    "data": set(),
    "find": {"data"},
    "timeline": {"data"},
    "record": {"find", "data", "timeline"},
    "read": {"data", "timeline"},
    "placement": {"read", "data"},
    "show": {"read", "placement", "data"},
    "simple": {"record", "find", "data"},
    "routing": {"record", "find", "data"},
    "integrations": {"record", "simple", "find", "read", "data"},
    "demo": set(),
    "workload": {"demo", "integrations", "simple", "record", "find", "read", "data"},
    "cli": {"workload", "integrations", "simple", "record", "show", "placement", "read", "find", "data"},
}
ALLOWED[""] = set(ALLOWED)  # the public names, resolved when they are first used
TORCH = {"torch", "torchvision", "transformers", "triton"}
MAY_IMPORT_TORCH = {"find", "record", "simple", "routing", "integrations", "demo", "workload"}

FILES_AT_ROOT_MAX = 3
FILES_IN_FOLDER_MAX = 14
MODULE_LINES_MAX = 300
FUNCTION_LINES_MAX = 40
PUBLIC_METHODS_MAX = 12


parsed = functools.cache(ast.parse)


@functools.cache
def imported(source: str) -> frozenset[str]:
    """Dotted names that the source imports anywhere; of `from a import b` both `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return frozenset(found)


def file_arrows(sources: Sources) -> set[Arrow]:
    """(file, file that it imports); a package that gives a module's name on is not counted beside it."""
    files = {_module(path): path for path in sources}
    arrows = set()
    for path, source in sources.items():
        names = imported(source) & files.keys()
        parents = {name.rpartition(".")[0] for name in names}
        arrows |= {(path, files[name]) for name in names - parents if files[name] != path}
    return arrows


def folder_of(path: str) -> str:
    """The folder inside the package, `` for the root."""
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent


def folder_arrows(arrows: Iterable[Arrow]) -> set[Arrow]:
    """The same between folders."""
    pairs = {(folder_of(a), folder_of(b)) for a, b in arrows}
    return {(a, b) for a, b in pairs if a != b}


def circle(arrows: Iterable[Arrow]) -> list[str]:
    """The nodes of one circle, in order; empty where there is none."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for node, needed in arrows:
        sorter.add(node, needed)
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def forbidden_arrows(arrows: Iterable[Arrow]) -> set[Arrow]:
    """Arrows between top folders that `ALLOWED` does not have."""
    tops = {(_top(a), _top(b)) for a, b in arrows}
    return {(a, b) for a, b in tops if a != b and b not in ALLOWED.get(a, set())}


def torch_imports(sources: Sources) -> set[str]:
    """Files that import torch and may not."""
    return {
        path
        for path, source in sources.items()
        if _top(path) not in MAY_IMPORT_TORCH
        and any(name.split(".")[0] in TORCH for name in imported(source))
    }


def full_folders(paths: Iterable[str]) -> dict[str, int]:
    """Folders with more Python files than they may hold."""
    counts: dict[str, int] = {}
    for path in paths:
        counts[folder_of(path)] = counts.get(folder_of(path), 0) + 1
    most = {"": FILES_AT_ROOT_MAX}
    return {folder: n for folder, n in counts.items() if n > most.get(folder, FILES_IN_FOLDER_MAX)}


def too_long(sources: Sources) -> dict[str, int]:
    """Module, function (`file:name`, without its decorators) or class (`file:name`) -> lines, or public
    methods and properties, where these are too many."""
    found = {}
    for path, source in sources.items():
        lines = len(source.splitlines())
        if lines > MODULE_LINES_MAX:
            found[path] = lines
        for name, count, most in _sizes(parsed(source)):
            if count > most:
                found[f"{path}:{name}"] = count
    return found


def _sizes(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1, FUNCTION_LINES_MAX
        elif isinstance(node, ast.ClassDef):
            methods = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
            yield node.name, sum(not name.startswith("_") for name in methods), PUBLIC_METHODS_MAX


def _module(path: str) -> str:
    return ".".join(("moe_trace", *PurePosixPath(path).with_suffix("").parts)).removesuffix(".__init__")


def _top(path: str) -> str:
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else ""
