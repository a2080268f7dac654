"""The tree of errors: one exit status each, and the tree in the docstring is the tree."""

from __future__ import annotations

from collections.abc import Iterator

from builder import errors


def leaves(cls: type[errors.BuilderError] = errors.BuilderError) -> Iterator[type[errors.BuilderError]]:
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from leaves(child)


def test_errors_have_unique_exit_statuses() -> None:
    statuses: dict[int, str] = {}
    for cls in leaves():
        if cls in (errors.ProblemsError, errors.EngineRefusedError, errors.EngineTimeoutError):
            continue  # a base, and two ways to lose the engine
        if cls in (errors.RegistryRefusedError, errors.RegistryLostError):
            continue  # as of a machine and of an engine: what a caller does about them is the same
        assert cls.exit_code not in statuses, f"{cls.__name__} and {statuses[cls.exit_code]} share {cls.exit_code}"
        statuses[cls.exit_code] = cls.__name__
    assert set(statuses) == {1, 2, 10, 11, 12, 13, 14, 15, 16, 17, 130}
    assert errors.RegistryRefusedError.exit_code == errors.PreflightError.exit_code
    assert errors.RegistryLostError.exit_code == errors.EngineLostError.exit_code
    assert errors.EngineRefusedError.exit_code == errors.EngineLostError.exit_code


def test_errors_docstring_tree_is_complete() -> None:
    assert errors.__doc__
    for cls in leaves():
        if cls is not errors.ProblemsError:
            assert cls.__name__ in errors.__doc__
