"""What is installed: the code, the bundled zoo with its weights, the manual pages, and nothing else."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import messcli

ROOT = Path(__file__).parent.parent
PYTHON_FILES = sorted([*ROOT.glob("messcli/**/*.py"), *ROOT.glob("tests/**/*.py")])


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", messcli.__version__)
    literal = [path.name for path in PYTHON_FILES if f'"{messcli.__version__}"' in path.read_text("utf-8")]
    assert literal == ["__init__.py"]
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_types_are_announced() -> None:
    assert (ROOT / "messcli" / "py.typed").is_file()


def test_files_are_python_3_10() -> None:
    for path in PYTHON_FILES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def expected() -> set[str]:
    """Every file under messcli/, but what Python makes."""
    files = (
        path for path in (ROOT / "messcli").rglob("*") if path.is_file() and path.parent.name != "__pycache__"
    )
    return {path.relative_to(ROOT).as_posix() for path in files}


def private_names(path: Path) -> list[str]:
    """Attributes with a leading underscore that a test file uses of objects that aren't of its own classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") in ("self", "cls")
    }
    return [
        f"{path.name}:{node.lineno}: {node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute)
        and re.match("_[a-z]", node.attr)
        and node.attr not in own
        and getattr(node.value, "id", "") not in ("self", "cls", "os", "sys")
    ]


def test_tests_reach_through_public_names() -> None:
    found = [name for path in sorted((ROOT / "tests").glob("*.py")) for name in private_names(path)]
    assert len(found) < 5, found


def test_the_verbs_of_the_justfile_are_there() -> None:
    just = shutil.which("just") or shutil.which("just", path=Path(sys.executable).parent)
    if just is None:
        pytest.skip("just isn't installed: pip install rust-just")
    dump = subprocess.run(
        [just, "--dump", "--dump-format", "json"], cwd=ROOT, capture_output=True, check=True
    )
    recipes = json.loads(dump.stdout)["recipes"]
    assert {"test", "slow", "coverage", "lint", "format", "golden", "bench", "docs", "gpu", "ci"} <= set(
        recipes
    )
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`just ([a-z]+)", contributing))
    assert told <= set(recipes)
    assert {"test", "lint", "golden", "docs"} <= told
    for file in re.findall(r"tools/[\w/]+\.py", (ROOT / "justfile").read_text(encoding="utf-8")):
        assert (ROOT / file).is_file()


def test_the_container_is_made_of_what_is_there() -> None:
    """No daemon is needed for that: what is copied exists and isn't ignored, extras are known, the user isn't root."""
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()]
    allowed = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    }
    copied = [
        name
        for words in lines
        if words[:1] == ["COPY"] and "--from=build" not in words
        for name in words[1:-1]
    ]
    assert copied
    assert all((ROOT / name).exists() and name in allowed for name in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [extras] = [
        words[1].removeprefix("EXTRAS=") for words in lines if words[:1] == ["ARG"] and "EXTRAS" in words[1]
    ]
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    [user] = [words[1] for words in lines if words[:1] == ["USER"]]
    assert int(user) > 0
    assert [words for words in lines if words[:1] == ["ENTRYPOINT"]] == [["ENTRYPOINT", '["messcli"]']]


@pytest.mark.slow
def test_the_wheel_holds_code_zoo_and_manual(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(pip, check=True)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == f"messcli-{messcli.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if name.startswith("messcli/")}
    assert inside == expected()
    assert {f"messcli/bundled/{size}/model.safetensors" for size in ("small", "medium", "large")} <= inside
    manual = {name.rpartition("/")[2] for name in names if "/data/share/man/man1/" in name}
    assert manual == {path.name for path in (ROOT / "man").iterdir()}


@pytest.mark.slow
def test_the_source_archive_holds_what_a_packager_needs(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="the source archive is made by `python -m build`")
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert expected() <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py", "samples/tour.sh"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops <= {
        "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "PKG-INFO", "README.md", "constraints-cpu.txt", "docs",
        "man", "messcli", "pyproject.toml", "Dockerfile", ".dockerignore", "samples", "tests", "tools", "justfile",
        ".gitignore", ".pre-commit-config.yaml",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".pyc", ".state", ".state.lock", ".partial"))]
