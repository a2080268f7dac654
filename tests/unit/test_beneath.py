"""Below an untrusted root nothing leads anywhere else: links at each level, files of each kind, trees of any depth."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import flock
from builder.beneath import DEPTH, Tree
from builder.files import UnreadableError, open_regular
from builder.openat import NotRegularError

LEVELS = ("a", "a/b", "a/b/c")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one file three directories down, and the same outside of it."""
    for place in ("root", "outside"):
        (tmp_path / place / "a" / "b" / "c").mkdir(parents=True)
        (tmp_path / place / "a" / "b" / "c" / "file").write_text(place)
    return tmp_path / "root"


def linked(root: Path, level: str, *, absolute: bool) -> None:
    """A job puts a link, to the same directory outside, in the place of this one."""
    place = root / level
    place.rename(root.parent / "was")
    outside = root.parent / "outside" / level
    place.symlink_to(outside if absolute else os.path.relpath(outside, place.parent))


ACTIONS: dict[str, Callable[[Tree], object]] = {
    "lstat": lambda tree: tree.lstat("a/b/c/file"),
    "read": lambda tree: tree.read_bytes("a/b/c/file", 100),
    "lock": lambda tree: tree.open_file("a/b/c/file", os.O_RDONLY),
    "new lock": lambda tree: tree.open_file("a/b/c/new", os.O_RDWR, create=True),
    "write": lambda tree: tree.write_atomically("a/b/c/file", b"new"),
    "create": lambda tree: tree.create("a/b/c/new", b"new"),
    "folder": lambda tree: tree.make_folder("a/b/c/d"),
    "move out": lambda tree: tree.move("a/b/c/file", tree, "kept"),
    "move in": lambda tree: tree.move("own", tree, "a/b/c/own"),
    "unlink": lambda tree: tree.unlink("a/b/c/file"),
    "rmdir": lambda tree: tree.rmdir("a/b/c/empty"),
    "remove": lambda tree: tree.remove("a/b/c/tree"),
    "sync": lambda tree: tree.sync("a/b/c"),
    "mode": lambda tree: tree.copy_mode("a/b/c", os.stat_result((0o777, *[0] * 9))),
}


@pytest.mark.attack(
    "a directory at any level below a root is a link out of it",
    by="env",
    holds="nothing behind it is read, written, locked, moved or deleted",
)
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("action", ACTIONS)
def test_link_at_any_level_is_not_followed(root: Path, action: str, level: str, absolute: bool) -> None:
    outside = root.parent / "outside"
    (outside / "a/b/c/empty").mkdir()
    (outside / "a/b/c/tree/x").mkdir(parents=True)
    (root / "own").touch()
    linked(root, level, absolute=absolute)
    before = [(path, path.lstat()[:7]) for path in sorted(outside.rglob("*"))]
    with Tree(root) as tree, pytest.raises((OSError, UnreadableError), match="symbolic link"):
        ACTIONS[action](tree)
    assert [(path, path.lstat()[:7]) for path in sorted(outside.rglob("*"))] == before
    assert (root / "own").exists()


@pytest.mark.parametrize("level", LEVELS)
def test_linked_directory_has_no_items_and_is_no_directory(root: Path, level: str) -> None:
    linked(root, level, absolute=True)
    with Tree(root) as tree:
        assert tree.listing("a/b/c") is None
        assert not tree.is_dir("a/b/c")
        assert not tree.exists("a/b/c/file")
        assert [name for name, item in tree.walk() if item is not None and item.is_file] == []
        assert tree.below("a/b/c").listing() is None


def test_link_planted_after_a_look_is_not_followed(root: Path) -> None:
    """What was a directory a moment ago is opened by what it was, never by its path."""
    with Tree(root) as tree:
        assert tree.read_bytes("a/b/c/file", 100) == b"root"
        linked(root, "a/b", absolute=True)
        assert tree.read_bytes("a/b/c/file", 100) == b"root"


@pytest.mark.parametrize("name", ["..", "a/..", "a/../..", ".", "a/./b", "/etc", "a//b", "../outside/a/b/c/file"])
def test_name_that_leads_elsewhere_does_not_exist(root: Path, name: str) -> None:
    with Tree(root) as tree:
        assert not tree.exists(f"{name}/x")
        with pytest.raises((OSError, UnreadableError)):
            tree.read_bytes(name, 100)
        with pytest.raises(OSError, match="No such file"):
            tree.write_atomically(name, b"x")


