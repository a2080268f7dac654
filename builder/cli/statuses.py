"""What the exit statuses mean, for all verbs and for each."""

from __future__ import annotations

from builder.cli.verbs import Verb
from builder.errors import CANNOT_RUN

#: What each status means, and what it means for some verbs in particular.
MEANS: dict[int, str] = {
    0: "done",
    1: "defect",
    2: "usage or manifest",
    10: "something is cold",
    11: "some tasks failed, were partial, timed out or were skipped",
    12: CANNOT_RUN,
    13: "GPUs were not released",
    14: "the budget ended with tasks still cold",
    15: "cache or GPUs are busy",
    16: "the engine was lost",
    17: "deferred: the machine was never idle",
}
MEANS_OF: dict[str, dict[int, str]] = {
    "warm": {0: "all tasks are warm"},
    "check": {0: "all tasks are warm, or --on-cold warn"},
    "explain": {0: "done, warm or cold"},
    "env": {0: "done, and all tasks are warm"},
    "refresh": {0: "all tasks are warm"},
    "verify": {0: "every entry is valid", 10: "an entry is bad"},
    "import-tests": {0: "all launches are covered and recorded", 10: "a launch is not covered, or not recorded"},
    "audit": {10: "something was compiled (--fail-on-jit)"},
    "view": {10: "nothing is warm (create), or something was compiled (--fail-on-jit)"},
}
COMMON = (1, 2, 12, 16)


def statuses(name: str, verb: Verb) -> str:
    """Return the exit statuses of a verb, in one sentence."""
    if verb.needs == "command":
        return "exit status: the command's; 2 usage"
    meanings = {**MEANS, **MEANS_OF.get(name, {})}
    if verb.text or verb.shown:
        meanings[12] += ", or the result could not be written"
    codes = {*verb.exits, *COMMON} - (set() if verb.engine else {16})
    parts = [f"{code} {meanings[code]}" for code in sorted(codes)]
    return "exit status: " + "; ".join([*parts, "129, 130 or 143 a signal"])


STATUSES = (
    "exit status: 0 done (warm, check, env, refresh: all is warm) · 1 defect · 2 usage or manifest · 10 cold (check, "
    "env), bad entries (verify), launches not covered (import-tests), something compiled (audits) · 11 some tasks "
    "failed, partial, timed out or skipped · 12 this machine can't run it, or the result could not be written · 13 "
    "GPUs not released · 14 budget exhausted · 15 cache or GPUs busy · 16 engine lost · 17 deferred (refresh) · "
    "129/130/143 signal · hold: CMD's. Where several apply: signal, 1, 16, 13, 14, 11."
)
