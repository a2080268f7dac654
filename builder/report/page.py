"""One HTML page of an overview: no script, no request, light and dark, for any width; opened from a file.

Names come from caches, jobs and manifests of other users: every text is escaped, and the page forbids scripts.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from builder.report.overview import JobJit, Overview, PastTask, ProvenTask, jit_line, moment
from builder.text import counted, duration, size

#: Rows and columns that are shown.
_MOST_TASKS, _MOST_TOOLCHAINS, _MOST_JOBS = 300, 8, 200
#: Per cent of the time line that a bar takes at least.
_LEAST_WIDTH = 0.4
_GOOD, _BAD = frozenset(("warmed", "warm", "verified", "steady")), frozenset(("failed", "stopped"))
_STYLE = """\
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #fff; --well: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; --fair: #9a6700; --bar: #0969da; --second: #8250df; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
  --well: #151b23; --good: #3fb950; --bad: #f85149; --fair: #d29922; --bar: #4493f8; --second: #ab7df8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; } td.text { min-width: 12rem; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); } .fair { color: var(--fair); }
.lane, .row { display: grid; grid-template-columns: 9rem 1fr; gap: .5rem; align-items: center; }
.lane > :first-child, .row > :first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.track { position: relative; height: 1.5rem; background: var(--well); border-bottom: 1px solid var(--line); }
.bar { position: absolute; top: 2px; bottom: 2px; overflow: hidden; white-space: nowrap; padding: 0 .25rem;
  font-size: .75rem; line-height: 1.25rem; color: #fff; background: #1a7f37; border-radius: 2px; }
.bar.failed { background: #cf222e; } .bar.other { background: #9a6700; } .bar.prebuild { background: #8250df; }
.amount { height: .75rem; background: var(--bar); min-width: 1px; display: inline-block; vertical-align: middle; }
.amount.prebuild { background: var(--second); } .row > :last-child { white-space: nowrap; overflow: hidden; }
@media (max-width: 40rem) { body { padding: .5rem; } .lane, .row { grid-template-columns: 6rem 1fr; } }
"""
_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>warm-cache: {title}</title>
<style>
{style}</style>
</head>
<body>
"""


def page(overview: Overview, *, now: float) -> str:
    """Return the page. now: seconds since the epoch."""
    parts = [_HEAD.format(title=_text(overview.root), style=_STYLE)]
    parts.append(f"<h1>{_text(overview.root)}</h1>\n<p class=soft>warm-cache report of {moment(now)} UTC</p>\n")
    parts += [f"<p class=fair>{_text(problem)}</p>\n" for problem in overview.problems]
    parts += _proven(overview)
    parts += _timeline(overview)
    parts += _stages(overview)
    parts += _families(overview)
    parts += _jobs(overview)
    parts.append("</body>\n</html>\n")
    return "".join(parts)


def _proven(overview: Overview) -> Iterable[str]:
    yield "<h2>Tasks and toolchains</h2>\n"
    if not overview.proven:
        yield "<p>No task has a marker.</p>\n"
        return
    newest: dict[str, float] = {}
    cells = {}
    for each in sorted(overview.proven, key=lambda one: one.written):
        newest[each.toolchain] = each.written
        cells[each.task, each.toolchain] = each
    columns = sorted(newest, key=lambda name: newest[name], reverse=True)
    tasks = sorted({each.task for each in overview.proven})
    rows = [
        [_text(task), *(_cell(cells.get((task, column))) for column in columns[:_MOST_TOOLCHAINS])]
        for task in tasks[:_MOST_TASKS]
    ]
    yield _table(["task", *columns[:_MOST_TOOLCHAINS]], rows)
    yield _more(len(tasks) - _MOST_TASKS, "more task") + _more(len(columns) - _MOST_TOOLCHAINS, "more toolchain")


def _cell(proven: ProvenTask | None) -> str:
    if proven is None:
        return "–"
    kind = "good" if proven.proof in _GOOD else "fair"
    return f"<span class={kind}>{_text(proven.proof)}</span><br><span class=soft>{moment(proven.written)}</span>"


def _timeline(overview: Overview) -> Iterable[str]:
    yield "<h2>Runs</h2>\n"
    runs = overview.latest()
    if not runs:
        yield "<p>No run is recorded.</p>\n"
    for number, (name, tasks) in enumerate(runs):
        began, ended = min(each.began for each in tasks), max(each.began + each.seconds for each in tasks)
        yield f"<details{' open' if number == 0 else ''}><summary>{moment(began)} UTC, run {_text(name)}, "
        yield f"{counted(len(tasks), 'task')} in {duration(ended - began)}</summary>\n"
        yield from _lanes(tasks, began, max(ended - began, 0.001))
        yield _table(
            ["task", "state", "took", "GPUs", "#kernels", "#bytes", "reason"],
            [_past(each) for each in tasks[:_MOST_TASKS]],
            wrapped="reason",
        )
        yield _more(len(tasks) - _MOST_TASKS, "more task") + "</details>\n"


def _lanes(tasks: Sequence[PastTask], began: float, whole: float) -> Iterable[str]:
    """Yield one line for each GPU, and one for what used none."""
    lanes: dict[tuple[str, int], list[PastTask]] = {}
    for task in tasks:
        for gpu in task.gpus or (-1,):
            lanes.setdefault((task.host, gpu), []).append(task)
    for (host, gpu), members in sorted(lanes.items()):
        name = f"GPU {gpu}" if gpu >= 0 else "no GPU"
        yield f'<div class=lane><span title="{_text(host)}">{name} <span class=soft>{_text(host)}</span></span>'
        yield "<div class=track>"
        for task in members:
            left = min(max(0.0, (task.began - began) / whole * 100), 100.0)
            width = min(max(_LEAST_WIDTH, task.seconds / whole * 100), 100.0 - left)
            kind = "prebuild" if task.stage == "prebuild" else "" if task.state in _GOOD else "other"
            kind = "failed" if task.state in _BAD else kind
            label = _text(f"{task.label}: {task.state}, {duration(task.seconds)}")
            yield f'<div class="bar {kind}" style="left:{left:.2f}%;width:{width:.2f}%" title="{label}">'
            yield f"{_text(task.label)}</div>"
        yield "</div></div>\n"


def _past(task: PastTask) -> list[str]:
    kind = "good" if task.state in _GOOD else "bad" if task.state in _BAD else "fair"
    gpus = ", ".join(map(str, task.gpus)) or "–"
    added = size(sum(task.added_bytes.values()))
    state = f"<span class={kind}>{_text(task.state)}</span>"
    return [_text(task.label), state, duration(task.seconds), gpus, str(task.kernels), added, _text(task.reason)]


def _stages(overview: Overview) -> Iterable[str]:
    yield "<h2>Kernels by stage</h2>\n<p class=soft>Compiled on processor cores before the tasks, and on GPUs.</p>\n"
    runs = [
        (tasks, [sum(each.kernels for each in tasks if each.stage == stage) for stage in ("prebuild", "task")])
        for _, tasks in overview.latest()
    ]
    most = max([sum(made) for _, made in runs] or [0])
    for tasks, (prebuilt, on_gpus) in runs:
        bars = _amount(prebuilt, most, "prebuild") + _amount(on_gpus, most)
        yield f"<div class=row><span>{moment(tasks[0].began)}</span><span>{bars} {prebuilt} + {on_gpus}</span></div>\n"


def _families(overview: Overview) -> Iterable[str]:
    yield "<h2>Bytes by family</h2>\n"
    if not overview.families:
        yield "<p>No family has an entry.</p>\n"
    most = max([each.bytes for each in overview.families] or [0])
    for each in sorted(overview.families, key=lambda one: one.bytes, reverse=True):
        amount = f"{_amount(each.bytes, most)} {size(each.bytes)}, {each.entries:,}"
        yield f"<div class=row><span>{_text(each.family)}</span><span>{amount}</span></div>\n"


def _jobs(overview: Overview) -> Iterable[str]:
    yield f"<h2>Compiled in jobs</h2>\n<p>{_text(jit_line(overview))}</p>\n"
    jobs: list[JobJit] = sorted(overview.jobs, key=lambda job: job.seconds, reverse=True)
    if jobs:
        rows = [
            [_text(job.job), _text(job.build or "–"), _text(job.family), str(job.kernels), f"{job.seconds:.0f} s"]
            for job in jobs[:_MOST_JOBS]
        ]
        yield _table(["job", "build", "family", "#kernels", "#about"], rows)
        yield _more(len(jobs) - _MOST_JOBS, "more row")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], wrapped: str = "") -> str:
    """Return a table. columns: texts; numbers are below those that begin with ``#``. rows: of HTML."""
    kinds = ["number" if name.startswith("#") else "text" if name == wrapped else "" for name in columns]
    marks = [f" class={kind}" if kind else "" for kind in kinds]
    head = "".join(f"<th{mark}>{_text(name.lstrip('#'))}</th>" for name, mark in zip(columns, marks, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{cell}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"


def _amount(value: float, most: float, kind: str = "") -> str:
    return f'<span class="amount {kind}" style="width:{value / most * 60:.1f}%"></span>' if value and most else ""


def _more(number: int, noun: str) -> str:
    return f"<p class=soft>and {counted(number, noun)}</p>\n" if number > 0 else ""


def _text(text: str) -> str:
    """Return the text as HTML shows it, also in an attribute in double quotes."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True)
