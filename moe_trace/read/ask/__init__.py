"""Questions that an engineer asks about a trace, each answered by name."""

from moe_trace.read.ask.answer import QUESTIONS, Answer
from moe_trace.read.ask.questions import ask

__all__ = ["QUESTIONS", "Answer", "ask"]
