"""Who tells the tokens of each forward, where a host framework does."""

from __future__ import annotations

from collections.abc import Callable

from moe_trace.record.forward.batch_tokens import BatchTokens
from moe_trace.record.forward.isolation import warn_user

TokenProvider = Callable[[], BatchTokens | None]


class TokenSource:
    """Asked once a forward; never raises into it."""

    def __init__(self) -> None:
        self.provider: TokenProvider | None = None
        """Asked for the tokens of each forward that is recorded; returns None where it does not know."""
        self.next: BatchTokens | None = None
        """Of the next forward, in place of what the provider would tell."""
        self._failed = False

    @property
    def tells(self) -> bool:
        """Whether there is anything to ask."""
        return self.provider is not None or self.next is not None

    def take(self, *, wanted: bool) -> BatchTokens | None:
        """The tokens of the forward that begins.

        Args:
            wanted: whether it is recorded; else a provider is not asked.
        """
        told, self.next = self.next, None
        if told is None and wanted and self.provider is not None:
            try:
                told = self.provider()
            except Exception as error:
                if not self._failed:
                    warn_user(
                        f"the tokens of a forward are unknown ({type(error).__name__}: {error}); its "
                        "stages and requests are unknown"
                    )
                self._failed = True
        return told
