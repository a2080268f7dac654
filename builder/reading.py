"""Reads what sglang's tests launch out of their sources, without running them.

Statements are followed one by one. What one of them does that cannot be told spoils the names that it would have bound;
that matters only where such a name reaches a launch, and then the launch is not understood.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from builder.expressions import (
    FACTS,
    LAUNCHES,
    ChainedNames,
    Dotted,
    Environment,
    Frame,
    Function,
    Missing,
    Target,
    Unknown,
    Values,
    env_of,
    loaded,
    text_of,
)
from builder.testfiles import Class, Files, Module, NotUnderstoodError

#: What sglang's ModelLaunchSettings adds where it is missing.
_ALWAYS = ("--enable-multimodal", "--trust-remote-code")
#: Parameters of a launch that are read.
_READ = {"model", "model_path", "tp_size", "other_args", "extra_args", "env"}
#: Bases that launch nothing and set no model.
_HARMLESS = ("object", "unittest.TestCase", "TestCase", "ABC", "abc.ABC")
_DEEP = 40  # calls within calls
_LONG = 1000  # rounds of a loop
_PATIENCE = 50_000  # statements of one test


@dataclass(frozen=True)
class Launch:
    """One server that a test launches. env: what it is given beside its surroundings. place: of the call, or of the
    test where a fixture makes it.
    """

    model: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    test: str
    place: str


class _ReturnedError(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _LeftError(Exception):
    """break, continue, or raise."""


class Reader(Values):
    """launches: in the order in which they were found. problems: (place, why) of what could matter and is not read."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._test, self._at = "", ""
        self._steps = 0
        self._module: Module | None = None
        self._unknown_bases: list[str] = []
        self.launches: list[Launch] = []
        self.problems: list[tuple[str, str]] = []

    # --- modules and tests -------------------------------------------------------------------------------------------

    def module(self, module: Module) -> Module:
        """Its globals. Each statement is followed on its own: one that is not understood spoils its own names."""
        if not module.read:
            module.read, self._steps = True, 0
            module.names["__name__"] = module.path.stem
            with contextlib.suppress(_LeftError, _ReturnedError):
                self._block(module.tree.body, Frame(module, module.names, {}))
        return module

    def test(self, cls: Class, methods: Sequence[str]) -> None:
        """Follows what unittest would run of this class."""
        self._test, self._at, self._module = cls.name, cls.place, cls.module
        self._unknown_bases, self._steps = cls.all_unknown(), 0
        found = len(self.launches) + len(self.problems)
        target, env = Target(cls), dict[str, "str | None"]()
        for name in ("setUpClass", "setUp", *methods):
            function = self.attribute(target, name)
            if isinstance(function, Function) and not self.skipped(function.node, function.module):
                try:
                    self.call(function, [], {}, Frame(cls.module, {}, env), cls.node)
                except NotUnderstoodError:
                    continue
                except _LeftError:  # SkipTest
                    if name == "setUpClass":
                        return
        if found == len(self.launches) + len(self.problems) and self._unknown_bases:
            model = self.attribute(target, "model")
            if model and not isinstance(model, Missing):
                bases = ", ".join(self._unknown_bases)
                self.problems.append((cls.place, f"{cls.name}: its base {bases} is in none of the files"))

    def skipped(self, node: ast.ClassDef | ast.FunctionDef, module: Module) -> bool:
        """Whether a decorator of unittest says that it is not run here."""
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call):
                name, wanted = ast.unparse(decorator.func), True
                if name.endswith("skipUnless"):
                    wanted = False
                elif not name.endswith("skipIf"):
                    if name.endswith("skip"):
                        return True
                    continue
                try:
                    if bool(self.value(decorator.args[0], Frame(module, module.names, {}))) is wanted:
                        return True
                except (NotUnderstoodError, IndexError):
                    continue  # it may well be run
        return False

    # --- statements --------------------------------------------------------------------------------------------------

    def _block(self, body: Sequence[ast.stmt], frame: Frame) -> None:
        for statement in body:
            try:
                self._statement(statement, frame)
            except NotUnderstoodError as error:
                self._spoil([statement], frame, error)

    def _spoil(self, body: Sequence[ast.stmt], frame: Frame, error: NotUnderstoodError) -> None:
        """Whatever these statements would have bound or changed cannot be told now; nor can a launch among them."""
        unknown = Unknown(error.place, error.why)
        for node in (node for statement in body for node in ast.walk(statement)):
            if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(
                node.ctx, (ast.Store, ast.Del)
            ):
                self.bind(node, unknown, frame)
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if isinstance(node.func, ast.Attribute) and node.func.attr in ("append", "extend", "insert", "update"):
                    self.bind(node.func.value, unknown, frame)
                if name.rpartition(".")[2] in LAUNCHES and len(body) == 1 and not isinstance(body[0], ast.FunctionDef):
                    self._problem(frame.module.place(node), error)

    def refuse(self, place: str, why: str) -> None:
        self._problem(place, NotUnderstoodError(place, why))

    def _problem(self, place: str, error: NotUnderstoodError) -> None:
        why = f"{self._test + ': ' if self._test else ''}a launch: {error.why}"
        if error.place != place:
            why += f" ({error.place})"
        if (place, why) not in self.problems:
            self.problems.append((place, why))

    def _statement(self, node: ast.stmt, frame: Frame) -> None:
        self._steps += 1
        if self._steps > _PATIENCE:
            raise NotUnderstoodError(frame.module.place(node), "more statements than are followed")
        match node:
            case ast.Assign(targets=targets, value=value):
                made = self.value(value, frame)
                for target in targets:
                    self.bind(target, made, frame)
            case ast.AnnAssign(target=target, value=value):
                if value is not None:
                    self.bind(target, self.value(value, frame), frame)
            case ast.AugAssign(target=target, op=op, value=value):
                was = self.value(loaded(target), frame)
                more = self.value(value, frame)
                if isinstance(was, list) and isinstance(op, ast.Add):
                    was.extend(self.sure(list, more, place=frame.module.place(node)))
                    self.bounded(was, frame.module.place(node))
                else:
                    self.bind(target, self.operate(op, was, more, frame.module.place(node)), frame)
            case ast.Expr(value=value):
                if not isinstance(value, ast.Constant):
                    self.value(value, frame)
            case ast.If():
                self._if(node, frame)
            case ast.For():
                self._for(node, frame)
            case ast.With():
                self._with(node, frame)
            case ast.Try():
                self._block([*node.body, *node.orelse, *node.finalbody], frame)
            case ast.Return(value=value):
                raise _ReturnedError(None if value is None else self.or_unknown(value, frame))
            case ast.Raise() | ast.Break() | ast.Continue():
                raise _LeftError
            case ast.FunctionDef():
                frame.names[node.name] = Function(node, frame.module)
            case ast.ClassDef():
                frame.names[node.name] = self._class(node, frame)
            case ast.Import(names=aliases):
                for alias in aliases:
                    name = alias.asname or alias.name.partition(".")[0]
                    frame.names[name] = Dotted(alias.name if alias.asname else name, frame.module.place(node))
            case ast.ImportFrom():
                self._import(node, frame)
            case ast.Assert() | ast.Pass() | ast.Global() | ast.Nonlocal():
                pass
            case _:
                raise NotUnderstoodError(frame.module.place(node), f"a statement of the kind {type(node).__name__}")

    def _if(self, node: ast.If, frame: Frame) -> None:
        try:
            chosen = bool(self.value(node.test, frame))
        except NotUnderstoodError as error:
            both = [*node.body, *node.orelse]
            for statement in both:
                self._spoil([statement], frame, NotUnderstoodError(error.place, f"a condition: {error.why}"))
            if any(isinstance(each, ast.Return) for statement in both for each in ast.walk(statement)):
                raise _ReturnedError(Unknown(error.place, f"a condition: {error.why}")) from None
            return
        self._block(node.body if chosen else node.orelse, frame)

    def _for(self, node: ast.For, frame: Frame) -> None:
        values = self.value(node.iter, frame)
        if isinstance(values, Unknown) or not hasattr(values, "__iter__"):
            raise NotUnderstoodError(frame.module.place(node), "a loop over what cannot be told")
        for _, value in zip(range(_LONG), values, strict=False):
            self.bind(node.target, value, frame)
            try:
                self._block(node.body, frame)
            except _LeftError:
                raise NotUnderstoodError(frame.module.place(node), "a loop that is left early") from None

    def _with(self, node: ast.With, frame: Frame) -> None:
        before = dict(frame.env)
        for item in node.items:
            call = item.context_expr
            text = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if isinstance(call, ast.Call) and text.startswith("envs.") and text.endswith(".override"):
                frame.env[text.split(".")[1]] = text_of(self.told(call.args[0], frame))
            elif text.endswith("patch.dict") and isinstance(call, ast.Call) and _is_environ(call.args):
                frame.env.update(env_of(self.told(call.args[1], frame), frame.module.place(call)))
            elif isinstance(call, ast.Call):
                self.or_unknown(call, frame)  # a function that launches, and waits for the end of the block
            if item.optional_vars is not None:
                self.bind(item.optional_vars, Unknown(frame.module.place(node), "what a with statement binds"), frame)
        try:
            self._block(node.body, frame)
        finally:
            frame.env.clear()
            frame.env.update(before)

    def bind(self, target: ast.expr, value: Any, frame: Frame) -> None:
        match target:
            case ast.Name(id=name):
                frame.names[name] = value
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                owner = frame.names.get(name)
                if isinstance(owner, Target):
                    owner.set[attribute] = value
            case ast.Subscript(value=holder, slice=key):
                try:
                    held, at = self.value(holder, frame), self.value(key, frame)
                except NotUnderstoodError:
                    return
                if isinstance(held, Environment):
                    held.env[str(at)] = None if isinstance(value, Unknown) else text_of(value)
                elif isinstance(held, (list, dict)):
                    try:
                        held[at] = value
                    except (IndexError, TypeError):
                        raise NotUnderstoodError(frame.module.place(target), "a place in a list") from None
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                values = value if isinstance(value, (list, tuple)) and len(value) == len(targets) else None
                for index, each in enumerate(targets):
                    unknown = Unknown(frame.module.place(target), "several names at once")
                    self.bind(each, unknown if values is None else values[index], frame)
            case _:
                pass

    def _class(self, node: ast.ClassDef, frame: Frame) -> Class:
        bases, unknown = [], []
        for base in node.bases:
            found = self.or_unknown(base, frame)
            if isinstance(found, Class):
                bases.append(found)
            elif ast.unparse(base) not in _HARMLESS:
                unknown.append(ast.unparse(base))
        made = Class(node.name, node, frame.module, tuple(bases), tuple(unknown), {})
        inner = Frame(frame.module, ChainedNames(made.body, frame.names), frame.env, made)
        self._block(node.body, inner)
        return made

    def _import(self, node: ast.ImportFrom, frame: Frame) -> None:
        module = self._files.imported(frame.module, node.module or "") if not node.level else None
        known = self.module(module).names if module is not None else {}
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            fallback = Dotted(name, frame.module.place(node))
            # FACTS and LAUNCHES are the word on these, however a file makes them.
            own = alias.name in FACTS or alias.name in LAUNCHES
            frame.names[alias.asname or alias.name] = fallback if own else known.get(alias.name, fallback)

    def call(self, function: Function, arguments: list[Any], named: dict[str, Any], frame: Frame, node: ast.AST) -> Any:
        place, spec = frame.module.place(node), function.node.args
        if frame.depth > _DEEP:
            raise NotUnderstoodError(place, f"{function.node.name}() calls itself too often")
        if any(isinstance(each, (ast.Yield, ast.YieldFrom)) for each in ast.walk(function.node)):
            raise self._refusal(function, place, f"{function.node.name}() is a generator")
        static = any(ast.unparse(each) == "staticmethod" for each in function.node.decorator_list)
        if function.owner is not None and not static:
            arguments = [function.bound or function.owner, *arguments]
        parameters = [each.arg for each in (*spec.posonlyargs, *spec.args)]
        only = [each.arg for each in spec.kwonlyargs]
        defaults = dict(zip(reversed(parameters), reversed(spec.defaults), strict=False))
        defaults |= {each: default for each, default in zip(only, spec.kw_defaults, strict=True) if default is not None}
        if spec.vararg or spec.kwarg or len(arguments) > len(parameters) or named.keys() - {*parameters, *only}:
            raise self._refusal(function, place, f"the arguments of {function.node.name}()")
        names = {**dict(zip(parameters, arguments, strict=False)), **named}
        inner = Frame(function.module, names, frame.env, function.owner, frame.depth + 1)
        for parameter, default in defaults.items():
            if parameter not in names:
                names[parameter] = self.or_unknown(default, Frame(function.module, function.module.names, frame.env))
        try:
            self._block(function.node.body, inner)
        except _ReturnedError as returned:
            return self.known(returned.value, f"{function.node.name}()")
        return None

    def _refusal(self, function: Function, place: str, why: str) -> NotUnderstoodError:
        """Of a call that is not followed; a launch that it would have made is not passed over in silence."""
        error = NotUnderstoodError(place, why)
        for node in ast.walk(function.node):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in LAUNCHES:
                self._problem(function.module.place(node), error)
        return error

    def launch(self, name: str, node: ast.Call, frame: Frame) -> Any:
        """Notes the launch, or why it is not understood; the process or the settings themselves are never read."""
        place = frame.module.place(node)
        try:
            given = dict(zip(LAUNCHES[name], self.parts(node.args, frame), strict=False)) | self.keywords(node, frame)
            model = given.get("model", given.get("model_path"))
            if not model or (isinstance(model, Missing) and not self._unknown_bases):
                return Unknown(place, "a launch without a model")  # a fixture's own class, which a test completes
            values = {each: self.known(value, each) for each, value in given.items() if each in _READ}
            argv = values.get("other_args", values.get("extra_args")) or []
            words = [self._word(word, place) for word in self.sure((list, tuple), argv, place=place)]
            if name == "ModelLaunchSettings":
                size = values.get("tp_size", 1)
                words += ["--tp", str(size)] if size > 1 and "--tp" not in words else []
                words += [each for each in _ALWAYS if each not in words]
            env = {**frame.env, **env_of(values.get("env"), place)}
            within = self._at if self._at and frame.module is not self._module else place  # not where a fixture is
            launch = Launch(
                self._word(model, place),
                tuple(words),
                tuple(sorted((key, value) for key, value in env.items() if value is not None)),
                self._test,
                within,
            )
            if launch not in self.launches:
                self.launches.append(launch)
        except NotUnderstoodError as error:
            self._problem(place, error)
        return Unknown(place, "a process")

    def _word(self, value: Any, place: str) -> str:
        if isinstance(value, Unknown):
            raise NotUnderstoodError(value.place, value.why)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise NotUnderstoodError(place, f"an argument that is no string: {value!r:.60}")
        return str(value)


def _is_environ(arguments: Sequence[ast.expr]) -> bool:
    return len(arguments) == 2 and ast.unparse(arguments[0]).strip("'\"") == "os.environ"
