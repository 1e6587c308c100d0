"""Routers that write their decision into the same memory again: it is copied at once, or a call is lost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from moe_trace.find.contracts.overhead_range import overhead_range
from moe_trace.find.private.torch_names import tracing_state
from moe_trace.record.calls.pending import PendingCalls, versions_of
from moe_trace.record.forward.isolation import apart
from moe_trace.record.reduce.streams import copies_on_host

_LEARNED_FROM = 4  # calls; a router that takes turns between more buffers than that is not seen through


class TensorCopies:
    """Copies what one router's first calls handed out, and learns whether it must go on copying.

    It must where a call hands out storage that an earlier one did (which is kept alive here, so that no
    allocator can have reused it), or where a tensor's version has moved by the end of the forward.
    """

    def __init__(self, *, static: bool = False) -> None:
        self.static = static
        self._calls = 0
        self._earlier: dict[int, Tensor] = {}
        """By address of its storage."""
        self._of_call: dict[int, Tensor] = {}
        self._noted: list[tuple[Tensor, int]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        """Tensors of inference mode, which have no version, and copies of them."""
        self._differ: list[tuple[Tensor, torch.cuda.Event | None]] = []
        """Whether any of them was another than its copy when a forward ended, and when that is known."""
        self._received: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """By thread: tensors that the experts under way were given, and copies of them."""

    @property
    def learning(self) -> bool:
        """Whether it is not known yet."""
        return not (self.static or self.settled)

    @property
    def settled(self) -> bool:
        """Whether copying can end."""
        return self._calls > _LEARNED_FROM and not (
            self.static or self._noted or self._copied or self._differ
        )

    def router_output(self, output: Any) -> Any:
        """A copy of what a router returned, which begins another call."""
        self._calls += 1
        self._earlier |= self._of_call
        self._of_call = {}
        return self.copy(output)

    def receive(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Experts are about to be given these, and may write into them."""
        self._received.pop(get_ident(), None)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        copies = [(value, self.copy(value)) for value in given]
        self._received[get_ident()] = copies

    def received(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Copies of what the experts that return now were given."""
        copies = self.copy(args), {name: self.copy(value) for name, value in kwargs.items()}
        self._received.pop(get_ident(), None)
        return copies

    def copy(self, value: Any) -> Any:
        """A copy of a tensor, or of the tensors of a tuple; the value itself where it cannot be copied."""
        if is_compiling() or tracing_state() is not None:
            return value  # a copy would become part of the program that is made
        try:
            with apart(), overhead_range():
                return self._copy(value)
        except Exception:  # reading it will tell what it is
            return value

    def _copy(self, value: Any) -> Any:
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(map(self._copy, value))
        if not isinstance(value, Tensor):
            return value
        for given, copied in self._received.get(get_ident(), ()):
            if given is value:
                return copied
        original = value.detach()
        copied = original.clone()
        if not self.static:
            self._look_at(original, copied)
        copied.copy_of = original  # type: ignore[attr-defined]
        return copied

    def _look_at(self, tensor: Tensor, copied: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address == 0:
            return
        if address in self._earlier:
            self.static = True
        self._of_call[address] = tensor
        if not tensor.is_inference():
            self._noted.append((tensor, tensor._version))
        elif self._calls <= _LEARNED_FROM:
            self._copied.append((tensor, copied))

    def end_forward(self) -> None:
        """Look whether anything was written to since it was handed out."""
        noted, self._noted = self._noted, []
        self.static |= any(tensor._version != version for tensor, version in noted)
        self._compare()
        known = [one for one in self._differ if one[1] is None or one[1].query()]
        self.static |= any(bool(differs) for differs, _ in known)
        self._differ = [one for one in self._differ if not any(one is other for other in known)]
        if self.static or self._calls > _LEARNED_FROM:
            self._earlier, self._of_call = {}, {}

    def _compare(self) -> None:
        """Hold what has no version against its copies; a device's answer is not waited for."""
        copied, self._copied = self._copied, []
        for device in {copy.device for _, copy in copied}:
            try:
                differ = [_differs(now, copy) for now, copy in copied if copy.device == device]
                (answer,), known = copies_on_host([torch.stack(differ).any()])
            except Exception:  # no values that can be compared, so nothing is known of them
                self.static = True
            else:
                self._differ.append((answer, known))


def _differs(now: Tensor, then: Tensor) -> Tensor:
    """[] bool; NaN is what NaN was."""
    return ((now != then) & ((now == now) | (then == then))).any()


def original_of(tensor: Tensor) -> Tensor:
    """What a copy was made of, which it keeps alive; the tensor itself where it is none."""
    original: Tensor = getattr(tensor, "copy_of", tensor)
    return original


def is_copy(value: Any) -> bool:
    """Whether it is a copy that was made here."""
    return hasattr(value, "copy_of")


def written_over(groups: Sequence[PendingCalls]) -> list[set[int]]:
    """Of each group, the calls whose tensors are not any more what they were when they were handed out.

    A tensor was written to if its version moved; or if a later call was handed the same memory, which while
    the first still holds it no allocator gave away. (What the routers of one forward share is shared.)
    """
    found = [
        {
            number
            for number, (now, then) in enumerate(zip(versions_of(group.columns), group.versions, strict=True))
            if now != then
        }
        for group in groups
    ]
    for kind in range(3):
        columns = [group.columns[kind] if kind < len(group.columns) else [] for group in groups]
        try:
            addresses = [list(map(Tensor.data_ptr, column)) for column in columns]
        except RuntimeError:  # tensors without memory: their values are all that there is
            continue
        taken = list(chain.from_iterable(addresses))
        if len(set(taken)) < len(taken):
            _find_reused(groups, columns, addresses, found)
    return found


def _find_reused(
    groups: Sequence[PendingCalls],
    columns: Sequence[Sequence[Tensor]],
    addresses: Sequence[Sequence[int]],
    found: list[set[int]],
) -> None:
    uses: dict[int, list[tuple[Any, ...]]] = {}
    for place, (group, column, at) in enumerate(zip(groups, columns, addresses, strict=True)):
        if column:
            for number, (record, tensor, address) in enumerate(zip(group.records, column, at, strict=True)):
                uses.setdefault(address, []).append(
                    (record.start_ns, place, number, record.site.name, tensor)
                )
    for address, users in uses.items():
        tensors, sites = {id(user[-1]) for user in users}, {user[-2] for user in users}
        if address == 0 or len(users) == 1 or (len(tensors) == 1 and len(sites) == len(users)):
            continue
        last = max(user[0] for user in users)
        for start_ns, place, number, _, _ in users:
            if start_ns != last:
                found[place].add(number)
