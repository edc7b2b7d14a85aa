"""The targets table as text, as Markdown and as a plot."""

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import torpor


@dataclass(frozen=True)
class Figure:
    """One measured line: medians, in `unit`."""

    what: str
    unit: str
    value: float | None
    raw: float | None
    peer: float | None
    limit: float
    target: str
    note: str

    def cells(self) -> list[str]:
        def number(x: float | None) -> str:
            return "-" if x is None else f"{x:.2f}" if self.unit == "x" else f"{x:.1f}"

        ratio = "-" if self.value is None or not self.raw else f"{self.value / self.raw:.2f}"
        verdict = self.note or "-" if self.value is None else "met" if self.value <= self.limit else "missed"
        limit = f"{number(self.limit)} {self.unit}"
        return [
            self.what,
            number(self.value),
            number(self.raw),
            ratio,
            number(self.peer),
            f"{self.target} = {limit}" if self.raw else self.target,
            verdict,
        ]


TITLES = ["what", "torpor", "raw", "ratio", "runc(+criu)", "target", ""]


def table(found: Sequence[Figure]) -> str:
    lines = [TITLES, *(f.cells() for f in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(TITLES))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in (0, 5, 6) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(found: Sequence[Figure]) -> str:
    lines = [TITLES, ["---"] * len(TITLES), *(f.cells() for f in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(found: Sequence[Figure]) -> str:
    """Horizontal bars of value / target: the line at 1 is the target, a tick the raw write or read."""
    bars = [f for f in found if f.value is not None]
    left, width, high, top = 330, 420, 20, 30
    scale = width / max([2.0, *(min(f.value / f.limit, 4.0) for f in bars if f.value is not None)])
    size = f'width="{left + width + 90}" height="{top + high * len(bars) + 30}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">time / target (the line is the target, the tick a raw write or read)</text>',
    ]
    for i, f in enumerate(bars):
        assert f.value is not None
        y = top + i * high
        share = f.value / f.limit
        colour = "#4c956c" if share <= 1 else "#c1553b"
        bar = min(share, 4.0) * scale
        out.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(f.what)}</text>')
        out.append(f'<rect x="{left}" y="{y + 2}" width="{bar:.1f}" height="{high - 6}" fill="{colour}"/>')
        out.append(f'<text x="{left + bar + 6:.1f}" y="{y + 13}">{f.value:.4g} {f.unit}</text>')
        if f.raw:
            x = left + f.raw / f.limit * scale
            out.append(f'<path d="M{x:.1f} {y + 1}V{y + high - 3}" stroke="black" stroke-width="2"/>')
    bottom = top + high * len(bars)
    out.append(f'<path d="M{left + scale:.1f} {top}V{bottom}" stroke="#555" stroke-dasharray="4 3"/></svg>')
    return "\n".join(out) + "\n"


def write(docs: Path, found: Sequence[Figure], runs: int, with_criu: bool) -> None:
    """Write benchmarks.md and its plot."""
    (docs / "benchmarks.svg").write_text(plot(found))
    today = datetime.datetime.now(datetime.UTC).date()
    load = os.getloadavg()[0]
    peer = "runc with criu" if with_criu else "runc alone, since no criu that works on this kernel was there"
    (docs / "benchmarks.md").write_text(
        f"""# Benchmarks

Written by `make bench` (benches/bench.py) on {today}: torpor {torpor.__version__}, Linux {platform.release()}, {os.cpu_count()} CPUs, load {load:.1f} at
the end. Medians of {runs} runs in milliseconds where no other unit is said. `raw` is write(2) and fsync, or read(2) into fresh memory, of the same bytes in
the same directory in the same run; `ratio` is torpor's time by that. The last but two columns: {peer}. Times are those of whole commands,
Python's start included. Every byte is checked by the program after every restore.

{markdown(found)}

![time by target](benchmarks.svg)
"""
    )
