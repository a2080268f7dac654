"""What the exit statuses mean, for all verbs and for each."""

from __future__ import annotations

from builder.cli.verb import Verb
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
    "fleet": {0: "done, or every run of a summary is warm", 10: "a run of a summary ended with it"},
    "sign": {12: "the registry refused", 16: "the registry was lost"},
    "push": {10: "nothing is warm", 12: f"{CANNOT_RUN}, or the registry refused", 16: "registry or engine was lost"},
    "pull": {
        0: "done, or --fail-open",
        12: "refused: signature, content or registry; or nothing fits this machine",
        16: "registry or engine was lost",
    },
    "audit": {10: "something was compiled (--fail-on-jit)"},
    "view": {10: "nothing is warm (create), or something was compiled (--fail-on-jit)"},
}
#: What to do about each, for people.
REMEDIES: dict[int, str] = {
    0: "nothing",
    1: "run again with `-v`, and report the traceback",
    2: "read the list: every problem is there, with its line and the name that was probably meant",
    10: "`warm-cache explain` says why; `warm-cache warm` compiles what is cold",
    11: "read the log of each task that is named; what was finished stays warm, and a second run tries the rest",
    12: "read the list: each problem has its remedy; `warm-cache doctor` shows the same without a run",
    13: "end the process that is named; nothing more was started",
    14: "run again to go on: what was finished stays warm; or raise `--budget`",
    15: "wait for the builder that is named, or raise `--lock-timeout`",
    16: "start the engine (or reach the registry) and run again; nothing of the run stays: `warm-cache sweep`",
    17: "nothing was pulled or warmed; the next nightly run tries again",
    130: "run again to go on: what was finished stays warm",
}
COMMON = (1, 2, 12, 16)


def codes(verb: Verb) -> tuple[int, ...]:
    """Return the statuses that a verb may end with, besides a signal's; none for the command of `hold`."""
    if verb.needs == "command":
        return ()
    return tuple(sorted({*verb.exits, *COMMON} - (set() if verb.engine else {16})))


def statuses(name: str, verb: Verb) -> str:
    """Return the exit statuses of a verb, in one sentence."""
    if verb.needs == "command":
        return "exit status: the command's; 2 usage"
    meanings = {**MEANS, **MEANS_OF.get(name, {})}
    if verb.text or verb.shown:
        meanings[12] += ", or the result could not be written"
    parts = [f"{code} {meanings[code]}" for code in codes(verb)]
    return "exit status: " + "; ".join([*parts, "129, 130 or 143 a signal"])


STATUSES = (
    "exit status: 0 done (warm, check, env, refresh: all is warm) · 1 defect · 2 usage or manifest · 10 cold (check, "
    "env), bad entries (verify), launches not covered (import-tests), something compiled (audits) · 11 some tasks "
    "failed, partial, timed out or skipped · 12 this machine can't run it, or the result could not be written · 13 "
    "GPUs not released · 14 budget exhausted · 15 cache or GPUs busy · 16 engine lost · 17 deferred (refresh) · "
    "129/130/143 signal · hold: CMD's. Where several apply: signal, 1, 16, 13, 14, 11."
)
