"""Detect routers that reuse the memory of their output, and copy the output or count the call as lost."""

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

_LEARNING_CALLS = 4  # calls; a router that rotates over more buffers than that is not detected


class TensorCopies:
    """Copies of the tensors of one router's first calls, to learn whether copying must continue.

    It must if a call returns storage that an earlier call returned (earlier storage is kept alive here, so no
    allocator can have reused it), or if a tensor's version has changed by the end of the forward.
    """

    def __init__(self, *, static: bool = False) -> None:
        self.static = static
        self._calls = 0
        self._earlier: dict[int, Tensor] = {}
        """Tensors of earlier calls, by address of their storage."""
        self._current: dict[int, Tensor] = {}
        self._versioned: list[tuple[Tensor, int]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        """Inference-mode tensors, which have no version, with their copies."""
        self._differences: list[tuple[Tensor, torch.cuda.Event | None]] = []
        """(whether a tensor differed from its copy when a forward ended, event that makes it available)."""
        self._received: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """Per thread, the tensors passed to its running experts, with their copies."""

    @property
    def learning(self) -> bool:
        """Whether it is still unknown if copying must continue."""
        return not (self.static or self.settled)

    @property
    def settled(self) -> bool:
        """Whether copying can stop."""
        return self._calls > _LEARNING_CALLS and not (
            self.static or self._versioned or self._copied or self._differences
        )

    def router_output(self, output: Any) -> Any:
        """Return a copy of a router's output, which starts a new call."""
        self._calls += 1
        self._earlier |= self._current
        self._current = {}
        return self.copy(output)

    def receive(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Copy the arguments of experts about to run, which may write into them."""
        self._received.pop(get_ident(), None)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        copies = [(value, self.copy(value)) for value in tensors]
        self._received[get_ident()] = copies

    def received(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return copies of the arguments of the experts that have just run."""
        copies = self.copy(args), {name: self.copy(value) for name, value in kwargs.items()}
        self._received.pop(get_ident(), None)
        return copies

    def copy(self, value: Any) -> Any:
        """Return a copy of a tensor or of a tuple's tensors, or the value itself if it cannot be copied."""
        if is_compiling() or tracing_state() is not None:
            return value  # a copy would become part of the traced program
        try:
            with apart(), overhead_range():
                return self._copy(value)
        except Exception:  # reading the value will report what is wrong
            return value

    def _copy(self, value: Any) -> Any:
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(map(self._copy, value))
        if not isinstance(value, Tensor):
            return value
        for received, copied in self._received.get(get_ident(), ()):
            if received is value:
                return copied
        original = value.detach()
        copied = original.clone()
        if not self.static:
            self._track(original, copied)
        copied.copy_of = original  # type: ignore[attr-defined]
        return copied

    def _track(self, tensor: Tensor, copied: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address == 0:
            return
        if address in self._earlier:
            self.static = True
        self._current[address] = tensor
        if not tensor.is_inference():
            self._versioned.append((tensor, tensor._version))
        elif self._calls <= _LEARNING_CALLS:
            self._copied.append((tensor, copied))

    def end_forward(self) -> None:
        """Check whether any returned tensor has been written to since."""
        versioned, self._versioned = self._versioned, []
        self.static |= any(tensor._version != version for tensor, version in versioned)
        self._compare()
        ready = [pair for pair in self._differences if pair[1] is None or pair[1].query()]
        self.static |= any(bool(differs) for differs, _ in ready)
        self._differences = [pair for pair in self._differences if not any(pair is other for other in ready)]
        if self.static or self._calls > _LEARNING_CALLS:
            self._earlier, self._current = {}, {}

    def _compare(self) -> None:
        """Compare tensors without versions with their copies, without waiting for the device."""
        copied, self._copied = self._copied, []
        for device in {copy.device for _, copy in copied}:
            try:
                differ = [_differs(now, copy) for now, copy in copied if copy.device == device]
                (differs,), event = copies_on_host([torch.stack(differ).any()])
            except Exception:  # values that cannot be compared, so nothing is known
                self.static = True
            else:
                self._differences.append((differs, event))


def _differs(now: Tensor, then: Tensor) -> Tensor:
    """Return a scalar bool; NaN equals NaN."""
    return ((now != then) & ((now == now) | (then == then))).any()


def original_of(tensor: Tensor) -> Tensor:
    """Return the tensor of which this is a copy, which it keeps alive, or the tensor itself."""
    original: Tensor = getattr(tensor, "copy_of", tensor)
    return original


def is_copy(value: Any) -> bool:
    """Return whether the value is a copy made by `TensorCopies`."""
    return hasattr(value, "copy_of")


def written_over(groups: Sequence[PendingCalls]) -> list[set[int]]:
    """Return, for each group, the calls whose tensors have changed since they were returned.

    A tensor was overwritten if its version changed, or if a later call returned the same memory, which no
    allocator reuses while the first tensor holds it. Memory shared by the routers of one forward is not
    counted.
    """
    found = [
        {
            number
            for number, (new, old) in enumerate(zip(versions_of(group.columns), group.versions, strict=True))
            if new != old
        }
        for group in groups
    ]
    for kind in range(3):
        columns = [group.columns[kind] if kind < len(group.columns) else [] for group in groups]
        try:
            addresses = [list(map(Tensor.data_ptr, column)) for column in columns]
        except RuntimeError:  # tensors without memory, which none can reuse
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
    for index, (group, column, column_addresses) in enumerate(zip(groups, columns, addresses, strict=True)):
        if column:
            for number, (record, tensor, address) in enumerate(
                zip(group.records, column, column_addresses, strict=True)
            ):
                uses.setdefault(address, []).append(
                    (record.start_ns, index, number, record.site.name, tensor)
                )
    for address, users in uses.items():
        tensors, sites = {id(user[-1]) for user in users}, {user[-2] for user in users}
        if address == 0 or len(users) == 1 or (len(tensors) == 1 and len(sites) == len(users)):
            continue
        last = max(user[0] for user in users)
        for start_ns, index, number, _, _ in users:
            if start_ns != last:
                found[index].add(number)
