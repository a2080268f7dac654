"""The pump: drains one container's output, always and completely, and never decides how the container ended.

A reader that stops reading blocks the container, and then the engine's own calls on it. So one thread reads the
attachment whatever its sinks do: the file may fail, the display may be slow, a callback may raise. The end of an
attachment proves nothing. While the container runs, the thread then follows the stored log; after the exit `finish`
proves that the log is complete (the program's last event counts its bytes), or reads what is missing from the stored
log, exactly once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from builder import events
from builder.engine.api import STDERR, STDOUT, Attachment, Containers
from builder.engine.errors import NotFoundError
from builder.engine.log_resume import Received, Resume
from builder.engine.log_sinks import CLOSING, MARKS, Display, Lines, LogFile, Sinks, Tail
from builder.engine.streams import Demux
from builder.errors import BuilderError, EngineLostError
from builder.events import Event
from builder.host.deadlines import Attempt, Deadline, poll
from builder.host.outside import start_thread

EventCallback = Callable[[Event], None]

_BUFFER = 1 << 20
#: Up to this many received bytes a proof reads the whole stored log; beyond that, if nothing broke, only its tail.
_SMALL = 4 << 20
_TAIL_ENTRIES = 500
#: Seconds that may pass between the end of the output and the exit.
_EXIT_LAG = 1.0
#: Seconds without an answer after which the engine counts as lost.
GIVE_UP = 60.0
#: Seconds after the deadline until reading the end of the log is abandoned.
_ABANDON_AFTER = 0.3
#: Seconds for a callback that is still running at the end, and for the log's last bytes after the deadline.
_STUCK, _LAST_BYTES = 6.0, 0.5


class Pump:
    """One container's output. Call `attach` before the container's start, then `start`, and on every path `finish`.

    nonce: marks the lines that are events.
    on_event: called in the pump's thread; an exception in it becomes a problem.
    """

    def __init__(
        self, engine: Containers, container: str, *, nonce: str, sinks: Sinks, on_event: EventCallback | None = None
    ) -> None:
        self._engine = engine
        self._container = container
        self._nonce = nonce
        self._prefix = events.prefix(nonce)
        self._on_event = on_event
        self._file = LogFile(sinks.log_path)
        self._display = Display(sinks.display)
        self._tail = Tail()
        self._lines = {STDOUT: Lines(), STDERR: Lines()}
        self._received = {STDOUT: Received(), STDERR: Received()}
        self._attachment: Attachment | None = None
        self._thread: threading.Thread | None = None
        self._feeding = threading.Lock()
        self._closed = False
        self._ended = False
        self._noted = False
        self._stopped = threading.Event()
        self._whole = True
        self._end: tuple[events.End, int] | None = None
        self._grown: dict[str, int] = {}
        self._read_end, self._write_end = os.pipe()
        self.events: list[Event] = []
        self.problems: list[str] = []
        self.complete = False
        self.last_output = time.monotonic()

    # --- state, for other threads -------------------------------------------------------------------------------------

    @property
    def received(self) -> int:
        """Bytes so far of both streams."""
        return self._received[STDOUT].bytes + self._received[STDERR].bytes

    @property
    def tail(self) -> list[str]:
        """The last lines, safe to print."""
        return self._tail.lines()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the output ends: the moment to inspect the container."""
        return self._read_end

    @property
    def ended(self) -> bool:
        """Whether the attachment has ended, which is a reason to inspect the container."""
        return self._ended

    # --- life --------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Connect to the container's output. Complete if called before its start."""
        self._file.open()
        self._display.open()
        self._attachment = self._engine.attach_output(self._container)

    def start(self) -> None:
        """Begin to drain."""
        self.last_output = time.monotonic()
        self._thread = start_thread(self._run, "log-pump")

    def finish(self, deadline: Deadline, *, ran: bool = True, lost: bool = False) -> None:
        """Drain the rest after the exit, make the log complete, and close everything. Never raises.

        ran: whether the container was ever started; otherwise there is no output.
        lost: the engine does not answer, so the rest of the log is not requested.
        """
        try:
            if ran and not lost:
                self._reconcile_in_time(deadline)
                return
            self._release_thread(Deadline(0.1))
            if lost:
                self.problems.append("the log ends where the engine was lost: what came after that was not read")
        except BuilderError as error:
            self.problems.append(f"the end of the log could not be read: {error}")
        finally:
            self._close(deadline)

    def _reconcile_in_time(self, deadline: Deadline) -> None:
        """Make the log complete, unless the engine does not answer before the deadline."""
        attempt, limit = Attempt(lambda: self._reconcile(deadline)), Deadline(None)
        while attempt.running:
            attempt.join(0.05)
            if deadline.expired:
                limit = limit.within(_ABANDON_AFTER)
            if limit.expired and attempt.running:
                self._stopped.set()
                self.problems.append("the end of the log could not be read: the engine gave no answer in time")
                return
        attempt.result()

    def _close(self, deadline: Deadline) -> None:
        self._file.hurry()
        self._release_thread(Deadline(0.2))
        # A callback that hangs keeps the lock; then its thread has the descriptors, and nothing more is written.
        if self._feeding.acquire(timeout=min(_STUCK, max(_LAST_BYTES, deadline.left()))):
            try:
                self._close_streams()
            finally:
                self._feeding.release()
        else:
            self.problems.append("handling an event did not end; what came after it is not in the log")
        least = Deadline(_LAST_BYTES)
        self._file.close(CLOSING, lambda: least.expired and deadline.expired)
        self._note_problem()
        self._display.close(min(2.0, max(0.2, deadline.left())))
        self.problems += [problem for problem in (self._file.problem, self._display.problem) if problem]

    def _close_streams(self) -> None:
        if not self._closed:
            self._closed = True
            for stream, lines in self._lines.items():
                self._out(stream, lines.last())
            os.close(self._write_end)
            os.close(self._read_end)

    def _release_thread(self, deadline: Deadline) -> None:
        self._stopped.set()
        if self._attachment is not None:
            self._attachment.close()
        if self._thread is not None:
            self._thread.join(deadline.left())

    # --- draining, in the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._whole = self._drain()
            self._wake()
            self._follow()
        except Exception as error:  # noqa: BLE001 - a defect here must not look like a container without output
            self._whole = False
            self.problems.append(f"the log pump failed: {type(error).__name__}: {error}")
        finally:
            self._wake()

    def _drain(self) -> bool:
        """Read the attachment to its end; return whether the end is between frames, False if the connection broke."""
        demux, buffer = Demux(), bytearray(_BUFFER)
        view = memoryview(buffer)
        try:
            while True:
                size = self._attachment.readinto(view) if self._attachment else 0
                if not size:
                    return demux.between_frames
                for stream, data in demux.pieces(view[:size]):
                    self._feed(stream, data)
        except (OSError, ValueError):
            return False

    def _follow(self) -> None:
        """If the attachment ended before the container, follow the stored log from there to the container's end."""
        lost: Deadline | None = None
        while not self._stopped.is_set():
            try:
                if poll(self._has_ended, Deadline(_EXIT_LAG), every=0.02):
                    return
                lost = None
                self._whole = False
                self._resume(follow=True)
            except EngineLostError:
                lost = lost or Deadline(GIVE_UP)
                if lost.expired:
                    return
                self._stopped.wait(0.2)

    def _has_ended(self) -> bool:
        if self._stopped.is_set():
            return True
        try:
            return self._engine.state(self._container).status not in ("running", "paused", "restarting")
        except NotFoundError:
            return True

    def _wake(self) -> None:
        self._ended = True
        with self._feeding:
            if not self._closed:
                os.write(self._write_end, b".")

    # --- after the exit ----------------------------------------------------------------------------------------------

    def _reconcile(self, deadline: Deadline) -> None:
        if self._thread is not None:
            self._thread.join(deadline.left())
            if self._thread.is_alive():
                self._whole = False
                self._release_thread(Deadline(0.5))
                if self._thread.is_alive():
                    self.problems.append(
                        "the log's reader did not end in time; what it was about to read may be missing"
                    )
                    return
        if self._is_proven() or (self._whole and self.received > _SMALL and self._has_same_tail()):
            self.complete = True
            return
        self._resume(follow=False, deadline=deadline)
        if deadline.expired:
            self.problems.append("there was no time to read the rest of the log")
        else:
            self.complete = True

    def _is_proven(self) -> bool:
        """Return whether the program's own count of its bytes equals what was received."""
        if self._end is None:
            return False
        event, size = self._end
        out, err = (self._received[stream].bytes for stream in (STDOUT, STDERR))
        return (event.stdout, event.stderr) == (out - size, err)

    def _has_same_tail(self) -> bool:
        """Return whether the last entries of the stored log are the last that were received, stream by stream."""
        stored: dict[int, bytes] = {}
        for stream, entry in self._engine.log_frames(self._container, follow=False, tail=_TAIL_ENTRIES):
            stored[stream] = stored.get(stream, b"") + entry
        return bool(stored) and all(
            stream in self._received and self._received[stream].ends_like(stored[stream]) for stream in stored
        )

    def _resume(self, *, follow: bool, deadline: Deadline | None = None) -> None:
        """Read the stored log from its beginning and feed what has not been received."""
        resumes = {stream: Resume(received, whole=self._whole) for stream, received in self._received.items()}
        for stream, entry in self._engine.log_frames(self._container, follow=follow):
            if stream in resumes and (new := resumes[stream].new(entry)):
                self._feed(stream, new)
            if self._stopped.is_set() if follow else deadline is not None and deadline.expired:
                return
        if not follow:
            for stream, resume in resumes.items():
                self._feed(stream, resume.end())

    # --- bytes into sinks --------------------------------------------------------------------------------------------

    def _feed(self, stream: int, data: bytes) -> None:
        stream = stream if stream in self._lines else STDERR
        with self._feeding:
            if self._closed or not data:
                return
            self._received[stream].add(data)
            lines = self._lines[stream]
            region = lines.feed(data)
            if stream == STDOUT and self._prefix in region:
                region = self._take_events(region)
            if region or (lines.rest and not lines.rest.startswith(self._prefix[: len(lines.rest)])):
                self.last_output = time.monotonic()
            self._out(stream, region)

    def _out(self, stream: int, region: bytes) -> None:
        if not region:
            return
        mark = MARKS[stream]
        self._file.write(mark, region)
        self._note_problem()
        self._tail.add(region)
        self._display.add(mark, region)

    def _note_problem(self) -> None:
        """Show the log's problem among its lines, once."""
        if (problem := self._file.problem) and not self._noted:
            self._noted = True
            self._display.note(problem)

    def _take_events(self, region: bytes) -> bytes:
        """Handle the events in the region; return the region without them."""
        kept, at = [], 0
        while (begin := self._next_event(region, at)) >= 0:
            end = region.index(b"\n", begin) + 1
            event = events.decode(region[begin:end], self._nonce)
            kept.append(region[at : end if event is None else begin])
            if event is not None:
                self._take_event(event, end - begin)
            at = end
        return b"".join([*kept, region[at:]])

    def _next_event(self, region: bytes, at: int) -> int:
        """Return the position of the next line with our prefix; -1 if there is none. at: the beginning of a line."""
        if region.startswith(self._prefix, at):
            return at
        found = region.find(b"\n" + self._prefix, at)
        return found + 1 if found >= 0 else -1

    def _take_event(self, event: Event, size: int) -> None:
        if isinstance(event, events.End):
            self._end = (event, size)
        if self._has_grown(event):
            self.last_output = time.monotonic()
        repeats = isinstance(event, (events.Progress, events.EntryCounts))
        if repeats and self.events and type(self.events[-1]) is type(event):
            # Hours of progress events would fill the memory, and only the last one matters.
            self.events[-1] = event
        else:
            self.events.append(event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception as error:  # noqa: BLE001 - a callback must not stop the draining
                self.problems.append(f"handling the event {event.wire_name!r} failed: {type(error).__name__}: {error}")

    def _has_grown(self, event: Event) -> bool:
        """Return whether the event is a sign of life: a count is higher than ever before in this phase."""
        counts: dict[str, int] = {}
        match event:
            case events.Phase():
                self._grown.clear()
            case events.Progress():
                counts = {f"progress {event.unit}": event.done}
            case events.EntryCounts():
                counts = {f"entries {family}": count for family, count in event.families.items()}
        grown = False
        for key, count in counts.items():
            if count > self._grown.get(key, 0):
                self._grown[key] = count
                grown = True
        return grown
