"""Tables for people, from the rows of views."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tools.ctl.views import FAILURE_STEPS, Row, words

GOOD = frozenset({"live", "ready", "leading", "serving"})
BAD = frozenset({"lost", "closed", "exited", "degraded", "failed", "unreachable", "frozen"})


def status_tables(status: Row) -> Group:
    """Leader line, then deployments, nodes, replicas and gateways."""
    leader = status["leader"]
    if leader is None:
        head = Text(f"cluster {status['cluster']}: no leader (answered by {status['answered_by']})", style="red")
    else:
        head = Text.assemble(
            f"cluster {status['cluster']}: leader {leader['id']} (pid {leader['pid']}, {leader['address']}), ",
            f"term {leader['term']}, ",
            state_text(leader["state"]),
        )
    parts: list[RenderableType] = [
        head,
        *([Text(status["limited"], style="yellow")] if status["limited"] else []),
        deployments_table(status["deployments"]),
        nodes_table(status["nodes"]),
        replicas_table(status["replicas"]),
        gateways_table(status["gateways"]),
    ]
    if status["fenced"]:
        counts = words(f"{count} {frame}" for frame, count in status["fenced"].items())
        parts.append(Text(f"frames refused as stale: {counts}"))
    return Group(*parts)


def deployments_table(rows: list[Row]) -> Table:
    table = _table("deployment", "model", "ready", "degrees", "spares", "numerics", "reason")
    for row in rows:
        ready = f"{row['ready']} of {row['replicas']}"
        spares = f"{row['spares_ready']} of {row['spares']}" if row["spares"] else ""
        table.add_row(row["id"], row["model"], ready, _degrees(row), spares, row["numerics"], row["reason"])
    return table


def _degrees(row: Row) -> str:
    return f"tp {row['tensor']} · pp {row['pipeline']} · ep {row['expert']}"


def nodes_table(rows: list[Row]) -> Table:
    table = _table(
        "node", "host", "pid", "state", "rank", "rank pid", "device", "rank state", "replica", "holds", "reason"
    )
    for row in rows:
        node = (row["id"], row["host"], str(row["pid"]), state_text(row["state"]))
        ranks = row["ranks"] or [None]
        for index, rank in enumerate(ranks):
            cells = node if index == 0 else ("", "", "", "")
            reason = row["reason"] if index == 0 else ""
            if rank is None:
                table.add_row(*cells, "", "", "", "", "", "", reason)
                continue
            replica = f"{rank['replica']} @ {rank['epoch']}" if rank["replica"] else ""
            where = (str(rank["rank"]), str(rank["pid"]), rank["device"], state_text(rank["state"]))
            table.add_row(*cells, *where, replica, rank["holds"], reason)
    return table


def replicas_table(rows: list[Row]) -> Table:
    table = _table(
        "replica",
        "state",
        "epoch",
        "degrees",
        "running",
        "waiting",
        "free blocks",
        "step",
        "numerics",
        "nodes",
        "reason",
    )
    for row in rows:
        state = state_text(row["state"])
        if row["state"] == "loading":
            state.append(f" {row['load_fraction']:.0%} {row['load_stage']}")
        blocks = f"{row['free_blocks']} of {row['total_blocks']}"
        counts = (_degrees(row), str(row["running"]), str(row["waiting"]), blocks, f"{row['step_ms']} ms")
        numerics = row["numerics"].partition(":")[0]
        table.add_row(row["id"], state, str(row["epoch"]), *counts, numerics, words(row["nodes"]), row["reason"])
    return table


def gateways_table(rows: list[Row]) -> Table:
    table = _table("gateway", "pid", "url", "open requests")
    for row in rows:
        table.add_row(row["id"], str(row["pid"]), row["url"], str(row["open_requests"]))
    return table


def requests_table(rows: list[Row]) -> Table:
    table = _table("request", "state", "age", "gateway", "replica", "attempt", "prompt", "max", "priority", "tenant")
    for row in rows:
        replica = f"{row['replica']} @ {row['epoch']}" if row["replica"] else ""
        counts = (str(row[key]) for key in ("attempt", "prompt_tokens", "max_tokens", "priority"))
        age = f"{row['age_ms'] / 1000:.1f} s"
        table.add_row(row["id"], row["state"], age, row["gateway"], replica, *counts, row["tenant"])
    return table


def failures_table(rows: list[Row]) -> Table:
    """One line a failure; steps are times since it was noticed."""
    steps = [step.replace("_", " ") for step in FAILURE_STEPS]
    table = _table("noticed", "replica", *steps, "requests", "longest gap", "reason")
    for row in rows:
        time = datetime.fromisoformat(row["time"]).time().isoformat("milliseconds")
        epochs = f"{row['replica']} @ {row['epoch']} → {row['next_epoch'] or '?'}"
        cells = ["-" if row["steps_ms"][step] is None else f"{row['steps_ms'][step]} ms" for step in FAILURE_STEPS]
        waiting = f" ({row['silent']} wait)" if row["silent"] else ""
        counts = (f"{row['requests']}{waiting}", f"{row['gap_ms_max']} ms" if row["gap_ms_max"] else "-")
        table.add_row(Text(time), epochs, *cells, *counts, row["reason"], style=None if row["over"] else "yellow")
    return table


def event_line(row: Row) -> Text:
    """One event: time, name, whom it concerns, why."""
    time = datetime.fromisoformat(row["time"]).time().isoformat("milliseconds")
    subjects = [f"{key} {row[key]}" for key in ("node", "replica", "request") if row[key]]
    if row["epoch"]:
        subjects.append(f"epoch {row['epoch']}")
    subjects += [f"{key} {value}" for key, value in row["details"].items()]
    text = Text.assemble((time, "dim"), " ", (row["name"], "bold"), "  ", ", ".join(subjects))
    if row["reason"]:
        text.append(f"  ({row['reason']})", style="yellow")
    return text


def state_text(state: str) -> Text:
    style = "green" if state in GOOD else "red" if state in BAD else "yellow"
    return Text(state, style=style)


def show(content: RenderableType) -> None:
    """Print to standard output; without a terminal wide enough that no cell is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(content)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim", title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
