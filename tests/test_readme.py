"""README, tour and recipes are real: each of their code blocks is run, parsed or checked, and shows what is printed.

Blocks of a section (of the tour: of the page) run in order, in a folder that holds what a reader has by then: the
samples, requests and a zoo.toml. Zoo files that name models of a hub or a card are parsed as they are; commands then
find the bundled models under the same names, so that everything but the models themselves is the reader's.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from messcli.cli import main
from messcli.records import ROW_FIELDS
from messcli.zoo import BUNDLED_ZOO, Zoo, load_zoo

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "samples"

# Commands that no test here runs, and why. Everything else does.
NOT_RUN = {
    "pip install .": "installs from the network; .ci/run does it",
    "pip install '.[vllm]'": "installs from the network; .ci/vllm does it",
    "pip install '.[lora]'": "installs from the network; the tests' own requirements hold it",
    "pip install '.[ray]'": "installs from the network; .ci/run does it",
    "ray start --head": "leaves servers behind; test_ray_recipe starts a cluster that it can end",
}
PAGES = ("README.md", "docs/tour.md", "docs/recipes.md")
SET_UP = ("main", "test")  # bash blocks that make an environment: run by .ci/run, word for word
RAY = "Ray"
TOUR = "A tour in five minutes"  # each step goes on from the one before
WORDS = (350, 620)  # of the README's text: what a reader takes in before the first command of their own
QUICK = ("A pipe with jq",)  # sections that load models and are still part of the fast suite

# What keeps the commands short here, by the options' own variables: the command line stays the reader's.
SHORT = {
    "MESSCLI_CALIBRATE_BUDGET": "2",
    "MESSCLI_SIMULATE_ORDER_SEEDS": "2",
}


@dataclass(frozen=True)
class Block:
    section: str
    marker: str
    language: str
    body: str


def blocks() -> Iterator[Block]:
    for page in PAGES:
        yield from blocks_of((ROOT / page).read_text(encoding="utf-8"))


def blocks_of(text: str) -> Iterator[Block]:
    section = marker = ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("#"):
            section = TOUR if section == TOUR else line.lstrip("# ")
        elif found := re.fullmatch(r"<!-- (.+) -->", line):
            marker = found[1]
        elif line.startswith("```"):
            body = "\n".join(iter(lambda: next(lines), "```"))
            yield Block(section, marker, line.removeprefix("```"), body)
        if not line.startswith("<!--"):
            marker = ""


BLOCKS = list(blocks())


def marked(marker: str) -> str:
    [found] = [block.body for block in BLOCKS if block.marker == marker]
    return found


@dataclass(frozen=True)
class Step:
    """A command line and the output that stands below it, None where the block shows none."""

    command: str
    shown: list[str] | None


def steps(block: Block) -> list[Step]:
    """Of a console block: lines that begin with `$ ` and what follows each, or a command per line."""
    lines = block.body.splitlines()
    if not lines[0].startswith("$ "):
        return [Step(re.sub(r"\s+#.*", "", line), None) for line in lines]
    found: list[Step] = []
    for line in lines:
        if line.startswith("$ "):
            found.append(Step(line[2:], []))
        else:
            found[-1].shown.append(line)
    return found


CONSOLE = [block for block in BLOCKS if block.language == "console"]
SECTIONS = list(dict.fromkeys(block.section for block in CONSOLE))


def without_numbers(line: str) -> str:
    """Energy is measured, and decides: its numbers differ from run to run, as does who served how many."""
    line = re.sub(r"served by .*", "served by", line)
    # what the largest would take is known in one of two ways, by whether its loads differed
    line = re.sub(r"basis .*", "basis", re.sub(r"at (least|most) | ± \d+%(?=\))", "", line))
    line = re.sub(r"[▁▂▃▄▅▆▇█]+", "▁", line)
    line = re.sub(r"\(batch means .*|\(Student's t .*", "", line)
    line = re.sub(r";? *(not|NOT)? *converged.*", "", line)
    line = re.sub(r"; \S+ estimated over .* without reference", "", line)  # none among the first few
    line = re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?%?|\?", "#", line)  # ?: an interval needs two readings
    return re.sub(r"SLA (kept|MISSED)", "SLA", re.sub(r"\s+", " ", line)).strip()


def without_what_differs(text: str) -> list[str]:
    """Lines to compare. How energy is read is the machine's."""
    lines = [line for line in text.splitlines() if not line.startswith(("energy: ", "advice "))]
    return [without_numbers(line) for line in lines]


