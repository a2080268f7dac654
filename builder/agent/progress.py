"""What a log says, as events for whoever watches the run: throttled, and the last word always said."""

from __future__ import annotations

import time

from builder.agent.log_watch import Watch
from builder.agent.output import Output
from builder.events import Phase, Progress

TICK_SECONDS = 1.0  # between two phase or progress events


class Ticker:
    """Turns what the log says into `phase` and `progress` events, each once a second at most, the last one always."""

    def __init__(self, output: Output, watch: Watch) -> None:
        self._output, self._watch = output, watch
        self._phase, self._done, self._crash_said = watch.phase, watch.done, False
        self._said_phase = self._said_done = 0.0

    def tick(self, now: float) -> None:
        """To be called often."""
        watch = self._watch
        if watch.crash and not self._crash_said:
            self._crash_said = True
            self._output.event(Phase(f"crashed: {watch.crash.name}"))
        if watch.phase != self._phase and now - self._said_phase >= TICK_SECONDS:
            self._phase, self._said_phase = watch.phase, now
            self._output.event(Phase(watch.phase))
        done = watch.done
        if done is not None and done != self._done and now - self._said_done >= TICK_SECONDS:
            self._done, self._said_done = done, now
            self._output.event(Progress(*done))

    def finish(self) -> None:
        """Says what the throttle held back."""
        self._said_phase = self._said_done = 0.0
        self.tick(time.monotonic() + TICK_SECONDS)
