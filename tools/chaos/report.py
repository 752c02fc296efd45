"""The report of a run: Markdown, and for each round a picture of every stream and fault."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path

from protos.perdure.v1 import admin_pb2
from tools.chaos.rounds import Outcome, Result
from tools.ctl.views import FAILURE_STEPS, failures_view, reason_text

REPORT = "report.md"

LABEL_ROWS = 1.4
"""Height of a fault's label above the streams, in streams."""

QUIET = frozenset({"failure_recovered", "requests_replayed", "request_resumed", "deployment_created"})
"""Events that tell an operator nothing beside what else is told, or are told as a number."""

MARKED = {"node_lost": "tab:orange", "leader_elected": "tab:purple", "replica_ready": "tab:green"}
"""Events that a picture shows, as dotted lines."""


def write_report(results: Sequence[Result], folder: Path) -> None:
    """Write the report as far as the run has come, and the picture of its last round, into `folder`. `results`: of one
    cluster after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    rounds = [outcome for result in results for outcome in result.rounds]
    draw(rounds[-1], folder / _picture(len(rounds)))
    (folder / REPORT).write_text(render(results), encoding="utf-8")


def render(results: Sequence[Result]) -> str:
    """The whole report as Markdown."""
    rounds = [outcome for result in results for outcome in result.rounds]
    failed = sum(not outcome.passed for outcome in rounds)
    count = max(len(result.undisturbed.load.streams) for result in results)
    verdict = (
        "Every stream ended as if nothing had been." if not failed else f"**{failed} of {len(rounds)} rounds failed.**"
    )
    lines = [
        "# Chaos report",
        "",
        f"{verdict} {count} streams at a time. Rows in italics: each cluster undisturbed, which is what its rounds are "
        f"compared with. As of {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}.",
        "",
        "| | round | verdict | streams as undisturbed | new requests served | longest gap, ms "
        "| slowest new request, ms | failed replicas: noticed, first token again, served again (ms) | whole again, s |",
        "|---|---|---|---|---|---|---|---|---|",
        *_rows(results),
        "",
        "*Longest gap*: between two events at one client, after the first fault. *Noticed*: since what was done last "
        "before. *First token again*, *served again*: since it was noticed. *Whole again*: since the last stream "
        "ended.",
    ]
    for number, outcome in enumerate(rounds, 1):
        lines += ["", f"## {number}. {outcome.title}: {outcome.verdict}", "", *_story(outcome)]
        lines += ["", f"![each stream's events and the faults]({_picture(number)})"]
    return "\n".join(lines) + "\n"


def draw(outcome: Outcome, path: Path) -> None:
    """A row a stream number, a tick an event, a line a fault; what differs from the undisturbed run is red."""
    # Only here: a serving host does without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    streams = outcome.load.streams
    rows = 1 + max((stream.number for stream in streams), default=0)
    # A line more for the legend.
    height = rows + LABEL_ROWS * (1 + max(len(outcome.inflicted), 1))
    figure = Figure(figsize=(11, 0.6 + 0.15 * height), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    if streams:
        panel.eventplot(
            [[at - outcome.begun for at in stream.times] for stream in streams],
            lineoffsets=[stream.number for stream in streams],
            linelengths=0.8,
            linewidths=0.6,
            colors=["tab:red" if place in outcome.differing else "tab:blue" for place in range(len(streams))],
        )
    for number, (at, what) in enumerate(sorted(outcome.inflicted)):
        panel.axvline(at - outcome.begun, color="black", linewidth=0.8)
        panel.text(at - outcome.begun, rows + LABEL_ROWS * number, f" {what}", fontsize=7, va="bottom")
    for at, event in outcome.events:
        if event.name in MARKED:
            panel.axvline(at - outcome.begun, color=MARKED[event.name], linewidth=0.8, linestyle=":")
    panel.legend(
        handles=[Line2D([], [], color=colour, linestyle=":", label=_words(name)) for name, colour in MARKED.items()],
        fontsize=7,
        loc="upper right",
        frameon=False,
        ncols=len(MARKED),
    )
    panel.set_ylim(-1, height)
    panel.set_yticks([0, rows - 1])
    panel.set_title(f"{outcome.title}: longest gap {outcome.longest_gap_s * 1000:.0f} ms", fontsize=9, loc="left")
    panel.set_ylabel("stream", fontsize=8)
    panel.set_xlabel("seconds since the round began", fontsize=8)
    panel.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def _picture(number: int) -> str:
    return f"round-{number:02}.png"


def _rows(results: Sequence[Result]) -> list[str]:
    rows: list[str] = []
    number = 0
    for result in results:
        title = f"*{result.name}: undisturbed*" if result.name else "*undisturbed*"
        rows.append(_row(None, title, result.undisturbed))
        for outcome in result.rounds:
            number += 1
            rows.append(_row(number, outcome.title, outcome))
    return rows


def _row(number: int | None, title: str, outcome: Outcome) -> str:
    streams, new = outcome.load.streams, outcome.load.new
    same = len(streams) - len(outcome.differing)
    asked = new.served + len(new.failed)
    phases = "; ".join(_phases(outcome)) or "none"
    whole = f"{outcome.whole_s:.1f}" if outcome.whole_s else "never"
    return (
        f"| {number or ''} | {title} | {outcome.verdict} | {same} of {len(streams)} | {new.served} of {asked} "
        f"| {outcome.longest_gap_s * 1000:.0f} | {new.longest_s * 1000:.0f} | {phases} | {whole} |"
    )


def _phases(outcome: Outcome) -> list[str]:
    """Of each failed replica the three times that count."""
    rows = failures_view(admin_pb2.ListFailuresResponse(failures=[failure for _, failure in outcome.failures]))
    told: list[str] = []
    for (noticed, _), row in zip(outcome.failures, rows, strict=True):
        before = [at for at, _ in outcome.inflicted if at <= noticed]
        after = round((noticed - max(before)) * 1000) if before else None
        token, regrouped = (row["steps_ms"][step] for step in ("first_token", "regrouped"))
        told.append(f"{row['replica']} @ {row['epoch']}: {_ms(after)}, {_ms(token)}, {_ms(regrouped)}")
    return told


def _ms(value: int | None) -> str:
    return "–" if value is None else str(value)


def _story(outcome: Outcome) -> list[str]:
    """What was done, what the cluster said, what was wrong; in the order of time."""
    what = [(at, f"**{text}**") for at, text in outcome.inflicted]
    what += [(at, _failure(failure)) for at, failure in outcome.failures]
    what += [(at, _event(event)) for at, event in outcome.events if event.name not in QUIET]
    lines = [f"- {problem}" for problem in _wrong(outcome)]
    for text, group in groupby(sorted(what), key=lambda item: item[1]):
        times = [at - outcome.begun for at, _ in group]
        until = f" to {times[-1]:.2f} s, {len(times)} times" if len(times) > 1 else " s"
        lines.append(f"- {times[0]:.2f}{until}: {text}")
    if not outcome.failures:
        lines.append("- the leaders recorded no failed replica")
    replayed = sum(int(event.details["requests"]) for _, event in outcome.events if event.name == "requests_replayed")
    resumed = sum(event.name == "request_resumed" for _, event in outcome.events)
    if replayed or resumed:
        lines.append(f"- replays routed: {replayed}; streams that went on at another gateway: {resumed}")
    return lines


def _wrong(outcome: Outcome) -> list[str]:
    streams = outcome.load.streams
    lines = [f"wrong: {problem}" for problem in outcome.problems]
    lines += [
        f"wrong: stream {streams[place].number}: {problem}" for place, problem in sorted(outcome.differing.items())
    ]
    return lines + [f"wrong: a new request failed: {problem}" for problem in outcome.load.new.failed]


def _event(event: admin_pb2.EventsResponse) -> str:
    named = [part for part in (event.node, f"{event.replica} @ {event.epoch}" if event.replica else "") if part]
    if event.name.startswith("leader"):
        named.append(f"(term {event.term})")
    if not named:
        named = [f"{name} {value}" for name, value in sorted(event.details.items())]
    reason = reason_text(event)
    return " ".join([_words(event.name), *named]) + (f": {reason}" if reason else "")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _failure(failure: admin_pb2.FailureStatus) -> str:
    (row,) = failures_view(admin_pb2.ListFailuresResponse(failures=[failure]))
    done = row["steps_ms"]
    steps = ", ".join(
        f"{step.replace('_', ' ')} after {done[step]} ms" for step in FAILURE_STEPS if done[step] is not None
    )
    # A gateway may leave a replica that it does not reach, and that has not failed.
    verb = "noticed as failed" if done["closed"] is not None else "left"
    what = f"{row['replica']} @ {row['epoch']} {verb}: {row['reason']}"
    return f"{what}; {row['requests']} requests; {steps}"