def assert_shown(shown: list[str], printed: str) -> None:
    """Every shown line was printed, in this order; only at `...` may there be more."""
    got, place, gap = without_what_differs(printed), 0, False
    for line in shown:
        if line in ("...", "^C"):
            gap = True
            continue
        wanted = without_numbers(line)
        assert wanted in got[place:], f"not printed: {line}\n{printed}"
        found = got.index(wanted, place)
        assert gap or found == place, f"more is printed before: {line}\n{printed}"
        place, gap = found + 1, False
    assert gap or place == len(got), f"more is printed at the end:\n{printed}"


def stand_in(zoo: Zoo) -> str:
    """The same promises and names, with the bundled models behind them."""
    bundled = load_zoo(BUNDLED_ZOO).models
    text = [f'[sla]\nalpha = {zoo.alpha}\nmetric = "{zoo.metric}"', "[plans]"]
    text += [f"{name} = {alpha}" for name, alpha in zoo.plans.items()]
    for number, model in enumerate(zoo.models):
        own = bundled[min(number, len(bundled) - 1)]
        text.append(
            f'[[models]]\nname = "{model.name}"\npath = "{own.path}"\ndevice = "cpu"\ndtype = "float32"\n'
            f"threads = 1\nmax_new_tokens = {own.max_new_tokens}\nprompt_template = {json.dumps(own.prompt_template)}"
        )
    return "\n".join(text) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a reader has before the first recipe."""
    shutil.copytree(SAMPLES, tmp_path / "samples")
    for file in (tmp_path / "samples" / "zoos").glob("*.toml"):
        file.write_text(stand_in(load_zoo(file)), encoding="utf-8")
    lines = (SAMPLES / "requests.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "requests.jsonl").write_text("".join(lines[:70]), encoding="utf-8")
    (tmp_path / "requests.jsonl.gz").write_bytes(gzip.compress("".join(lines[:40]).encode()))
    (tmp_path / "batch.jsonl").write_text("".join(map(as_batch, lines[:30])), encoding="utf-8")
    (tmp_path / "labelled.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
    later = [json.loads(line) for line in lines[60:120]]
    for request in later:
        request.pop("reference", None)
    (tmp_path / "unlabelled.jsonl").write_text("\n".join(map(json.dumps, later)) + "\n", encoding="utf-8")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "messcli").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m messcli "$@"\n')
    (programs / "messcli").chmod(0o755)
    return tmp_path


def as_batch(line: str) -> str:
    """A request as OpenAI's batch files have it."""
    request = json.loads(line)
    body = {"model": "any", "messages": [{"role": "user", "content": request["prompt"]}]}
    url = "/v1/chat/completions"
    return json.dumps({"custom_id": request["id"], "method": "POST", "url": url, "body": body}) + "\n"