def plant(kind: str, path: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "device":
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/etc/passwd")


@pytest.mark.attack(
    "a file is a device, a FIFO, a socket or a link", by="env", holds="it is never opened, and named as no regular file"
)
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "directory", "link"])
def test_what_is_no_file_is_never_opened(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(root)
    try:
        plant(kind, root / "odd")
    except PermissionError:
        request.applymarker(pytest.mark.skip)
        pytest.skip("no device can be made here")
    opened: list[int] = []
    real = os.open

    def watching(path: str, flags: int, *more: int, **options: int | None) -> int:
        if str(path).rpartition("/")[2] == "odd" or str(path).startswith("/proc/self/fd/"):
            opened.append(flags)
        return real(path, flags, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", watching)
    with Tree(root) as tree:
        with pytest.raises(UnreadableError, match=r"is not a regular file|symbolic link"):
            tree.read_bytes("odd", 100)
        with pytest.raises(NotRegularError):
            tree.open_file("odd", os.O_RDWR, create=True)
        with pytest.raises(UnreadableError):
            open_regular(str(root / "odd"))
        with pytest.raises(flock.NotALockError):
            flock.open_lock(root / "odd", create=True, root=root)
        with pytest.raises(flock.NotALockError):
            flock.open_lock(root / "odd")
    assert opened and all(flags & os.O_PATH for flags in opened)


def test_directory_with_too_many_names_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (root / "a" / f"{number}").touch()
    monkeypatch.setattr("builder.beneath.NAMES", 3)
    with Tree(root) as tree:
        assert tree.listing("a") is None
        assert len(tree.some("a", 2) or ()) == 2
        assert len(tree.listing("") or ()) == 1


def deep(place: Path, levels: int) -> None:
    """A chain of directories, deeper than any path can name."""
    fd = os.open(place, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def test_deep_tree_is_walked_to_its_limit_and_removed_whole(root: Path) -> None:
    (root / "aside").mkdir()
    deep(root / "aside", 5000)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with Tree(root) as tree:
        names = [name for name, _ in tree.walk("aside")]
        assert len(names) == DEPTH and tree.is_too_deep(names[-1])
        with pytest.raises(OSError, match="nested too deeply"):
            tree.lstat("/".join(["aside", *["d"] * 300]))
        tree.remove("aside")
        assert [item.name for item in tree.listing() or ()] == ["a"]
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_remove_deletes_links_themselves(root: Path) -> None:
    (root / "a" / "link").symlink_to(root.parent / "outside")
    (root / "loop").symlink_to("loop")
    with Tree(root) as tree:
        tree.remove("a")
        tree.remove("loop")
    assert list(root.iterdir()) == []
    assert (root.parent / "outside" / "a" / "b" / "c" / "file").read_text() == "outside"


def test_remove_of_what_is_not_there_raises(root: Path) -> None:
    with Tree(root) as tree, pytest.raises(FileNotFoundError):
        tree.remove("gone")
    assert [path.name for path in root.iterdir()] == ["a"]


def test_directory_that_cannot_be_renamed_is_moved_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As overlayfs has it, for directories of a lower layer."""
    (tmp_path / "entry" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "aside").mkdir()
    (tmp_path / "entry" / "a").write_text("a")
    (tmp_path / "entry" / "deep" / "er" / "b").write_text("b")
    (tmp_path / "entry" / "link").symlink_to("/etc")
    rename = os.rename

    def of_overlays(source: str, target: str, **where: int) -> None:
        if stat.S_ISDIR(os.stat(source, dir_fd=where["src_dir_fd"], follow_symlinks=False).st_mode):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target, **where)

    monkeypatch.setattr(os, "rename", of_overlays)
    with Tree(tmp_path) as tree, Tree(tmp_path, "aside") as aside:
        tree.move("entry", aside, "gone")
    assert not (tmp_path / "entry").exists()
    assert (tmp_path / "aside/gone/a").read_text() + (tmp_path / "aside/gone/deep/er/b").read_text() == "ab"
    assert (tmp_path / "aside/gone/link").is_symlink()
