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
LINKED = [
    *DOCUMENTS,
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / "docker" / "stand-in").rglob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
]
SCHEMA = jsonschema.Draft202012Validator(json.loads((BUILDER / "manifest" / "schema.json").read_text(encoding="utf-8")))

_LINK = re.compile(r"(?:\]\(|^\[[a-z-]+\]: )([^)\s]+)\)?", re.MULTILINE)
_FILE = re.compile(r"`((?:builder|docker|tests|\.github|[a-z]+)/[A-Za-z0-9_./-]*)`")
_TOML = re.compile(r"^```toml\n(.*?)^```", re.DOTALL | re.MULTILINE)


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def broken(page: Path, link: str) -> bool:
    """Whether a link leads nowhere. Other sites are not asked; their addresses have to be ones."""
    if re.match("[a-z]+:", link):
        return not re.match(r"https://[\w.-]+\.[a-z]+(/|$)", link)
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return not target.exists() or (bool(anchor) and anchor not in anchors(target))


@pytest.mark.parametrize("page", named(LINKED))
def test_links_of_a_page_resolve(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if broken(page, link)] == []


@pytest.mark.parametrize("page", named([ROOT / "README.md", *PAGES]))
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [name for name in _FILE.findall(text) if not any((base / name).exists() for base in (ROOT, BUILDER))]
    assert not missing, f"{page.name} names {missing}"


def test_broken_links_are_found() -> None:
    page = ROOT / "README.md"
    assert all(broken(page, link) for link in ("builder/docs/no.md", "#no-such-heading", "http://x", "CHANGELOG.md#no"))
    assert not any(broken(page, link) for link in ("#status", "CHANGELOG.md", "https://keepachangelog.com/en/1.1.0/"))


def test_readme_can_be_read_at_once() -> None:
    """200 lines of 120 characters, every page of the reference named, and none of the words of our own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []
    pages = {page.name for page in PAGES}
    assert {Path(link).name for link in _LINK.findall(text)} >= pages
    words = text[text.index("## Twelve words") : text.index("## Reference")]
    assert len(re.findall(r"^\| .* \| .* \|$", words, re.MULTILINE)) == 2 + 12  # with the table's head


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


def test_reference_has_a_manifest() -> None:
    texts = [text for page in PAGES for text in _TOML.findall(page.read_text(encoding="utf-8"))]
    assert any("task" in Document.parse("page", text.encode()).data and "schema = 1" in text for text in texts)
