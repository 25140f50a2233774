"""The documentation says what the code does: examples run, fields and commands are there, links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from messcli import api, errors
from messcli.cli import main
from messcli.records import ROW_FIELDS
from messcli.registry import BACKENDS, DIALECTS, METERS, METRICS, POLICIES, PREDICTORS
from messcli.zoo import ModelSpec, PackageOptions, ServerOptions, TransformersOptions, VllmOptions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "messcli"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["api.md", "extending.md"])
def test_examples_print_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    failures, tried = doctest.testfile(
        str(DOCS / name), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8"
    )
    assert (failures, tried > 3) == (0, True)


def test_the_api_page_names_what_there_is() -> None:
    page = text_of("docs/api.md")
    assert [name for name in api.__all__ if f"`{name}`" not in page] == []


def test_the_picture_is_drawn_from_rows(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, object]:
        return {"model": ("small", "large")[number % 2], "queue": number / 10, "explored": number < 3}

    failed = {"model": None, "error": "too long"}
    rows = "".join(json.dumps(row) + "\n" for row in [*map(row, range(40)), failed])
    (tmp_path / "out.jsonl").write_text(rows, encoding="utf-8")
    subprocess.run(
        [sys.executable, ROOT / "tools" / "draw_queue.py", "out.jsonl", "picture.svg"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    for picture in (tmp_path / "picture.svg", DOCS / "queue.svg"):
        drawn = ElementTree.parse(picture).getroot()  # noqa: S314  # our own
        texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
        assert {"explored", "small", "medium", "large"} <= texts
        assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) >= 3


def test_importing_the_api_loads_no_torch() -> None:
    code = "import sys, messcli.api; sys.exit(bool({'torch', 'transformers', 'click'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_command_is_in_the_readme() -> None:
    readme = text_of("README.md")
    assert [name for name in main.commands if f"messcli {name}" not in readme and name != "rows"] == []


def test_every_field_is_documented() -> None:
    page = text_of("docs/formats.md")
    kinds = (ModelSpec, TransformersOptions, VllmOptions, ServerOptions, PackageOptions)
    zoo_fields = {field.name for kind in kinds for field in dataclasses.fields(kind)} - {"path_written"}
    assert [name for name in (*ROW_FIELDS, *sorted(zoo_fields)) if f"`{name}`" not in page] == []


def test_every_option_has_the_variable_that_the_page_says() -> None:
    assert "`MESSCLI_ROUTE_MAX_LOADED=1`" in text_of("docs/install.md")
    for name, command in main.commands.items():
        for option in (param for param in command.params if isinstance(param, click.Option)):
            variables = {
                f"MESSCLI_{name}_{long.lstrip('-')}".upper().replace("-", "_") for long in option.opts
            }
            assert option.envvar in variables, option.opts


def test_every_registered_name_is_documented() -> None:
    everything = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    names = {*BACKENDS, *DIALECTS, *METERS, *POLICIES, *METRICS, *PREDICTORS}
    assert [name for name in sorted(names) if f"`{name}`" not in everything] == []


def test_every_exit_code_is_documented() -> None:
    page = text_of("docs/exit-codes.md")
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert [code for code in sorted(codes) if f"| {code} |" not in page] == []


def pages() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    yield from DOCS.rglob("*.md")
    yield from (ROOT / "samples").glob("*.md")


@pytest.mark.parametrize("page", sorted(pages()), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [
        target for target in targets if target and "://" not in target and not target.startswith("mailto:")
    ]
    assert [target for target in local if not (page.parent / target).exists()] == []


# --- imports point down only (CONTRIBUTING.md) ---

GROUND = ("__init__", "errors", "amounts")  # import nothing of messcli; everything may import them
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "adapter jsonl records registry snapshots tariff zoo_values",
        "signals files metrics zoo energy predict",
        "models routing state",
        "report",
        "calibration",
        "simulation",
        "jobs",
        "api cli conformance",
        "__main__",
    )
)


def needed(path: Path) -> Iterator[str]:
    """Modules of messcli that a file imports when it runs; what is for type checkers only doesn't count.

    "messcli.a.b" also stands for a name b in messcli.a.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "messcli":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("messcli."))


def imported(path: Path) -> set[str]:
    """The parts of messcli, modules or packages, that a file imports."""
    return {name.split(".")[1] for name in needed(path) if "." in name}


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module in names)


def test_imports_point_down() -> None:
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(path):
            target = "__init__" if name == "__version__" else name
            if target != part and target not in GROUND and (part in GROUND or layer(target) >= layer(part)):
                upward.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert upward == []


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_two_modules_need_each_other() -> None:
    files = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: {target for target in needed(path) if target in files} for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_only_the_command_line_knows_click() -> None:
    knowing = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(import|from) click", path.read_text(), re.M)
    }
    assert knowing == {"cli"}
