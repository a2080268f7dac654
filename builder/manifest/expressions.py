"""What expressions in Python sources come to, as far as it can be told without running them.

Plain values only: strings, numbers, lists, tables, attributes of classes. Whatever cannot be told is Unknown, with the
line where that began, or raises NotUnderstoodError; nothing is guessed. What the machine is like is not guessed either,
but given: FACTS.
"""

from __future__ import annotations

import ast
import copy
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from builder.manifest.scopes import (
    ChainedNames,
    Dotted,
    Environment,
    Frame,
    Function,
    LeftError,
    Method,
    Missing,
    Super,
    Target,
    Unknown,
    env_of,
)
from builder.manifest.testfiles import Class, MissingError, NotUnderstoodError

#: What conditions of tests ask for, on the machine that a manifest is for: CUDA, Hopper, in CI.
FACTS: Mapping[str, Any] = {
    "is_in_ci": True,
    "is_cuda": True,
    "is_cuda_alike": True,
    "is_sm90_supported": True,
    **dict.fromkeys(("is_in_amd_ci", "is_hip", "is_npu", "is_xpu", "is_hpu", "is_cpu", "is_musa", "is_mps"), False),
    **dict.fromkeys(("is_blackwell", "is_blackwell_system", "is_sm100_supported", "is_sm120_supported"), False),
    "torch.cuda.is_available": True,
    "torch.version.cuda": "13.0",
    "torch.version.hip": None,
}
#: Name of a function that launches → its parameters.
LAUNCHES: Mapping[str, Sequence[str]] = {
    "popen_launch_server": ("model", "base_url", "timeout", "api_key", "other_args", "env"),
    "popen_launch_pd_server": ("model", "base_url", "timeout", "api_key", "other_args", "env"),
    "ModelLaunchSettings": ("model_path", "tp_size", "extra_args", "env", "variant", "launch_timeout"),
}
#: Functions of Python whose result is told by their arguments.
_PLAIN: Mapping[str, Callable[..., Any]] = {
    "str": str, "int": int, "float": float, "bool": bool, "len": len, "list": list, "tuple": tuple, "dict": dict,
    "sorted": sorted, "range": range, "zip": lambda *lists: list(zip(*lists, strict=False)), "enumerate": enumerate,
    "json.dumps": json.dumps, "copy.copy": copy.copy, "copy.deepcopy": copy.deepcopy,
}  # fmt: skip
_METHODS: Mapping[type, frozenset[str]] = {
    kind: frozenset(names.split())
    for kind, names in (
        (str, "lower upper strip lstrip rstrip split replace startswith endswith join"),
        (list, "append extend insert copy index count remove pop clear sort reverse"),
        (dict, "copy update get items keys values pop setdefault"),
        (tuple, "index count"),
    )
}
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b, ast.Div: lambda a, b: a / b, ast.Mod: lambda a, b: a % b,
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b, ast.Is: lambda a, b: a is b, ast.IsNot: lambda a, b: a is not b,
    ast.Lt: lambda a, b: a < b, ast.LtE: lambda a, b: a <= b, ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b,
}  # fmt: skip
#: Functions of Python that are followed where they are called.
_OURS = ("super", "getattr", "setattr", "print")
_SIGNS: Mapping[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Invert: operator.inv}
_LARGE = 100_000  # items of a list, characters of a string: no launch is that long


