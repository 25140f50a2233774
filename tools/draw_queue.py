"""Draws docs/queue.svg, Q and who served over the rows of a run: python tools/draw_queue.py OUT PICTURE [ZOO]"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from messcli.report.svg import STYLE, Chart, Series
from messcli.zoo import load_zoo

NEAR = 10  # requests on each side that a share is taken over


def picture(rows: list[dict[str, object]], names: Sequence[str]) -> str:
    """Two charts below each other; `names` are the models, smallest first."""
    at = [float(number) for number in range(1, len(rows) + 1)]
    queue = [float(str(row["queue"])) for row in rows]
    explored = [number for number, row in enumerate(rows) if row["explored"]]
    shares, low = [], [0.0] * len(rows)
    for name in names:
        top = []
        for number, below in enumerate(low):
            near = [row["model"] for row in rows[max(0, number - NEAR) : number + NEAR + 1]]
            top.append(below + near.count(name) / len(near))
        shares.append(Series(name, at, top, "area", low=low))
        low = top
    marks = Series("explored", [at[n] for n in explored], [queue[n] for n in explored], "points", colour=3)
    line = Series("queue", at, queue, colour=7)
    over = (1.0, at[-1])
    charts = [
        Chart("Q: accuracy owed", "request", "queue", [line, marks], x_range=over, height=260),
        Chart(
            f"Who served ({2 * NEAR + 1} requests around each)", "request", "share of requests", shares,
            x_range=over, y_range=(0.0, 1.0), height=260,
        ),
    ]  # fmt: skip
    width, height = charts[0].width, sum(chart.height for chart in charts)
    drawn = "".join(
        f'<g transform="translate(0 {chart.height * place})">\n{chart.svg(standalone=False)}</g>\n'
        for place, chart in enumerate(charts)
    )
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="The queue and the models that served, request by request">\n'
        f'<style>{STYLE}</style>\n<rect class="paper" width="100%" height="100%"/>\n{drawn}</svg>\n'
    )


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    served = [row for row in map(json.loads, lines) if row["model"] is not None]
    names = load_zoo(sys.argv[3] if len(sys.argv) > 3 else None).names
    Path(sys.argv[2]).write_text(picture(served, names), encoding="utf-8")
