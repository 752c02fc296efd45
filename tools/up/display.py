"""How `perdure up` shows what it does: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_STEP = 0.25
"""Without a terminal a bar is a line each quarter."""


class Display(Protocol):
    """Bars are known by their title; a fraction lies between 0 and 1."""

    def bar(self, title: str, fraction: float, note: str = "") -> None:
        """Show a bar, or move the one of that title."""
        ...

    def line(self, text: str) -> None:
        """Show a line above the bars."""
        ...

    def close(self) -> None:
        """No bars from here on; what they last showed stays."""
        ...


class BarDisplay:
    """For people at a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None

    def bar(self, title: str, fraction: float, note: str = "") -> None:
        progress = self._started()
        if title not in self._tasks:
            self._tasks[title] = progress.add_task(title, total=1.0, note=note)
        progress.update(self._tasks[title], completed=min(1.0, fraction), note=note)

    def line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()

    def _started(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(bar_width=32),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self._console,
            )
            self._progress.start()
        return self._progress


class PlainDisplay:
    """For files and pipes."""

    def __init__(self, file: TextIO | None = None) -> None:
        # None: standard output.
        self._file = file
        self._shown: dict[str, tuple[int, str]] = {}

    def bar(self, title: str, fraction: float, note: str = "") -> None:
        step = int(min(1.0, fraction) / PLAIN_STEP)
        if self._shown.get(title) != (step, note):
            self._shown[title] = (step, note)
            self.line(f"{title}: {fraction:.0%}{f' ({note})' if note else ''}")

    def line(self, text: str) -> None:
        # Whoever read our lines may be gone; the cluster is not for that.
        with suppress(BrokenPipeError):
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        self._shown.clear()


def display_for_stdout() -> Display:
    """Bars if standard output is a terminal, else lines."""
    console = Console()
    return BarDisplay(console) if console.is_terminal and sys.stdout.isatty() else PlainDisplay()


def display_for_stderr() -> Display:
    """The same on standard error, for a command whose output is its answer."""
    console = Console(stderr=True)
    return BarDisplay(console) if console.is_terminal and sys.stderr.isatty() else PlainDisplay(sys.stderr)