class Values(ABC):
    """Follows expressions. What calls of functions do, and what a launch means, is the reader's to say."""

    @abstractmethod
    def call(self, function: Function, arguments: list[Any], named: dict[str, Any], frame: Frame, node: ast.AST) -> Any:
        """What a function of the files returns."""

    @abstractmethod
    def launch(self, name: str, node: ast.Call, frame: Frame) -> Any:
        """Takes note of a launch."""

    @abstractmethod
    def hand_over(self, function: Function, frame: Frame, node: ast.Call) -> None:
        """Takes note that a function of the files may be called, who knows how."""

    @abstractmethod
    def refuse(self, place: str, why: str) -> None:
        """Takes note of a launch that is not understood."""

    @abstractmethod
    def bind(self, target: ast.expr, value: Any, frame: Frame) -> None:
        """Gives a value to what stands left of an equals sign."""

    @abstractmethod
    def step(self, place: str) -> None:
        """Counts what is done. Raises NotUnderstoodError where that is more than anybody's patience."""

    # --- values ------------------------------------------------------------------------------------------------------

    def value(self, node: ast.expr, frame: Frame) -> Any:
        """What an expression comes to. Raises NotUnderstoodError; parts of a list may be Unknown."""
        place = frame.module.place(node)
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                if name in frame.names:
                    return self.known(frame.names[name], name)
                if name in frame.module.names:
                    return self.known(frame.module.names[name], name)
                if any(name in known for known in (_PLAIN, FACTS, LAUNCHES, _OURS)):
                    return Dotted(name, place)
                raise NotUnderstoodError(place, f"the name {name}")
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                made = list(self.parts(parts, frame))
                return tuple(made) if isinstance(node, ast.Tuple) else made
            case ast.Dict(keys=keys, values=values):
                return self._dict(keys, values, frame)
            case ast.JoinedStr(values=values):
                return "".join(str(self._formatted(part, frame)) for part in values)
            case ast.BinOp(left=left, op=op, right=right):
                return self.operate(op, self.told(left, frame), self.told(right, frame), place)
            case ast.BoolOp(op=op, values=values):
                result: Any = None
                for each in values:
                    result = self.told(each, frame)
                    if bool(result) is isinstance(op, ast.Or):
                        break
                return result
            case ast.UnaryOp(op=op, operand=operand):
                inner = self.told(operand, frame)
                if isinstance(op, ast.Not):
                    return not inner
                if not isinstance(inner, (int, float)):
                    raise NotUnderstoodError(place, "a sign before what is no number")
                return _SIGNS[type(op)](inner)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.operate(op, self.told(left, frame), self.told(right, frame), place)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.told(test, frame) else orelse, frame)
            case ast.Subscript():
                return self._subscript(node, frame)
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(*(None if each is None else self.told(each, frame) for each in (lower, upper, step)))
            case ast.ListComp(elt=element, generators=[generator]) if not generator.is_async:
                return self._comprehended(element, generator, frame)
            case ast.Attribute(value=ast.Name(id="os"), attr="environ"):
                return Environment(frame.env)
            case ast.Attribute(value=holder, attr=name):
                return self.known(self.attribute(self.value(holder, frame), name, place), f"{ast.unparse(node)}")
            case ast.Call():
                return self._called(node, frame)
        raise NotUnderstoodError(place, f"an expression of the kind {type(node).__name__}")

    def or_unknown(self, node: ast.expr, frame: Frame) -> Any:
        """The value, or Unknown, or Missing."""
        try:
            return self.told(node, frame)
        except NotUnderstoodError as error:
            return (Missing if isinstance(error, MissingError) else Unknown)(error.place, error.why)

    def known(self, value: Any, name: str) -> Any:
        if isinstance(value, Unknown):
            kind = MissingError if isinstance(value, Missing) else NotUnderstoodError
            raise kind(value.place, value.why if name in value.why else f"{name}: {value.why}")
        return value

    def told(self, node: ast.expr, frame: Frame) -> Any:
        """A value that is told in all its parts: no name of a module that is in none of the files."""
        value = self.value(node, frame)
        if isinstance(value, Dotted):
            if value.name in FACTS:
                return FACTS[value.name]
            raise NotUnderstoodError(frame.module.place(node), f"{ast.unparse(node)}, which is in none of the files")
        return value

    def parts(self, parts: Sequence[ast.expr], frame: Frame) -> Iterator[Any]:
        for part in parts:
            if isinstance(part, ast.Starred):
                yield from self.sure((list, tuple), self.told(part.value, frame), place=frame.module.place(part))
            else:
                yield self.or_unknown(part, frame)

    def _dict(self, keys: Sequence[ast.expr | None], values: Sequence[ast.expr], frame: Frame) -> Any:
        made: dict[Any, Any] = {}
        base: Environment | None = None
        for key, value in zip(keys, values, strict=True):
            if key is not None:
                try:
                    made[self.told(key, frame)] = self.or_unknown(value, frame)
                except TypeError:
                    raise NotUnderstoodError(frame.module.place(key), "a key that can be none") from None
                continue
            more = self.told(value, frame)
            if isinstance(more, Environment):
                base = more
            else:
                made |= self.sure(dict, more, place=frame.module.place(value))
        if base is None:
            return made
        return Environment({**base.env, **env_of(made, frame.module.place(values[0]))})

    def _formatted(self, part: ast.expr, frame: Frame) -> Any:
        if isinstance(part, ast.FormattedValue):
            if part.format_spec is not None or part.conversion != -1:
                raise NotUnderstoodError(frame.module.place(part), "a format of an f-string")
            value = self.told(part.value, frame)
            if not _is_plain(value):
                raise NotUnderstoodError(frame.module.place(part), "a value in an f-string")
            return value
        return self.value(part, frame)

    def _subscript(self, node: ast.Subscript, frame: Frame) -> Any:
        holder, key, place = self.told(node.value, frame), self.told(node.slice, frame), frame.module.place(node)
        if isinstance(holder, Environment):
            if isinstance(found := holder.env.get(str(key)), str):
                return found
            raise NotUnderstoodError(place, f"the environment variable {key}")
        try:
            return self.known(holder[key], ast.unparse(node))
        except (KeyError, IndexError, TypeError, ValueError):
            raise NotUnderstoodError(place, ast.unparse(node)) from None

    def _comprehended(self, element: ast.expr, generator: ast.comprehension, frame: Frame) -> list[Any]:
        inner = Frame(frame.module, ChainedNames({}, frame.names), frame.env, frame.owner, frame.depth)
        made = []
        for value in self.each(self.told(generator.iter, frame), frame.module.place(generator.iter)):
            self.step(frame.module.place(element))
            self.bind(generator.target, value, inner)
            if all(self.told(condition, inner) for condition in generator.ifs):
                made.append(self.told(element, inner))
        return made

    def each(self, values: Any, place: str) -> Iterator[Any]:
        """What a loop goes over. Raises NotUnderstoodError where that cannot be told."""
        if not hasattr(values, "__iter__"):
            raise NotUnderstoodError(place, "a loop over what cannot be told")
        return iter(values)

    def operate(self, op: ast.AST, left: Any, right: Any, place: str) -> Any:
        operate = _OPERATORS.get(type(op))
        unsafe = isinstance(op, (ast.Mult, ast.Mod)) and not _small(left, right)
        if operate is None or unsafe or (_holds_unknown(left) and not isinstance(op, ast.Add)):
            raise NotUnderstoodError(place, f"an operation of the kind {type(op).__name__}")
        try:
            return self.bounded(operate(left, right), place)
        except NotUnderstoodError:
            raise
        except Exception:  # noqa: BLE001 - whatever a foreign program's operands make of it
            raise NotUnderstoodError(place, f"an operation of the kind {type(op).__name__}") from None

    def bounded(self, value: Any, place: str) -> Any:
        """The value, unless it has grown beyond what could be part of a launch."""
        if isinstance(value, (str, list, tuple)) and len(value) > _LARGE:
            raise NotUnderstoodError(place, "a value that is too long")
        return value

    def sure(self, kinds: Any, value: Any, *, place: str) -> Any:
        if kinds is list and isinstance(value, tuple):
            return value
        if not isinstance(value, kinds):
            raise NotUnderstoodError(place, "a list or table that cannot be told")
        return value

    def attribute(self, holder: Any, name: str, place: str = "") -> Any:
        """Of a class, an object of one, or a module. Function, Unknown or a value; Unknown where there is none."""
        if isinstance(holder, Environment):
            return Method(holder, name)
        if isinstance(holder, Dotted):
            return Dotted(f"{holder.name}.{name}", place)
        if isinstance(holder, (Target, Class, Super)):
            target = holder if isinstance(holder, Target) else holder.target if isinstance(holder, Super) else None
            if isinstance(holder, Target) and name in holder.set:
                return holder.set[name]
            cls = (
                holder.cls if isinstance(holder, Target) else holder.target.cls if isinstance(holder, Super) else holder
            )
            order = cls.order()
            if isinstance(holder, Super):
                order = order[order.index(holder.after) + 1 :]
            if name == "__name__":
                return cls.name
            for each in order:
                if name in each.body:
                    found = each.body[name]
                    return replace(found, owner=each, bound=target) if isinstance(found, Function) else found
            return Missing(place or cls.place, f"{cls.name} has no {name} in the files")
        for kind, methods in _METHODS.items():
            if isinstance(holder, kind) and name in methods:
                return Method(holder, name)
        return Unknown(place, f"an attribute {name}")

    def _called(self, node: ast.Call, frame: Frame) -> Any:
        place = frame.module.place(node)
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            target = next((value for value in frame.names.values() if isinstance(value, Target)), None)
            if target is None or frame.owner is None:
                raise NotUnderstoodError(place, "super()")
            return Super(target, frame.owner)
        if (last := ast.unparse(node.func).rpartition(".")[2]) in LAUNCHES:
            return self.launch(last, node, frame)
        if last == "skipTest" and isinstance(node.func, ast.Attribute):
            raise LeftError
        try:
            called = self.value(node.func, frame)
        except NotUnderstoodError:
            self._hand_over(node, frame)
            raise
        name = called.name if isinstance(called, Dotted) else ""
        last = name.rpartition(".")[2]
        if last in LAUNCHES:
            return self.launch(last, node, frame)
        if name in FACTS or last in FACTS:
            return FACTS.get(name, FACTS.get(last))
        arguments = list(self.parts(node.args, frame))
        named = self.keywords(node, frame)
        if isinstance(called, Function):
            self._hand_over(node, frame, known=True)
            return self.call(called, arguments, named, frame, node)
        if isinstance(called, Method):
            return self._method(called, arguments, named, place)
        if name == "getattr" and len(arguments) >= 2 and isinstance(arguments[0], (Target, Class)):
            found = self.attribute(arguments[0], str(arguments[1]), place)
            return arguments[2] if isinstance(found, Unknown) and len(arguments) > 2 else self.known(found, name)
        if name == "setattr" and len(arguments) == 3 and isinstance(arguments[0], (Target, Class)):
            owner: Target | Class = arguments[0]
            (owner.set if isinstance(owner, Target) else owner.body)[str(arguments[1])] = arguments[2]
            return None
        if name == "dict" and not arguments:
            return named
        if name in _PLAIN and all(map(_is_plain, (*arguments, *named.values()))):
            try:
                return _PLAIN[name](*arguments, **named)
            except Exception:  # noqa: BLE001 - whatever a foreign program's arguments make of it
                raise NotUnderstoodError(place, f"a call of {name}") from None
        self._hand_over(node, frame)
        if last == "Engine":
            self.refuse(place, "an Engine is given keywords, not the flags of a server")
        if name != "print":
            self._taint(node, frame, Unknown(place, f"{ast.unparse(node.func)}() may have changed it"))
        raise NotUnderstoodError(place, f"a call of {ast.unparse(node.func)}")

    def keywords(self, node: ast.Call, frame: Frame) -> dict[str, Any]:
        """Arguments by keyword, those of unpacked tables included; values may be Unknown."""
        named: dict[str, Any] = {}
        for each in node.keywords:
            if each.arg:
                named[each.arg] = self.or_unknown(each.value, frame)
            else:
                named |= self.sure(dict, self.told(each.value, frame), place=frame.module.place(each.value))
        return named

    def launches_by(self, node: ast.expr, frame: Frame) -> bool:
        """Whether a call of this is a launch, whatever the name that a file has for it."""
        if ast.unparse(node).rpartition(".")[2] in LAUNCHES:
            return True
        found = frame.names.get(node.id, frame.module.names.get(node.id)) if isinstance(node, ast.Name) else None
        return isinstance(found, Dotted) and found.name.rpartition(".")[2] in LAUNCHES

    def _hand_over(self, node: ast.Call, frame: Frame, *, known: bool = False) -> None:
        """What launches may be called by whoever it is given to."""
        for part in (*node.args, *(keyword.value for keyword in node.keywords)):
            if not isinstance(part, (ast.Name, ast.Attribute)):
                continue
            if self.launches_by(part, frame):
                self.refuse(frame.module.place(node), f"{ast.unparse(node.func)}() is given {ast.unparse(part)}")
            elif not known and isinstance(function := self.or_unknown(part, frame), Function):
                self.hand_over(function, frame, node)

    def _taint(self, node: ast.Call, frame: Frame, unknown: Unknown) -> None:
        """A function that is in none of the files may change the lists and tables it is given."""
        for part in (*node.args, *(keyword.value for keyword in node.keywords)):
            if isinstance(part, (ast.Name, ast.Attribute)):
                try:
                    mutable = isinstance(self.value(part, frame), (list, dict))
                except NotUnderstoodError:
                    continue
                if mutable:
                    self.bind(part, unknown, frame)

    def _method(self, method: Method, arguments: list[Any], named: dict[str, Any], place: str) -> Any:
        holder = method.holder
        if isinstance(holder, Environment):
            return holder.call(method.name, arguments, place)
        if method.name in ("extend", "update") and any(isinstance(each, (Unknown, Dotted)) for each in arguments):
            raise NotUnderstoodError(place, f"what {method.name}() adds")
        try:
            made = getattr(holder, method.name)(*arguments, **named)
            self.bounded(holder, place)
            return self.bounded(made, place)
        except NotUnderstoodError:
            raise
        except Exception:  # noqa: BLE001 - whatever a foreign program's arguments make of it
            raise NotUnderstoodError(place, f"a call of {method.name}()") from None


def _is_plain(value: Any) -> bool:
    """Whether Python's own functions make of it what they would make of it there."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (str, int, float)) or (isinstance(value, range) and len(value) <= _LARGE)


def _small(left: Any, right: Any) -> bool:
    """Whether two numbers, or a list and a number, can be multiplied, and the former divided, without harm."""
    numbers = [each for each in (left, right) if isinstance(each, (int, float))]
    others = [each for each in (left, right) if isinstance(each, (list, tuple))]
    return (
        len(numbers) + len(others) == 2
        and len(others) < 2
        and all(abs(each) < 1 << 32 for each in numbers)
        and not (others and len(others[0]) * numbers[0] > _LARGE)
    )


def _holds_unknown(value: Any) -> bool:
    if isinstance(value, (Unknown, Dotted)):
        return True
    return isinstance(value, (list, tuple)) and any(_holds_unknown(each) for each in value)


def loaded(target: ast.expr) -> ast.expr:
    """The target of an assignment, to be read."""
    copied = ast.parse(ast.unparse(target), mode="eval").body
    return ast.copy_location(copied, target)
