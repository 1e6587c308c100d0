"""Events that tell of collectives, as Kineto writes them: what they are called, and what their arguments say.

NCCL (and every backend that records its parameters) writes a `record_param_comms` operator on the thread that
called the collective, with all that there is to know; its kernels are launched inside it. Gloo writes no
parameters: its collective is the `c10d::` operator that called it, which has sizes only with
`record_shapes=True`, and a range `gloo:...` on the thread of gloo's own that did the work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

CommKind = Literal[
    "all_to_all", "all_gather", "all_reduce", "reduce_scatter", "broadcast", "barrier", "other"
]

PARAMETERS = "record_param_comms"
OPERATOR = "c10d::"
GLOO = "gloo:"
_NONE = msgspec.Raw(b"null")

# Spellings differ: c10d::alltoall_base_, all_to_allv, gloo:all_to_all, _allgather_base, nccl:all_reduce.
_KINDS: tuple[tuple[str, CommKind], ...] = (
    ("alltoall", "all_to_all"),
    ("allgather", "all_gather"),
    ("reducescatter", "reduce_scatter"),
    ("barrier", "barrier"),
    ("allreduce", "all_reduce"),
    ("broadcast", "broadcast"),
)
# What `record_param_comms` also says, and what moves nothing.
_NO_COLLECTIVES = ("wait", "init", "")

ITEM_BYTES = {
    **dict.fromkeys(("double", "long", "long int", "int64", "float64"), 8),
    **dict.fromkeys(("float", "int", "float32", "int32"), 4),
    **dict.fromkeys(("bfloat16", "half", "c10::bfloat16", "c10::half", "short", "float16"), 2),
    **dict.fromkeys(("byte", "char", "bool", "unsigned char", "signed char", "uint8", "int8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("c10::float8_e4m3fn", "c10::float8_e5m2"), 1),
}
_INTEGERS = ("long", "long int", "int", "short", "int64", "int32", "byte", "char", "uint8", "int8")


class CommArgs(msgspec.Struct, gc=False):
    """The arguments that tell of a collective, as JSON text: other tools write them in other forms."""

    collective: msgspec.Raw = msgspec.field(default=_NONE, name="Collective name")
    elements_in: msgspec.Raw = msgspec.field(default=_NONE, name="In msg nelems")
    elements_out: msgspec.Raw = msgspec.field(default=_NONE, name="Out msg nelems")
    split_in: msgspec.Raw = msgspec.field(default=_NONE, name="In split size")
    split_out: msgspec.Raw = msgspec.field(default=_NONE, name="Out split size")
    dtype: msgspec.Raw = _NONE
    group_ranks: msgspec.Raw = msgspec.field(default=_NONE, name="Process Group Ranks")
    group_name: msgspec.Raw = msgspec.field(default=_NONE, name="Process Group Name")
    group_size: msgspec.Raw = msgspec.field(default=_NONE, name="Group size")
    rank_start: msgspec.Raw = msgspec.field(default=_NONE, name="Global rank start")
    rank_stride: msgspec.Raw = msgspec.field(default=_NONE, name="Global rank stride")
    sequence: msgspec.Raw = msgspec.field(default=_NONE, name="Seq")
    dims: msgspec.Raw = msgspec.field(default=_NONE, name="Input Dims")
    concrete: msgspec.Raw = msgspec.field(default=_NONE, name="Concrete Inputs")
    types: msgspec.Raw = msgspec.field(default=_NONE, name="Input type")


def is_comm(name: str) -> bool:
    """Whether an operator or range of that name tells of a collective."""
    return name == PARAMETERS or name.startswith((OPERATOR, GLOO))


@dataclass(frozen=True, eq=False, kw_only=True)
class CommFacts:
    """What the arguments of one event say; None for what they leave open."""

    kind: CommKind
    elements_in: int | None = None
    elements_out: int | None = None
    split_in: tuple[int, ...] | None = None
    """Rows for each rank of the group, in its order; empty: equal parts."""
    split_out: tuple[int, ...] | None = None
    dtype: str | None = None
    group: tuple[int, ...] | None = None
    group_name: str | None = None
    sequence: int | None = None

    @property
    def item_bytes(self) -> int | None:
        """Bytes of one element."""
        return ITEM_BYTES.get(self.dtype.lower()) if self.dtype is not None else None

    @property
    def is_integer(self) -> bool | None:
        """Whether the elements are whole numbers: counts or ids, no hidden states."""
        return None if self.dtype is None else self.dtype.lower() in _INTEGERS


@dataclass(frozen=True, eq=False)
class CommEvent:
    """One such event; times in nanoseconds on the trace's clock, `thread` an index of the table's threads."""

    name: str
    thread: int
    start_ns: int
    end_ns: int
    facts: CommFacts


def facts_of(name: str, args: CommArgs | None) -> CommFacts | None:
    """None where the event is no collective (a wait, a send, the start of a group)."""
    if args is None:
        return None
    if name == PARAMETERS:
        collective = _text(args.collective)
        if collective is None or collective in _NO_COLLECTIVES:
            return None
        return CommFacts(
            kind=kind_of(collective),
            elements_in=_integer(args.elements_in),
            elements_out=_integer(args.elements_out),
            split_in=_integers(args.split_in),
            split_out=_integers(args.split_out),
            dtype=_text(args.dtype),
            group=_group(args),
            group_name=_text(args.group_name),
            sequence=_integer(args.sequence),
        )
    kind = kind_of(name.removeprefix(OPERATOR))
    return None if kind == "other" else _operator_facts(kind, name, args)


def kind_of(name: str) -> CommKind:
    """The kind of a collective, however the backend spells it."""
    plain = name.lower().replace("_", "")
    return next((kind for part, kind in _KINDS if part in plain), "other")


def _operator_facts(kind: CommKind, name: str, args: CommArgs) -> CommFacts:
    """`c10d::alltoall_base_(output, input, group, output splits, input splits, ...)`, with shapes."""
    dims, concrete, types = _value(args.dims), _value(args.concrete), _value(args.types)
    if kind != "all_to_all" or "base" not in name or not all(isinstance(v, list) for v in (dims, concrete)):
        return CommFacts(kind=kind)
    if len(dims) < 2 or len(concrete) < 5:
        return CommFacts(kind=kind)
    return CommFacts(
        kind=kind,
        elements_out=_product(dims[0]),
        elements_in=_product(dims[1]),
        split_out=_list_of_integers(concrete[3]),
        split_in=_list_of_integers(concrete[4]),
        dtype=types[1] if isinstance(types, list) and len(types) > 1 and isinstance(types[1], str) else None,
    )


def _group(args: CommArgs) -> tuple[int, ...] | None:
    """The group's ranks; long lists are cut short in the text, but ranks at even distances are listed too."""
    ranks = _integers(args.group_ranks)
    if ranks:
        return ranks
    start, stride, size = (_integer(v) for v in (args.rank_start, args.rank_stride, args.group_size))
    if start is None or stride is None or size is None or start < 0 or stride < 1 or not 0 < size <= 2**20:
        return None
    return tuple(range(start, start + stride * size, stride))


# -- JSON text -------------------------------------------------------------------------------------------


def _value(raw: msgspec.Raw) -> Any:
    try:
        return json.loads(bytes(raw))
    except (ValueError, RecursionError):
        return None


def _text(raw: msgspec.Raw) -> str | None:
    value = _value(raw)
    return value if isinstance(value, str) else None


def _integer(raw: msgspec.Raw) -> int | None:
    value = _value(raw)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62 else None


def _integers(raw: msgspec.Raw) -> tuple[int, ...] | None:
    """`"[1, 2]"` or `[1, 2]`; None for `"[1, ..., 9]"`, which is cut short."""
    return _list_of_integers(_value(raw))


def _list_of_integers(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**62 for v in value):
        return None
    return tuple(value)


def _product(dims: Any) -> int | None:
    sizes = _list_of_integers(dims)
    if sizes is None:
        return None
    product = 1
    for size in sizes:
        product *= size
    return product if product < 2**62 else None
