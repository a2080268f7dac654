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

from builder.manifest import oddities
from builder.manifest.expressions import FACTS, LAUNCHES, Values, loaded
from builder.manifest.scopes import (
    ChainedNames,
    Dotted,
    Env,
    Environment,
    Frame,
    Function,
    LeftError,
    Missing,
    Target,
    Unknown,
    env_of,
    text_of,
)
from builder.manifest.testfiles import Class, Files, Module, NotUnderstoodError

#: What sglang's ModelLaunchSettings adds where it is missing.
_ALWAYS = ("--enable-multimodal", "--trust-remote-code")
#: Parameters of a launch that are read.
_READ = {"model", "model_path", "tp_size", "other_args", "extra_args", "env"}
#: Bases that launch nothing and set no model.
_HARMLESS = ("object", "unittest.TestCase", "TestCase", "ABC", "abc.ABC")
#: Methods that change nothing.
_READS = (
    *("copy", "count", "get", "index", "items", "keys", "values"),
    *("endswith", "join", "lower", "replace", "split", "startswith", "strip", "upper"),
)
#: Statements that have no others in them.
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Assert)
_DEEP = 40  # calls within calls
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


class Reader(Values):
    """launches: in the order in which they were found. problems: (place, why) of what could matter and is not read."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._test, self._at = "", ""
        self._steps = 0
        self._followed: set[int] = set()
        self._spoiling: list[ast.FunctionDef] = []
        self._module: Module | None = None
        self._unknown_bases: list[str] = []
        self.launches: dict[Launch, None] = {}
        self.problems: dict[tuple[str, str], None] = {}

    # --- modules and tests -------------------------------------------------------------------------------------------

    def module(self, module: Module) -> Module:
        """Its globals. Each statement is followed on its own: one that is not understood spoils its own names."""
        if not module.read:
            module.read, self._steps = True, 0
            module.names["__name__"] = module.path.stem
            with contextlib.suppress(LeftError, _ReturnedError):
                self._block(module.tree.body, Frame(module, module.names, {}))
        return module

    def test(self, cls: Class, methods: Sequence[str]) -> None:
        """Follows what unittest would run of this class."""
        self._test, self._at, self._module = cls.name, cls.place, cls.module
        self._unknown_bases, self._steps = cls.all_unknown(), 0
        self._followed.clear()
        found = len(self.launches) + len(self.problems)
        if strange := oddities.of_class(cls):
            return self.refuse(cls.place, f"what {strange} makes of the class")
        target, env = Target(cls), Env()
        if not self._follow(target, "setUpClass", env):
            return None
        for name in sorted(methods):
            test = Target(cls, target.set.copy())  # an object of its own
            for each in ("__init__", "setUp", name, "tearDown"):
                if not self._follow(test, each, env):
                    break
        self._follow(target, "tearDownClass", env)
        if found == len(self.launches) + len(self.problems) and self._unknown_bases:
            model = self.attribute(target, "model")
            if model and not isinstance(model, Missing):
                bases = ", ".join(self._unknown_bases)
                self.problems.setdefault((cls.place, f"{cls.name}: its base {bases} is in none of the files"))
        return None

    def _follow(self, target: Target, name: str, env: Env) -> bool:
        """One method, where there is one. Whether its test goes on after it."""
        cls = target.cls
        function = self.attribute(target, name)
        if isinstance(function, Function) and not self.skipped(function.node, function.module):
            try:
                self.call(function, [], {}, Frame(cls.module, {}, env), cls.node)
            except NotUnderstoodError:
                pass  # whatever was a launch in it is among the problems
            except LeftError:  # SkipTest
                return False
        return True

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
                self._spoil([statement], frame, error, executed=isinstance(statement, _SIMPLE))

    def _spoil(
        self, body: Sequence[ast.stmt], frame: Frame, error: NotUnderstoodError, *, executed: bool = False
    ) -> None:
        """Whatever these statements would have bound or changed cannot be told now; nor can a launch among them.
        executed: in part, so that functions that they call may have been followed.
        """
        unknown = Unknown(error.place, error.why)
        for node in (node for statement in body for node in ast.walk(statement)):
            if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(
                node.ctx, (ast.Store, ast.Del)
            ):
                self.bind(node, unknown, frame)
            elif isinstance(node, ast.Call):
                if isinstance(node.func, ast.Attribute) and node.func.attr not in _READS:
                    self._poison(node.func.value, unknown, frame)
                plain = not any(isinstance(each, ast.Call) for each in ast.walk(node.func))  # called once is enough
                called = self.or_unknown(node.func, frame) if plain else None
                if isinstance(body[0], ast.FunctionDef):
                    continue
                if self.launches_by(node.func, frame):
                    self._problem(frame.module.place(node), error)
                elif isinstance(called, Function) and not (executed and id(called.node) in self._followed):
                    self._refusal(called, frame, error.place, error.why)

    def _poison(self, holder: ast.expr, unknown: Unknown, frame: Frame) -> None:
        """A list or table that may have been changed: nobody who has it can tell it any more."""
        try:
            held = self.value(holder, frame)
        except (NotUnderstoodError, LeftError):
            return
        if isinstance(held, list):
            held.append(unknown)
        elif isinstance(held, dict):
            held[unknown] = unknown
        elif isinstance(held, Environment):
            held.env["os.environ"] = unknown
        else:
            return
        self.bind(holder, unknown, frame)

    def step(self, place: str) -> None:
        self._steps += 1
        if self._steps > _PATIENCE:
            raise NotUnderstoodError(place, "more statements than are followed")

    def refuse(self, place: str, why: str) -> None:
        self._problem(place, NotUnderstoodError(place, why))

    def _problem(self, place: str, error: NotUnderstoodError) -> None:
        why = f"{self._test + ': ' if self._test else ''}a launch: {error.why}"
        if error.place != place:
            why += f" ({error.place})"
        self.problems.setdefault((place, why))

    def _statement(self, node: ast.stmt, frame: Frame) -> None:
        self.step(frame.module.place(node))
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
                self._try(node, frame)
            case ast.Return(value=value):
                raise _ReturnedError(None if value is None else self.or_unknown(value, frame))
            case ast.Raise() | ast.Break() | ast.Continue():
                raise LeftError
            case ast.FunctionDef():
                self._function(node, frame)
            case ast.ClassDef():
                frame.names[node.name] = self._class(node, frame)
            case ast.Import(names=aliases):
                for alias in aliases:
                    name = alias.asname or alias.name.partition(".")[0]
                    frame.names[name] = Dotted(alias.name if alias.asname else name, frame.module.place(node))
            case ast.ImportFrom():
                self._import(node, frame)
            case ast.Assert(test=test):
                self.value(test, frame)
            case ast.Pass():
                pass
            case ast.Global(names=names):
                unknown = Unknown(frame.module.place(node), "a function changes it for all")
                frame.names.update(dict.fromkeys(names, unknown))
                frame.module.names.update(dict.fromkeys(names, unknown))
            case ast.Delete(targets=[ast.Subscript(value=holder) as target]) if isinstance(
                self.or_unknown(holder, frame), Environment
            ):
                self.bind(target, None, frame)
            case _:
                raise NotUnderstoodError(frame.module.place(node), f"a statement of the kind {type(node).__name__}")

    def _if(self, node: ast.If, frame: Frame) -> None:
        try:
            chosen = bool(self.value(node.test, frame))
        except NotUnderstoodError as error:
            self._spoil([ast.copy_location(ast.Expr(node.test), node)], frame, error)
            both = [*node.body, *node.orelse]
            for statement in both:
                self._spoil([statement], frame, NotUnderstoodError(error.place, f"a condition: {error.why}"))
            if any(isinstance(each, ast.Return) for statement in both for each in ast.walk(statement)):
                raise _ReturnedError(Unknown(error.place, f"a condition: {error.why}")) from None
            return
        self._block(node.body if chosen else node.orelse, frame)

    def _for(self, node: ast.For, frame: Frame) -> None:
        for value in self.each(self.value(node.iter, frame), frame.module.place(node)):
            self.step(frame.module.place(node))
            self.bind(node.target, value, frame)
            try:
                self._block(node.body, frame)
            except LeftError:
                raise NotUnderstoodError(frame.module.place(node), "a loop that is left early") from None
        self._block(node.orelse, frame)

    def _try(self, node: ast.Try, frame: Frame) -> None:
        """As if nothing went wrong in it; what handlers would have done otherwise cannot be told."""
        place = frame.module.place(node)
        error = NotUnderstoodError(place, "whether an exception is caught there")
        try:
            self._block([*node.body, *node.orelse], frame)
        except LeftError:
            if node.handlers:
                raise error from None
            raise
        except _ReturnedError:
            if any(isinstance(each, ast.Return) for handler in node.handlers for each in ast.walk(handler)):
                raise _ReturnedError(Unknown(place, error.why)) from None
            raise
        finally:
            for handler in node.handlers:
                goes_on = not isinstance(handler.body[-1], ast.Raise)
                for statement in handler.body:
                    if goes_on or self._launches(statement, frame):
                        self._spoil([statement], frame, error)
            self._block(node.finalbody, frame)

    def _launches(self, statement: ast.stmt, frame: Frame) -> bool:
        calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
        return any(self.launches_by(each, frame) for each in calls)

    def _function(self, node: ast.FunctionDef, frame: Frame) -> None:
        spec = node.args
        defaults = dict(zip(reversed([*spec.posonlyargs, *spec.args]), reversed(spec.defaults), strict=False))
        defaults |= {each: made for each, made in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if made}
        made = {each.arg: self.or_unknown(default, frame) for each, default in defaults.items()}
        around = frame.names if frame.depth else {}
        frame.names[node.name] = Function(node, frame.module, made, around)

    def _with(self, node: ast.With, frame: Frame) -> None:
        before, sets = dict(frame.env), False
        for item in node.items:
            call = item.context_expr
            text = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if isinstance(call, ast.Call) and text.startswith("envs.") and text.endswith(".override"):
                sets = True
                frame.env[text.split(".")[1]] = text_of(self.told(call.args[0], frame))
            elif text.endswith("patch.dict") and isinstance(call, ast.Call) and _is_environ(call.args):
                sets = True
                frame.env.update(env_of(self.told(call.args[1], frame), frame.module.place(call)))
            elif isinstance(call, ast.Call):
                self.or_unknown(call, frame)  # a function that launches, and waits for the end of the block
            if item.optional_vars is not None:
                self.bind(item.optional_vars, Unknown(frame.module.place(node), "what a with statement binds"), frame)
        try:
            self._block(node.body, frame)
        finally:
            if sets:
                frame.env.clear()
                frame.env.update(before)

    def bind(self, target: ast.expr, value: Any, frame: Frame) -> None:
        match target:
            case ast.Name(id=name):
                frame.names[name] = value
            case ast.Attribute(value=ast.Name(id="os"), attr="environ"):
                frame.env["os.environ"] = value if isinstance(value, Unknown) else None
            case ast.Attribute(value=holder, attr=attribute):
                owner = self.or_unknown(holder, frame)
                if isinstance(owner, Unknown):  # type(self), say: whoever it is, its attribute cannot be told
                    value = owner
                    near = (frame.names.get(each.id) for each in ast.walk(holder) if isinstance(each, ast.Name))
                    owner = next((each for each in near if isinstance(each, Target)), None)
                if isinstance(owner, Target):
                    owner.set[attribute] = value
                elif isinstance(owner, Class):
                    owner.body[attribute] = value
            case ast.Subscript(value=holder, slice=key):
                held, at = self.or_unknown(holder, frame), self.or_unknown(key, frame)
                if isinstance(at, Unknown):
                    self._poison(holder, at, frame)
                elif isinstance(held, Environment) and isinstance(target.ctx, ast.Del):
                    held.env[str(at)] = None
                elif isinstance(held, Environment):
                    held.env[str(at)] = value if isinstance(value, Unknown) else text_of(value)
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
            raise self._refusal(function, frame, place, f"{function.node.name}() is a generator")
        if strange := oddities.of_function(function.node):
            raise self._refusal(function, frame, place, f"what {strange} makes of {function.node.name}()")
        static = any(ast.unparse(each) == "staticmethod" for each in function.node.decorator_list)
        if function.owner is not None and not static:
            arguments = [function.bound or function.owner, *arguments]
        parameters = [each.arg for each in (*spec.posonlyargs, *spec.args)]
        only = [each.arg for each in spec.kwonlyargs]
        if spec.vararg or spec.kwarg or len(arguments) > len(parameters) or named.keys() - {*parameters, *only}:
            raise self._refusal(function, frame, place, f"the arguments of {function.node.name}()")
        for each in (each for each in ast.walk(function.node) if isinstance(each, ast.Nonlocal)):
            unknown = Unknown(function.module.place(each), "a function inside another changes it")
            function.around.update(dict.fromkeys(each.names, unknown))
        names = {**function.defaults, **dict(zip(parameters, arguments, strict=False)), **named}
        inner = Frame(function.module, ChainedNames(names, function.around), frame.env, function.owner, frame.depth + 1)
        for name, value in names.items():
            inner.names[name] = value
        self._followed.add(id(function.node))
        try:
            self._block(function.node.body, inner)
        except _ReturnedError as returned:
            return self.known(returned.value, f"{function.node.name}()")
        return None

    def hand_over(self, function: Function, frame: Frame, node: ast.Call) -> None:
        place = frame.module.place(node)
        self._refusal(function, frame, place, f"{ast.unparse(node.func)}() may call {function.node.name}()")

    def _refusal(self, function: Function, frame: Frame, place: str, why: str) -> NotUnderstoodError:
        """Of a call that is not followed; a launch that it would have made, or what it sets, is not passed over in
        silence.
        """
        error = NotUnderstoodError(place, why)
        first = [each.arg for each in function.node.args.args[:1]] if function.owner is not None else []
        names = {**function.around, **dict.fromkeys(first, function.bound or function.owner)}
        if function.node not in self._spoiling:
            self._spoiling.append(function.node)
            for statement in function.node.body:
                self._spoil([statement], Frame(function.module, names, frame.env, function.owner), error)
            self._spoiling.pop()
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
                if not isinstance(size, int):
                    raise NotUnderstoodError(place, f"a tp_size that is no number: {size!r:.60}")
                words += ["--tp", str(size)] if size > 1 and "--tp" not in words else []
                words += [each for each in _ALWAYS if each not in words]
            env = {**frame.env, **env_of(values.get("env"), place)}
            for each, text in env.items():
                self.known(text, each)
            within = self._at if self._at and frame.module is not self._module else place  # not where a fixture is
            launch = Launch(
                self._word(model, place),
                tuple(words),
                tuple(sorted((key, value) for key, value in env.items() if isinstance(value, str))),
                self._test,
                within,
            )
            self.launches.setdefault(launch)
        except NotUnderstoodError as error:
            self._problem(place, error)
        return Unknown(place, "a process")

    def _word(self, value: Any, place: str) -> str:
        if isinstance(value, Unknown):
            raise NotUnderstoodError(value.place, value.why)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise NotUnderstoodError(place, f"an argument that is no string: {value!r:.60}")
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in str(value)):
            raise NotUnderstoodError(place, f"an argument that no program can be given: {value!a:.60}")
        return str(value)


def _is_environ(arguments: Sequence[ast.expr]) -> bool:
    return len(arguments) == 2 and ast.unparse(arguments[0]).strip("'\"") == "os.environ"
