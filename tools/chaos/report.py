"""The report of a run: Markdown, and a picture of every stream and fault."""

from __future__ import annotations

from pathlib import Path

from protos.perdure.v1 import admin_pb2
from tools.chaos.rounds import Outcome, Result
from tools.ctl.views import FAILURE_STEPS, failures_view

PICTURE = "timeline.png"

LABEL_ROWS = 2
"""Height of a fault's label above the streams, in streams."""


def write_report(result: Result, folder: Path) -> Path:
    """Write report.md and timeline.png into `folder`. The report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(result, folder / PICTURE)
    path = folder / "report.md"
    path.write_text(render(result), encoding="utf-8")
    return path


def render(result: Result) -> str:
    """The whole report as Markdown."""
    usual = result.undisturbed.longest_gap_s
    failed = sum(not outcome.passed for outcome in result.rounds)
    count = len(result.undisturbed.load.streams)
    verdict = "Every stream ended as if nothing had been." if not failed else f"**{failed} rounds failed.**"
    lines = [
        "# Chaos report",
        "",
        f"{verdict} {count} streams a round; the longest gap of the undisturbed run was {usual * 1000:.0f} ms.",
        "",
        "| round | streams as undisturbed | new requests served | longest gap, ms | slowest new request, ms |",
        "|---|---|---|---|---|",
        *(_row(outcome) for outcome in (result.undisturbed, *result.rounds)),
        "",
        f"![each stream's events and the faults]({PICTURE})",
    ]
    for outcome in result.rounds:
        lines += ["", f"## {outcome.title}", "", *_story(outcome)]
    return "\n".join(lines) + "\n"


def draw(result: Result, path: Path) -> None:
    """One panel a round: a row a stream, a tick an event, a line a fault."""
    # Only here: a serving host does without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    outcomes = (result.undisturbed, *result.rounds)
    figure = Figure(figsize=(11, 2.2 * len(outcomes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(outcomes), 1, squeeze=False)[:, 0]
    for panel, outcome in zip(panels, outcomes, strict=True):
        times = [[at - outcome.begun for at in stream.times] for stream in outcome.load.streams]
        colours = ["tab:red" if index in outcome.differing else "tab:blue" for index in range(len(times))]
        panel.eventplot(times, lineoffsets=list(range(len(times))), linelengths=0.8, linewidths=0.4, colors=colours)
        for number, (at, what) in enumerate(sorted(outcome.inflicted)):
            panel.axvline(at - outcome.begun, color="black", linewidth=1)
            panel.text(at - outcome.begun, len(times) + LABEL_ROWS * number, f" {what}", fontsize=7, va="bottom")
        panel.set_ylim(-1, len(times) + LABEL_ROWS * max(len(outcome.inflicted), 1))
        panel.set_yticks([0, len(times) - 1])
        panel.set_title(f"{outcome.title} — longest gap {outcome.longest_gap_s * 1000:.0f} ms", fontsize=9, loc="left")
        panel.set_ylabel("stream", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[-1].set_xlabel("seconds since the round began", fontsize=8)
    figure.savefig(path, dpi=110)


def _row(outcome: Outcome) -> str:
    streams, new = outcome.load.streams, outcome.load.new
    same = len(streams) - len(outcome.differing)
    asked = new.served + len(new.failed)
    return (
        f"| {outcome.title} | {same} of {len(streams)} | {new.served} of {asked} | "
        f"{outcome.longest_gap_s * 1000:.0f} | {new.longest_s * 1000:.0f} |"
    )


def _story(outcome: Outcome) -> list[str]:
    what = [(at, f"fault: {text}") for at, text in outcome.inflicted]
    what += [(at, _failure(failure)) for at, failure in outcome.failures]
    lines = [f"- {at - outcome.begun:.2f} s: {text}" for at, text in sorted(what)]
    if not outcome.failures:
        lines.append("- the leader recorded no failed replica")
    lines += [f"- stream {index}: {problem}" for index, problem in sorted(outcome.differing.items())]
    lines += [f"- a new request failed: {problem}" for problem in outcome.load.new.failed]
    return lines


def _failure(failure: admin_pb2.FailureStatus) -> str:
    (row,) = failures_view(admin_pb2.ListFailuresResponse(failures=[failure]))
    done = row["steps_ms"]
    steps = ", ".join(
        f"{step.replace('_', ' ')} after {done[step]} ms" for step in FAILURE_STEPS if done[step] is not None
    )
    what = f"{row['replica']} @ {row['epoch']} noticed as failed: {row['reason']}"
    return f"{what}; {row['requests']} requests; {steps}"
