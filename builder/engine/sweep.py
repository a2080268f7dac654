"""What a container said whose builder was killed: the end of its log, before it is removed."""

from __future__ import annotations

from pathlib import Path

from builder.engine.api import Containers, Found
from builder.engine.errors import NotFoundError
from builder.engine.log_sinks import MARKS, Lines, LogFile
from builder.errors import BuilderError

#: Of its log so many lines. Whoever was killed wrote down all that came before.
LAST = 10_000


def drain(engine: Containers, container: Found, directory: Path) -> str:
    """Writes it to a file of the container's name in this directory; what became of it, in words, "" where there is
    nothing. Never raises: what cannot be kept does not keep the container.
    """
    file = LogFile(directory / f"swept-{container.name}.log")
    lines = {stream: Lines() for stream in MARKS}
    try:
        for stream, entry in engine.log_frames(container.id, follow=False, tail=LAST):
            if not file.is_open:
                directory.mkdir(parents=True, exist_ok=True)
                file.open()
            if stream in lines and (region := lines[stream].feed(entry)):
                file.write(MARKS[stream], region)
        for stream, rest in lines.items():
            if region := rest.last():
                file.write(MARKS[stream], region)
    except NotFoundError:  # somebody else was faster
        return ""
    except (BuilderError, OSError) as error:
        return f"the end of its log could not be kept ({error})"
    finally:
        was_open = file.is_open
        file.close()
    if file.problem:
        return file.problem
    return f"the end of its log is in {file.path}" if was_open else ""
