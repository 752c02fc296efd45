"""A benchmark's numbers as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    subject: str
    workload: str
    value: float
    unit: str
    # What the hardware or a peer reaches, in the same unit, measured in the same run; and what it is.
    against: float | None = None
    what: str = ""
    higher_is_better: bool = False

    @property
    def share(self) -> float | None:
        """1: as good as what it is compared with; above: better."""
        if self.against is None:
            return None
        return self.value / self.against if self.higher_is_better else self.against / self.value


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    # Device and versions.
    conditions: dict[str, str]
    rows: list[Row] = field(default_factory=list[Row])


def publish(report: Report, json_path: Path | None, plot_path: Path | None) -> None:
    """Print the table; write the files that were asked for."""
    table = Table(title=report.title)
    for column in ("subject", "workload"):
        table.add_column(column)
    for column in ("value", "unit", "against", "share"):
        table.add_column(column, justify="right")
    table.add_column("measured against")
    for row in report.rows:
        against = "" if row.against is None else f"{row.against:,.2f}"
        share = "" if row.share is None else f"{row.share:.3f}"
        table.add_row(row.subject, row.workload, f"{row.value:,.2f}", row.unit, against, share, row.what)
    console = Console(width=150)
    console.print(*(f"{name}: {value}" for name, value in report.conditions.items()), sep="\n")
    console.print(table)
    if json_path is not None:
        rows = [{**asdict(row), "share": row.share} for row in report.rows]
        text = {"title": report.title, "conditions": report.conditions, "rows": rows}
        json_path.write_text(json.dumps(text, indent=2) + "\n")
    if plot_path is not None:
        _plot(report, plot_path)


def _plot(report: Report, path: Path) -> None:
    # Only here: a bare machine prints tables without it.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.rows if row.share is not None]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * len(rows)))
    names = [f"{row.subject}, {row.workload}\nagainst {row.what}" for row in rows]
    bars = axes.barh(names, [row.share or 0 for row in rows], color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("our share of it (above 1: better)")
    axes.set_title(report.title)
    figure.tight_layout()
    figure.savefig(path)
