"""Makes the wheel again that a distribution came from: ``python3 repack.py NAME FOLDER``. Runs in the image."""

from __future__ import annotations

import importlib.metadata
import sys
import zipfile
from pathlib import Path

#: What an installer adds to a distribution's own files.
INSTALLERS = {"INSTALLER", "REQUESTED", "direct_url.json"}


def main(name: str, folder: str) -> None:
    found = importlib.metadata.distribution(name)
    tag = next(line for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: "))[5:]
    wheel = Path(folder, f"{name.replace('-', '_')}-{found.version}-{tag}.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in found.files or ():
            path = Path(str(found.locate_file(file)))
            own = file.name not in INSTALLERS and ".." not in file.parts and "__pycache__" not in file.parts
            if own and path.is_file():
                archive.write(path, str(file))
    print(wheel)


if __name__ == "__main__":
    main(*sys.argv[1:])
