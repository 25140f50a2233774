"""Manual pages and shell completion: made from the commands, never stale, clean for the programs that render them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from messcli import errors
from messcli.cli import main
from messcli.cli.man import EXIT_STATUS, pages

MAN = Path(__file__).parent.parent / "man"


def test_pages_are_what_the_commands_say_now() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in MAN.iterdir()}
    assert committed == pages(), "stale: run `python -m messcli.cli.man man`"


def test_every_command_has_a_page_with_its_sections() -> None:
    found = pages()
    assert set(found) == {"messcli.1", *(f"messcli-{name}.1" for name in main.commands)}
    for name, text in found.items():
        for section in (
            "NAME",
            "SYNOPSIS",
            "DESCRIPTION",
            "OPTIONS",
            "EXIT STATUS",
            "ENVIRONMENT",
            "EXAMPLES",
        ):
            assert f"\n.SH {section}\n" in text, (name, section)


def test_every_exit_code_has_its_meaning() -> None:
    assert set(EXIT_STATUS) == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


@pytest.mark.parametrize(
    "linter",
    [("mandoc", "-Tlint", "-W", "warning"), ("groff", "-man", "-ww", "-Tutf8")],
    ids=lambda words: words[0],
)
def test_pages_render_without_a_warning(linter: tuple[str, ...]) -> None:
    if shutil.which(linter[0]) is None:
        pytest.skip(f"{linter[0]} isn't installed here")
    for page in sorted(MAN.glob("*.1")):
        done = subprocess.run([*linter, page], capture_output=True, text=True, check=False)
        complaints = done.stderr + (done.stdout if linter[0] == "mandoc" else "")
        # the pages carry a version, and no date that could be forgotten
        assert [line for line in complaints.splitlines() if "missing date" not in line] == [], page.name


def messcli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from messcli.cli import main; main(prog_name='messcli')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(MAN.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version, and there is none here")
    done = messcli(_MESSCLI_COMPLETE=f"{shell}_source")
    assert done.returncode == 0, done.stderr
    assert "messcli" in done.stdout
    assert "_MESSCLI_COMPLETE" in done.stdout


def test_completion_knows_commands_and_choices() -> None:
    def words(line: str) -> list[str]:
        typed = line.split(" ")
        place = {"COMP_WORDS": line, "COMP_CWORD": str(len(typed) - 1)}
        done = messcli(_MESSCLI_COMPLETE="bash_complete", **place)
        return [row.partition(",")[2] for row in done.stdout.splitlines()]

    assert words("messcli r") == ["record", "report", "route", "rows"]
    assert "mess+" in words("messcli route --policy ")
    assert "--alpha" in words("messcli route --al")


def test_variables_give_options_and_leave_others_names_alone() -> None:
    # MESSCLI_ZOO is a zoo file, MESSCLI_VERSION is whatever a build system means by it: neither is an option
    done = messcli("--help", MESSCLI_ZOO="zoo.toml", MESSCLI_VERSION="1.2.3", MESSCLI_HELP="x")
    assert (done.returncode, done.stderr) == (0, "")
    done = messcli("route", "in.jsonl", "-o", "-", MESSCLI_ROUTE_WINDOW="0")
    assert done.returncode == errors.EXIT_USAGE
    assert "--window" in done.stderr
    done = messcli("record", "in.jsonl", "-o", "-", MESSCLI_RECORD_WAIT="soon", MESSCLI_ROUTE_WAIT="1")
    assert (done.returncode, "--wait" in done.stderr) == (errors.EXIT_USAGE, True)