def environment() -> dict[str, str]:
    """Of commands that run this source, whatever is installed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MESSCLI_")}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), own.get("PYTHONPATH"))))
    return own


def run(step: Step, folder: Path) -> None:
    own = environment()
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", step.command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**own, **SHORT, "PATH": f"{folder / 'bin'}{os.pathsep}{own['PATH']}"},
    )
    interrupted = bool(step.shown) and step.shown[0] == "^C"
    if interrupted:  # when there are rows
        output = folder / step.command.split(" -o ")[1].split()[0]
        while process.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.02)
        time.sleep(0.2)  # the next window has been read and is in hand: what is shown is what is told then
        process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == (130 if interrupted else 0), printed
    assert "Traceback" not in printed
    if step.shown is not None:
        assert_shown(step.shown, printed)


def run_section(section: str, folder: Path, replace: tuple[str, str] = ("", "")) -> None:
    for block in BLOCKS:
        if block.section != section:
            continue
        if block.language == "toml":
            (folder / "zoo.toml").write_text(block.body, encoding="utf-8")
            (folder / "zoo.toml").write_text(stand_in(load_zoo(folder / "zoo.toml")), encoding="utf-8")
        elif block.language == "console":
            for step in steps(block):
                if step.command not in NOT_RUN:
                    run(Step(step.command.replace(*replace), step.shown), folder)


def loads_models(section: str) -> bool:
    commands = " ".join(block.body for block in CONSOLE if block.section == section)
    return any(f"messcli {name}" in commands for name in ("route", "record", "calibrate"))


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(name, marks=pytest.mark.slow) if loads_models(name) and name not in QUICK else name
        for name in SECTIONS
        if name != RAY
    ],
)
def test_console_blocks_do_what_they_say(section: str, folder: Path) -> None:
    commands = " ".join(block.body for block in CONSOLE if block.section == section)
    if "| jq" in commands and shutil.which("jq") is None:
        pytest.skip("jq isn't installed here")
    run_section(section, folder)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray isn't installed: pip install 'messcli[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # its workers import messcli
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    try:
        run_section(RAY, folder, replace=("HEAD:6379", cluster.address))
    finally:
        cluster.shutdown()


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line, as the shell parts them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            found.append([])
        else:
            found[-1].append(word)
    return found


def test_every_command_is_one() -> None:
    """In the fast suite too: each command line of messcli has options that there are, with values that they take."""
    lines = [step.command for block in CONSOLE for step in steps(block)]
    lines += [command for _, command in cron_lines()]
    found = 0
    for words in (words for line in lines for words in simple_commands(line)):
        if words[0].rpartition("/")[2] == "messcli":
            main.commands[words[1]].make_context(
                words[1], words[2:], parent=click.Context(main, **main.context_settings)
            )
            found += 1
    assert found > 15


def test_no_block_is_left_out() -> None:
    """A block of a kind that nothing here looks at is a block that can go stale."""
    checked = {"console", "toml", "cron"}
    markers = {*SET_UP, "output: main", "output: row"}
    unknown = [block for block in BLOCKS if block.language not in checked and block.marker not in markers]
    assert unknown == []
    assert {block.marker for block in BLOCKS} - {""} == markers
    commands = {step.command for block in CONSOLE for step in steps(block)}
    assert set(NOT_RUN) <= commands, "no longer in these pages"


def test_the_readme_is_short() -> None:
    """About 500 words, five commands in a table, six recipes of at most eight lines of code."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"(?ms)^```.*?^```$|<!--.*?-->|\]\([^)]*\)", " ", text)
    assert WORDS[0] <= len(prose.split()) <= WORDS[1]
    recipes: dict[str, int] = {}
    inside = text.partition("## Recipes")[2].partition("## More")[0]
    for block in blocks_of(inside):
        recipes[block.section] = recipes.get(block.section, 0) + len(block.body.splitlines())
    assert len(recipes) == 7
    assert max(recipes.values()) <= 8, recipes


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=lambda b: b.section)
def test_zoo_files_are_zoo_files(block: Block, tmp_path: Path) -> None:
    (tmp_path / "zoo.toml").write_text(block.body, encoding="utf-8")
    zoo = load_zoo(tmp_path / "zoo.toml")
    assert len(zoo.models) >= 2
    assert zoo.alpha is not None


def cron_lines() -> list[tuple[list[str], str]]:
    """The five fields of each crontab line, and its command as cron gives it to the shell."""
    found = []
    for block in BLOCKS:
        if block.language == "cron":
            for line in block.body.splitlines():
                *fields, command = line.split(None, 5)
                assert "%" not in command.replace(r"\%", ""), "cron makes a new line of %"
                found.append((fields, command.replace(r"\%", "%")))
    return found


def test_cron_lines_have_five_fields() -> None:
    ranges = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]
    assert len(cron_lines()) == 2
    for fields, _ in cron_lines():
        assert all(
            field == "*" or low <= int(field) <= high
            for field, (low, high) in zip(fields, ranges, strict=True)
        )


@pytest.mark.slow
def test_cron_lines_run_as_cron_runs_them(folder: Path) -> None:
    """With /bin/sh, nearly no PATH, and the home of the one whose crontab it is."""
    work = folder / "batch"
    work.mkdir()
    shutil.copy(folder / "requests.jsonl", work)
    shutil.copy(folder / "samples" / "zoos" / "two-on-one-gpu.toml", work / "zoo.toml")
    programs = folder / "messcli" / ".venv" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(folder / "bin" / "messcli", programs)
    little = {**environment(), **SHORT, "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    for _, command in cron_lines():
        done = subprocess.run(
            ["/bin/sh", "-c", command], capture_output=True, text=True, env=little, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "exit status 1" not in done.stdout, done.stderr
        assert "exit status 2" not in done.stdout, done.stderr
    assert (work / "answers.jsonl").stat().st_size
    assert (work / "report.html").stat().st_size


@pytest.mark.slow
def test_the_first_command_prints_what_the_readme_shows(tmp_path: Path) -> None:
    command = marked("main").split("&&")[-1].split()
    assert command[0] == ".venv/bin/messcli"
    output = tmp_path / "out.jsonl"
    arguments = [str(ROOT / a) if a.startswith("samples/") else a for a in command[1:]]
    arguments[arguments.index("out.jsonl")] = str(output)
    done = subprocess.run(
        [sys.executable, "-m", "messcli", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        check=True,
    )
    assert_shown(marked("output: main").splitlines(), done.stderr)
    row = json.loads(output.read_text(encoding="utf-8").splitlines()[-1])
    assert list(row) == list(json.loads(marked("output: row")))


def test_the_row_that_the_readme_shows_is_one() -> None:
    row = json.loads(marked("output: row"))
    assert set(ROW_FIELDS) - {"error"} <= set(row)
