"""The examples of every command's help run as they stand there, in a folder that has what they name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_plugins import MODULE, POINTS, install

from messcli.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    (name, line.strip())
    for name, command in {**main.commands, "messcli": main}.items()
    for block in re.split(r"\n\s*\n", command.help or "")
    if block.lstrip().startswith("\b")
    for line in block.strip("\b\n ").splitlines()
    if re.search(r"\bmesscli [a-z]", line)
]
JQ = """\
import json, sys
path = [name for name in sys.argv[1].split(".") if name]
text = sys.stdin.read()
try:
    values = [json.loads(text)]
except ValueError:
    values = [json.loads(line) for line in text.splitlines()]
for value in values:
    for name in path:
        value = value[name]
    print(json.dumps(value))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests, a zoo of a package's backend, a table, engines and finished runs, under the names of the examples."""
    folder = tmp_path_factory.mktemp("examples")
    install(folder / "site", "acme-plugins", POINTS, MODULE)
    models = "".join(
        f'[[models]]\nname = "{name}"\npath = "x"\nbackend = "echo"\n' for name in ("small", "large")
    )
    (folder / "zoo.toml").write_text(f'[sla]\nalpha = 0.6\nmetric = "exact"\n{models}')
    samples = ROOT / "samples"
    lines = samples.joinpath("requests.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    for name in ("in.jsonl", "requests.jsonl", "samples/requests.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(["gzip", "-k", "in.jsonl"], cwd=folder, check=True)
    shutil.copy(ROOT / "docs" / "evidence" / "gpu" / "engines.json", folder)
    bin_ = folder / "bin"
    bin_.mkdir()
    (bin_ / "messcli").write_text(f'#!/bin/sh\nexec {sys.executable} -m messcli "$@"\n')
    if shutil.which("jq") is None:
        (bin_ / "jq.py").write_text(JQ)
        (bin_ / "jq").write_text(f'#!/bin/sh\nexec {sys.executable} {bin_ / "jq.py"} "$@"\n')
    for program in bin_.iterdir():
        program.chmod(0o755)
    # what examples read, examples of other commands have made
    for line in (
        "messcli route in.jsonl -o out.jsonl -q",
        "messcli route in.jsonl -o - --state my.state -q > printed.jsonl",
        "messcli record in.jsonl -o recorded.jsonl -q",
    ):
        done = run(folder, line)
        assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line) for line in (samples / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    complete = [row for row in rows if "reference" in row][:60]
    (folder / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in complete))
    return folder


def run(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}",
        "MESSCLI_CALIBRATE_ZOO": "zoo.toml",
    }
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_has_examples() -> None:
    assert {name for name, _ in EXAMPLES} == {*main.commands, "messcli"}
    assert all(re.search(rf"\bmesscli ({'|'.join(main.commands)})\b", line) for _, line in EXAMPLES)


@pytest.mark.parametrize("name", [*main.commands, "messcli"])
def test_help_and_manual_show_these_examples_and_no_others(name: str) -> None:
    page = "messcli" if name == "messcli" else f"messcli-{name}"
    manual = (ROOT / "man" / f"{page}.1").read_text(encoding="utf-8").replace("\\-", "-")
    arguments = [] if name == "messcli" else [name]
    everything = "--help-all" if name in ("route", "record", "calibrate", "simulate") else "--help"
    shown = CliRunner().invoke(main, [*arguments, everything], terminal_width=200).stdout
    [kept] = re.findall(r"\.SH EXAMPLES\n\.nf\n(.*?)\.fi\n", manual, re.DOTALL)
    own = [line for of, line in EXAMPLES if of == name]
    assert kept.splitlines() == own
    in_help = [
        line.strip() for line in shown.splitlines() if re.match(r"\s+(\S.*\| )?messcli [a-z]+( |$)", line)
    ]
    assert in_help == own


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_examples_run(folder: Path, name: str, line: str) -> None:
    if name in ("route", "messcli"):  # not what an example before it has finished
        line = line.replace("out.jsonl", "example.jsonl")
    if line.startswith("messcli record"):  # the table of the other examples stays
        line = line.replace("outcomes.jsonl", "recorded.jsonl")
    if "--budget 1800" in line:  # half an hour is for real models
        line = line.replace("--budget 1800", "--budget 2")
    done = run(folder, line)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout or done.stderr
