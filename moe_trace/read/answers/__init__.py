"""Questions that an engineer asks of a trace, answered by name."""

from moe_trace.read.answers.answer import QUESTIONS, Answer
from moe_trace.read.answers.ask import ask

__all__ = ["QUESTIONS", "Answer", "ask"]
