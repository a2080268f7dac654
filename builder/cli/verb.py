"""The form of a verb: its options and arguments, its actions, help texts and exit statuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

#: What a verb works with. engine: a manifest and an engine. nothing: neither, or what its options name. command: the
#: user's command, which follows after ``--`` and owns stdout.
Needs = Literal["engine", "nothing", "command"]
#: The parts of the program's help, in their order.
Group = Literal["Warm", "Inspect", "Maintain", "Test jobs", "Share", "Manifests", "Help"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class Argument:
    """A positional argument."""

    name: str  # the field of the verb's dataclass
    metavar: str
    help: str
    many: bool = False  # a tuple of at least one; with optional, of any number
    optional: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Action:
    """One of the things that a verb does, named by the word after the verb."""

    name: str
    help: str  # one line
    example: str
    own: tuple[str, ...] = ()  # of the verb's own options
    arguments: tuple[str, ...] = ()  # of the verb's arguments; each is required


@dataclass(frozen=True)
class Verb:
    """One verb."""

    group: Group
    help: str  # one line
    example: str  # a command line that works
    own: tuple[str, ...] = ()  # names in OPTIONS, after the SHARED ones
    arguments: tuple[Argument, ...] = ()
    actions: tuple[Action, ...] = ()
    needs: Needs = "engine"
    text: bool = False  # the result is text on stdout, and all messages go to stderr
    shown: bool = False  # the result is what it says on stdout: not delivered, it is no success
    engine: bool = True  # may speak to an engine or a registry, and end with 16
    here: bool = False  # has --here, which needs the standard library alone
    details: str = ""  # paragraphs below the options in its help: what it reads, writes and means
    exits: tuple[int, ...] = ()  # its statuses, besides those that every verb has (COMMON)

    @property
    def options(self) -> tuple[str, ...]:
        """Return the names of all its options."""
        return (*SHARED[self.needs], *self.own, *(("here",) if self.here else ()))

    def options_of(self, action: Action | None) -> tuple[str, ...]:
        """Return the names of an action's options; of all options without an action."""
        return self.options if action is None else (*SHARED[self.needs], *action.own)

    def arguments_of(self, action: Action | None) -> tuple[Argument, ...]:
        """Return the arguments after an action's name; all arguments without an action."""
        if action is None:
            return self.arguments
        return tuple(each for each in self.arguments if each.name in action.arguments)


#: The options that all verbs with the same needs have in common.
SHARED: dict[Needs, tuple[str, ...]] = {
    "engine": ("manifest", "profile", "cache", "image", "models", "json", "verbose"),
    "command": ("manifest", "profile", "cache", "image", "verbose"),
    "nothing": ("json", "verbose"),
}


def named(actions: tuple[Action, ...], *, optional: bool = False) -> Argument:
    """Return the argument that names one of these actions."""
    names = tuple(each.name for each in actions)
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return Argument("action", "ACTION", text, optional=optional, choices=names)
