# What contributors run. `just` lists the verbs; `pip install rust-just` brings the program.
# The environment is made by `bash .ci/run`, or by the commands under "Tests" in README.md.

python := env("PYTHON", ".venv/bin/python")

[private]
default:
    @just --list

# the fast tests; more options go to pytest: just test -k metric
test *options:
    {{python}} -m pytest {{options}}

# the tests that take more than about ten seconds
slow *options:
    {{python}} -m pytest -m slow {{options}}

# the fast tests, and which lines of messcli they run
coverage *options:
    {{python}} -m pytest --cov=messcli --cov-report=term:skip-covered {{options}}

# format, lint, types
lint:
    {{python}} -m ruff format --check .
    {{python}} -m ruff check .
    {{python}} -m mypy

# mend what can be mended by itself
format:
    {{python}} -m ruff format .
    {{python}} -m ruff check --fix .

# what the commands write, byte for byte, beside another revision
golden revision="main":
    {{python}} tools/golden.py {{revision}}

# a bench of tools/bench: just bench decision_loop
bench name *options:
    {{python}} tools/bench/{{name}}.py {{options}}

# the manual pages anew, then every example and figure of the documentation
docs:
    {{python}} -m messcli.cli.man man
    {{python}} -m pytest tests/test_docs.py tests/test_man.py tests/test_readme.py

# ten minutes on an NVIDIA card: counters, curves, runs; in miniature with --tiny
gpu folder="build/gpu" *options:
    {{python}} tools/bench/gpu.py --out {{folder}} {{options}}

# everything a change must pass, in an environment made anew
ci:
    bash .ci/run
