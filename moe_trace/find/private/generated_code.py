"""Extraction of kernel launches from the source of Inductor's generated code, to verify its provenance.

The compiler's provenance omits some calls, and shows neither which branch of a `torch.cond` ran nor which
call a shared region belongs to. Without verification, an omitted launch would be mistaken for its neighbor.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence

_ENTRY, _COMPILED, _ALLOCATES = "call", "async_compile.", "empty_strided"
_PARTITION = re.compile(r"self\.partitions\[(\d+)\]")
_LIBRARIES = (
    "extern_kernels.",
    "aten.",
    "prims.",
    "torch.ops.",
    "quantized.",
    "_quantized.",
    "inductor_ops.",
)
_NO_LAUNCH = (  # other functions called on buffers; a copy between devices is no kernel
    *("alloc_from_pool", "clear", "as_strided", "view", "size", "stride", "data_ptr", "item", "copy_"),
    *("record", "synchronize", "len", "int", "float", "bool", "min", "max", "floor", "ceil", "isinstance"),
)
_VIEW = "aten.view.dtype"
_HELPERS = ("torch._C._dynamo.guards.", "torch._inductor.")
"""Modules of functions that launch nothing: checks, allocations and views, more in each torch release."""
_HANDLE = re.compile(r"\[Provenance debug handles\] \S+:(\d+)$", re.MULTILINE)

BRANCHES = (
    "it chooses between branches or loops (torch.cond, while_loop), and the compiler's provenance does not "
    "say which ran; leave that out of what is compiled, as layer.compile() of each MoE layer does"
)
REGIONS = (
    "it runs a region several times that was compiled once (torch.compiler.nested_compile_region), and the "
    "compiler's provenance has the modules of the first alone; use layer.compile() for each layer instead"
)
NO_SOURCE = (
    "its generated code cannot be read, as with torch._inductor.config.cpp_wrapper or fx_wrapper; compile "
    "with both of them False"
)
LEFT_OUT = (
    "its generated code calls {}, which the compiler's provenance leaves out; please report this, and leave "
    "that operator out of what is compiled until then"
)
NOT_MADE = (
    "the compiler's provenance has a launch of {} that its generated code does not make; please report this"
)
OTHER_ORDER = (
    "its generated code makes its launches in another order than the compiler's provenance has them; please "
    "report this"
)


class _Refused(Exception):
    """Raised with the reason why the launches are unknown."""


def problem_of(source: str, noted: Sequence[str]) -> str:
    """Return why the provenance does not match the launches of the code, or "" if it does.

    Args:
        source: source of the module that Inductor generated.
        noted: names of the launches in the provenance, in order.
    """
    try:
        found = list(_Code(ast.parse(source)).launches())
    except _Refused as refused:
        return str(refused)
    except (SyntaxError, RecursionError, ValueError):
        return NO_SOURCE
    left_out, not_made = Counter(found) - Counter(noted), Counter(noted) - Counter(found)
    if left_out:
        return LEFT_OUT.format(next(iter(left_out)))
    if not_made:
        return NOT_MADE.format(next(iter(not_made)))
    handles = [int(handle) for handle in _HANDLE.findall(source)]
    return "" if found == [*noted] and handles == sorted(handles) else OTHER_ORDER


class _Code:
    """The module that Inductor generated."""

    def __init__(self, module: ast.Module) -> None:
        self.functions = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
        assigned = [node for node in module.body if isinstance(node, ast.Assign)]
        imported = [node for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.kernels = {
            ast.unparse(node.targets[0]) for node in assigned if _called(node.value).startswith(_COMPILED)
        }
        self.helpers = {
            ast.unparse(node.targets[0])
            for node in assigned
            if isinstance(node.value, ast.Attribute) and ast.unparse(node.value).startswith(_HELPERS)
        }
        self.helpers |= {
            name.asname or name.name
            for node in imported
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(_HELPERS)
            for name in node.names
        }
        self.globals = {ast.unparse(target) for node in assigned for target in node.targets}
        self.globals |= {(name.asname or name.name).partition(".")[0] for i in imported for name in i.names}
        self.partitions = [
            ast.unparse(name)
            for node in assigned
            if isinstance(node.value, ast.Call) and _called(node.value) == "Runner"
            for keyword in node.value.keywords
            if isinstance(keyword.value, ast.List)
            for name in keyword.value.elts
        ]

    def launches(self) -> Iterator[str]:
        """Yield the names of the launches in order."""
        for name in self._in_body(_ENTRY):
            partition = _PARTITION.fullmatch(name)
            if partition is None:
                yield name
            elif int(partition[1]) < len(self.partitions):
                yield from self._in_body(self.partitions[int(partition[1])])
            else:
                raise _Refused(NO_SOURCE)

    def _in_body(self, function: str) -> Iterator[str]:
        if function not in self.functions:
            raise _Refused(NO_SOURCE)
        waiting: list[ast.stmt] = [*reversed(self.functions[function].body)]
        while waiting:
            statement = waiting.pop()
            if isinstance(statement, ast.With):
                waiting += reversed(statement.body)
                continue
            names = list(self._calls(statement))
            if names and isinstance(statement, (ast.If, ast.For, ast.While, ast.Try)):
                raise _Refused(BRANCHES)
            if any(name in self.functions for name in names):
                raise _Refused(REGIONS)
            yield from names

    def _calls(self, node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            yield from self._calls(child)
        name = _called(node)
        owner, _, last = name.rpartition(".")
        if not isinstance(node, ast.Call):
            return
        if last == "run" and owner:
            yield owner
        elif self._launches(name, node):
            yield name

    def _launches(self, name: str, call: ast.Call) -> bool:
        if name in self.kernels or name in self.functions or _PARTITION.fullmatch(name):
            return True
        if name.startswith(_LIBRARIES):
            return name != _VIEW
        last = name.rpartition(".")[2]
        if name in self.helpers or last in _NO_LAUNCH or last.startswith(_ALLOCATES):
            return False
        return self._takes_a_variable(call)

    def _takes_a_variable(self, call: ast.Call) -> bool:
        """Return whether a call uses a local variable; other calls concern devices, streams and the like."""
        receiver = [call.func.value] if isinstance(call.func, ast.Attribute) else []
        parts = [*receiver, *call.args, *(keyword.value for keyword in call.keywords)]
        names = {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}
        return not names <= self.globals


def _called(node: ast.AST) -> str:
    """Return the name of the called function, such as `extern_kernels.mm`, or ""."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""
