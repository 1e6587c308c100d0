"""Find the families with experts in the sources of the installed transformers, without importing them."""

import ast
import functools
import re
from pathlib import Path

import transformers

from .sites import INDEX_PARAMETERS, ODD_EXPERTS

SUSPECT_NAME = re.compile(r"Expert|Router|Gating|Mo[eE]|SparseMLP")
"""What in a class's name would give a Mixture of Experts away, whatever its signature."""
WORTH_PARSING = re.compile(rf"^class \w*({SUSPECT_NAME.pattern})|{'|'.join(INDEX_PARAMETERS)}", re.MULTILINE)


@functools.cache
def folders_with_experts() -> frozenset[str]:
    """Folders of ``transformers.models`` with a class that the bench's convention calls experts."""
    return frozenset(folder for folder, node in _classes() if _holds_experts(node))


@functools.cache
def folders_with_suspect_names() -> dict[str, list[str]]:
    """Folder -> classes whose names suggest experts or a router: where a new convention would show."""
    suspects: dict[str, list[str]] = {}
    for folder, node in _classes():
        if SUSPECT_NAME.search(_without_family_name(node.name, folder)) and "forward" in _methods(node):
            suspects.setdefault(folder, []).append(node.name)
    return suspects


@functools.cache
def _classes() -> list[tuple[str, ast.ClassDef]]:
    models = Path(transformers.__file__).parent / "models"
    found = []
    for source in sorted(models.glob("*/modeling_*.py")):
        text = source.read_text(encoding="utf-8")
        if not WORTH_PARSING.search(text):
            continue
        tree = ast.parse(text)
        found += [(source.parent.name, node) for node in tree.body if isinstance(node, ast.ClassDef)]
    return found


def _methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}


def _holds_experts(node: ast.ClassDef) -> bool:
    if node.name in ODD_EXPERTS:
        return True
    forward = _methods(node).get("forward")
    if forward is None:
        return False
    names = [parameter.arg for parameter in forward.args.args]
    return len(names) >= 4 and names[2] in INDEX_PARAMETERS


def _without_family_name(class_name: str, folder: str) -> str:
    """``Qwen2MoeAttention`` of ``qwen2_moe`` is named after its family, not after its experts."""
    family = folder.replace("_", "").lower()
    lowered = class_name.lower()
    return class_name[len(family) :] if lowered.startswith(family) else class_name
