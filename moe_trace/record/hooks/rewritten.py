"""Routers that write their decision into the same memory again: what they return must be copied at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from moe_trace.find.contracts.overhead import overhead_range
from moe_trace.find.private.torch_names import is_jit_tracing
from moe_trace.record.forward.guard import apart

_LEARNED_FROM = 4  # calls; a router that takes turns between more buffers than that is not seen through


class TensorCopies:
    """Copies what one router's first calls handed out, and learns whether it must go on copying.

    It must where a call hands out storage that an earlier one did (which is kept alive here, so that no
    allocator can have reused it), or where a tensor's version has moved by the end of the forward.
    """

    def __init__(self) -> None:
        self.static = False
        self._calls = 0
        self._earlier: dict[int, Tensor] = {}
        """By address of its storage."""
        self._of_call: dict[int, Tensor] = {}
        self._noted: list[tuple[Tensor, int]] = []

    @property
    def settled(self) -> bool:
        """Whether copying can end."""
        return self._calls > _LEARNED_FROM and not self.static and not self._noted

    def router_output(self, output: Any) -> Any:
        """A copy of what a router returned, which begins another call."""
        self._calls += 1
        self._earlier |= self._of_call
        self._of_call = {}
        return self.copy(output)

    def copy(self, value: Any) -> Any:
        """A copy of a tensor, or of the tensors of a tuple; the value itself where it cannot be copied."""
        if is_compiling() or is_jit_tracing():
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
        if not self.static:
            self._look_at(value.detach())
        return value.detach().clone()

    def _look_at(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address == 0:
            return
        if address in self._earlier:
            self.static = True
        self._of_call[address] = tensor
        if not tensor.is_inference():  # those have no version
            self._noted.append((tensor, tensor._version))

    def end_forward(self) -> None:
        """Look whether anything was written to since it was handed out."""
        noted, self._noted = self._noted, []
        self.static |= any(tensor._version != version for tensor, version in noted)
        if self.static or self._calls > _LEARNED_FROM:
            self._earlier, self._of_call = {}, {}
