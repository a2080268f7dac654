"""What a run makes of a task's end, wherever the program ran: in a container, or beside this process (``--here``)."""

from __future__ import annotations

#: How a task was ended before its program had a verdict → state, and the reason as people read it.
ENDED_EARLY = {
    "timeout": ("failed", "timeout: not finished after {task.timeout:.0f} s"),
    "silence": ("failed", "silence: no output for {task.silence:.0f} s"),
    "budget": ("cold", "budget: the run's budget ended while it was compiling"),
    "cancelled": ("cold", "interrupted"),
    "lost": ("failed", "the engine was lost"),
}


def counts(value: object) -> dict[str, int]:
    """A family → number table out of an event, whatever the event holds."""
    if not isinstance(value, dict):
        return {}
    return {str(name): number for name, number in value.items() if isinstance(number, int)}
