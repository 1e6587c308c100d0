"""Events of collectives as written by Kineto: their names and arguments.

NCCL (and every backend that records its parameters) writes a `record_param_comms` operator with all
parameters on the thread that called the collective; its kernels are launched inside it. Gloo writes no
parameters: its collective is the `c10d::` operator that called it, which has sizes only with
`record_shapes=True`, and a range `gloo:...` on the gloo thread that did the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec

CommKind = Literal[
    "all_to_all", "all_gather", "all_reduce", "reduce_scatter", "broadcast", "barrier", "other"
]

PARAMETERS = "record_param_comms"
OPERATOR = "c10d::"
GLOO = "gloo:"
_NONE = msgspec.Raw(b"null")
_MAX_INTEGER = 2**62
_T = TypeVar("_T")
_Sizes = tuple[Annotated[int, msgspec.Meta(ge=0, lt=_MAX_INTEGER)], ...]
_integer = msgspec.json.Decoder(Annotated[int, msgspec.Meta(gt=-_MAX_INTEGER, lt=_MAX_INTEGER)])
_text = msgspec.json.Decoder(str)
_list = msgspec.json.Decoder(list[msgspec.Raw])
_sizes = msgspec.json.Decoder(_Sizes)
_sizes_or_text = msgspec.json.Decoder(_Sizes | str)

# Spellings vary: c10d::alltoall_base_, all_to_allv, gloo:all_to_all, _allgather_base, nccl:all_reduce.
_KINDS: tuple[tuple[str, CommKind], ...] = (
    ("alltoall", "all_to_all"),
    ("allgather", "all_gather"),
    ("reducescatter", "reduce_scatter"),
    ("barrier", "barrier"),
    ("allreduce", "all_reduce"),
    ("broadcast", "broadcast"),
)
# Other names in `record_param_comms` events, which transfer no data.
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
    """Arguments of a collective, as JSON text because other tools write them in other forms."""

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
    """Return whether an operator or range of that name belongs to a collective."""
    return name == PARAMETERS or name.startswith((OPERATOR, GLOO))


@dataclass(frozen=True, eq=False, kw_only=True)
class CommFacts:
    """Parsed arguments of one event; None for what they leave open."""

    kind: CommKind
    elements_in: int | None = None
    elements_out: int | None = None
    split_in: tuple[int, ...] | None = None
    """Rows per rank, in the order of the group; empty for equal parts."""
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
        """Whether the elements are integers, that is, counts or ids rather than hidden states."""
        return None if self.dtype is None else self.dtype.lower() in _INTEGERS


@dataclass(frozen=True, eq=False)
class CommEvent:
    """One event of a collective, in ns on the trace's clock; `thread` indexes the table's threads."""

    name: str
    thread: int
    start_ns: int
    end_ns: int
    facts: CommFacts


def facts_of(name: str, args: CommArgs | None) -> CommFacts | None:
    """Return the facts of an event; None if it is no collective (a wait, a send, a group's start)."""
    if args is None:
        return None
    if name == PARAMETERS:
        collective = _read(args.collective, _text)
        if collective is None or collective in _NO_COLLECTIVES:
            return None
        return CommFacts(
            kind=kind_of(collective),
            elements_in=_read(args.elements_in, _integer),
            elements_out=_read(args.elements_out, _integer),
            split_in=_read_sizes(args.split_in),
            split_out=_read_sizes(args.split_out),
            dtype=_read(args.dtype, _text),
            group=_group(args),
            group_name=_read(args.group_name, _text),
            sequence=_read(args.sequence, _integer),
        )
    kind = kind_of(name.removeprefix(OPERATOR))
    return None if kind == "other" else _operator_facts(kind, name, args)


def kind_of(name: str) -> CommKind:
    """Return the kind of a collective, in any backend's spelling."""
    plain = name.lower().replace("_", "")
    return next((kind for part, kind in _KINDS if part in plain), "other")


def _operator_facts(kind: CommKind, name: str, args: CommArgs) -> CommFacts:
    """Parse `c10d::alltoall_base_(output, input, group, output splits, input splits, ...)` with shapes."""
    dims, concrete, types = (_read(raw, _list) or [] for raw in (args.dims, args.concrete, args.types))
    if kind != "all_to_all" or "base" not in name or len(dims) < 2 or len(concrete) < 5:
        return CommFacts(kind=kind)
    return CommFacts(
        kind=kind,
        elements_out=_product(dims[0]),
        elements_in=_product(dims[1]),
        split_out=_read_sizes(concrete[3]),
        split_in=_read_sizes(concrete[4]),
        dtype=_read(types[1], _text) if len(types) > 1 else None,
    )


def _group(args: CommArgs) -> tuple[int, ...] | None:
    """Return the group's ranks; where the text truncates a long list, by start, stride and size."""
    ranks = _read_sizes(args.group_ranks)
    if ranks:
        return ranks
    start, stride, size = (_read(v, _integer) for v in (args.rank_start, args.rank_stride, args.group_size))
    if start is None or stride is None or size is None or start < 0 or stride < 1 or not 0 < size <= 2**20:
        return None
    return tuple(range(start, start + stride * size, stride))


# -- JSON text -------------------------------------------------------------------------------------------


def _read(text: msgspec.Raw | str, decoder: msgspec.json.Decoder[_T]) -> _T | None:
    """Decode the text; None for another type."""
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _read_sizes(text: msgspec.Raw) -> tuple[int, ...] | None:
    """Parse `"[1, 2]"` or `[1, 2]`; None for the truncated form `"[1, ..., 9]"`."""
    found = _read(text, _sizes_or_text)
    return _read(found, _sizes) if isinstance(found, str) else found


def _product(dims: msgspec.Raw) -> int | None:
    sizes = _read_sizes(dims)
    product = None if sizes is None else math.prod(sizes)
    return product if product is None or product < _MAX_INTEGER else None
