"""Documents: what they name exists, and the manifests in them are manifests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from builder.manifest.document import Document
from tests.unit.test_layout import ARROWS

ROOT = Path(__file__).resolve().parents[2]
BUILDER = ROOT / "builder"
PAGES = sorted((BUILDER / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "docker" / "README.md", *PAGES]
SCHEMA = jsonschema.Draft202012Validator(json.loads((BUILDER / "manifest" / "schema.json").read_text(encoding="utf-8")))

_LINK = re.compile(r"\]\(([^)#:]+)[^)]*\)")
_FILE = re.compile(r"`((?:builder|docker|tests|\.github|[a-z]+)/[A-Za-z0-9_./-]*)`")
_TOML = re.compile(r"^```toml\n(.*?)^```", re.DOTALL | re.MULTILINE)


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


@pytest.mark.parametrize("page", named(PAGES))
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in _LINK.findall(text) if not (page.parent / link).exists()]
    missing += [name for name in _FILE.findall(text) if not any((base / name).exists() for base in (ROOT, BUILDER))]
    assert not missing, f"{page.name} names {missing}"


def test_architecture_has_every_package_with_its_imports() -> None:
    text = (BUILDER / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Packages") : text.index("## Rules")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    packages = {re.sub(r"^`builder/(\w+)/`$|^(ground) .*$", r"\1\2", name): imports for name, _, imports in rows[2:]}
    assert {name: set(imports.replace(",", "").split()) for name, imports in packages.items()} == {
        name: set(imports.split()) for name, imports in ARROWS.items()
    }
    folders = {path.parent.name for path in BUILDER.glob("*/__init__.py")}
    assert folders == set(packages) - {"ground"}


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_manifests_in_a_document_agree_with_the_schema(path: Path) -> None:
    for text in _TOML.findall(path.read_text(encoding="utf-8")):
        data = Document.parse(path.name, text.encode()).data
        if "schema" in data and "task" in data:  # a policy has none
            assert [error.message for error in SCHEMA.iter_errors(data)] == []


def test_readme_has_a_manifest() -> None:
    texts = _TOML.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any("schema" in Document.parse("README.md", text.encode()).data for text in texts)
