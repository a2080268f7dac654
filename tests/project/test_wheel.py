"""The built wheel holds what the program needs outside a checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).resolve().parents[2]


def build(kind: str, source: Path, out: Path) -> Path:
    """The wheel or sdist of a source tree, as an installer would have it built."""
    code = f"import sys; from hatchling.build import build_{kind}; print(build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_its_data_and_the_dockerfile(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("builder/_docker/Dockerfile") == (ROOT / "docker" / "Dockerfile").read_bytes()
    sources = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.toml", "*.json", "*.md")
        for path in (ROOT / "builder").rglob(pattern)
        if "_docker" not in path.parts
    }
    assert sources | {"builder/py.typed"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"builder"}


def test_wheel_metadata_has_script_and_python_versions(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
        scripts = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "warm-cache = builder.__main__:main" in scripts
    assert "Requires-Python: >=3.10" in metadata
    assert "Classifier: Typing :: Typed" in metadata


def test_sdist_makes_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "source")
    assert {"README.md", "CHANGELOG.md"} <= {name.split("/", 1)[-1] for name in names}
    (source,) = (tmp_path / "source").iterdir()
    again = build("wheel", source, tmp_path)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()


def test_wheel_works_without_checkout(wheel: Path, tmp_path: Path) -> None:
    """From the wheel's own files, with the checkout out of reach: profiles load, and the Dockerfile is found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import builder, builder.engine.images, builder.manifest.load as m\n"
        f"assert builder.__file__.startswith({str(tmp_path)!r}), builder.__file__\n"
        "print(*m.profiles(), len(m.load(profile='h200').tasks), 'FROM' in builder.engine.images.dockerfile())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["b200-8", "h100-4", "h200", "stand-in", "16", "True"], done.stderr
