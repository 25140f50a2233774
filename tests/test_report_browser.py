"""The report page in a real browser, light and dark, wide and on a phone: no error, nothing that sticks out."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from messcli.report import make_report
from messcli.report.numbers import Load
from messcli.report.page import page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is in PATH")

# Runs in the page that holds the report in a frame: what sticks out of the page, of a chart or of a card.
MEASURE = """
<script>
addEventListener('load', () => {
  const view = document.querySelector('iframe').contentWindow, page = view.document;
  const out = [];
  const root = page.documentElement;
  if (root.scrollWidth > root.clientWidth) out.push('page: ' + root.scrollWidth + ' of ' + root.clientWidth);
  for (const svg of page.querySelectorAll('svg')) {
    const box = svg.viewBox.baseVal;
    for (const text of svg.querySelectorAll('text')) {
      if (text.hasAttribute('transform')) continue;
      const at = text.getBBox();
      if (at.x < -1 || at.x + at.width > box.width + 1 || at.y < -1 || at.y + at.height > box.height + 1)
        out.push('chart: ' + text.textContent);
    }
  }
  for (const part of page.querySelectorAll('.card *, h1, h2, h3, p, .headline'))
    if (part.scrollWidth > part.clientWidth + 1 && part.clientWidth > 0) out.push('text: ' + part.textContent);
  const style = view.getComputedStyle(page.body);
  document.body.dataset.found = JSON.stringify({
    out, background: style.backgroundColor, ink: style.color, headline: page.querySelector('.headline').innerText});
});
</script>
"""


def look_at(html: str, folder: Path, width: int, *options: str) -> dict[str, Any]:
    """What a browser of that width finds on a page. Fails on a message to the browser's console."""
    assert BROWSER is not None
    frame = folder / f"frame{width}.html"
    frame.write_text(
        f'<body style="margin:0"><iframe width="{width}" height="900" style="border:0" srcdoc="{escape(html)}">'
        f"</iframe>{MEASURE}",
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=2000",
        "--dump-dom",
        frame.as_uri(),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    found = re.search(r'data-found="([^"]*)"', ended.stdout)
    assert found is not None, ended.stdout[:2000]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.slow
def test_joules_by_model_and_load_are_drawn_for_both_readers(tmp_path: Path) -> None:
    names = ("small", "meta-llama/Llama-3.1-8B-Instruct-4bit")
    report = make_report(write_rows(tmp_path, names, 300), alpha=0.5)
    loads = [
        Load(name, running, 1.0 / running * (place + 1) * 1000, 1000)
        for place, name in enumerate(names)
        for running in (1.0, 3.5, 24.0, 511.0)
    ]
    html = page(replace(report, loads=loads))
    assert "Joules per token written" in html
    assert f"{names[1]} made 135 answers at a time on average. A token took" in html
    for width in (1280, 360):
        assert look_at(html, tmp_path, width)["out"] == []
    assert "Joules per token written" not in page(report)


def write_rows(folder: Path, models: tuple[str, ...], count: int) -> str:
    draw = random.Random(3)
    with (folder / "out.jsonl").open("w", encoding="utf-8") as handle:
        for number in range(count):
            model = draw.randrange(len(models))
            row = {
                "id": number,
                "model": models[model],
                "accuracy": draw.random(),
                "estimated_accuracy": draw.random(),
                "joules": 10.0**model,
                "billed_joules": 12.0 * 10**model,
                "explored": number < 40,
                "queue": draw.random(),
                "meter": "nvml",
            }
            handle.write(f"{json.dumps(row)}\n")
    return str(folder / "out.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "count"),
    [
        (("small", "medium", "large"), 300),
        (("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct-4bit", "a" * 60), 5000),
        (("one",), 1),
    ],
)
def test_nothing_sticks_out_and_nothing_fails(models: tuple[str, ...], count: int, tmp_path: Path) -> None:
    html = page(make_report(write_rows(tmp_path, models, count), alpha=0.5))
    light = {width: look_at(html, tmp_path, width) for width in (1280, 700, 360)}
    dark = look_at(html, tmp_path, 360, "--force-dark-mode")
    for width, seen in light.items():
        assert seen["out"] == [], width
        assert "J billed" in seen["headline"]
    assert dark["out"] == []
    assert dark["background"] != light[360]["background"]
    assert dark["ink"] != light[360]["ink"]
