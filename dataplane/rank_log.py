"""Where ranks and the zygote write what they print."""

from __future__ import annotations

from pathlib import Path

LOG_BYTES_MAX = 16 * 1024 * 1024


def rotate(path: Path) -> None:
    """Put a log that has grown past its bound aside, in place of the one put aside before."""
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))


def rank_log(folder: Path, device: str) -> Path:
    """The log of the ranks of one device."""
    return folder / f"rank-{device.replace(':', '-')}.log"
