"""The sample requests, ``samples/requests.jsonl``: held-out texts of every level, in the input format of messcli.

``python -m tools.bundled_zoo.samples [FILE]`` writes them; the same words give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from tools.bundled_zoo.grammar import LEVELS, Example, example, expanded

SEED = 2
PER_LEVEL = 60
WITHOUT_REFERENCE = 6


def held_out(seed: int, per_level: int) -> list[Example]:
    """Distinct texts that training never sees, `per_level` of each level, easiest first."""
    rng = random.Random(seed)  # drawn to be repeatable, not secret
    found: dict[str, Example] = {}
    for level in LEVELS:
        while len(found) < level * per_level:
            candidate = example(rng, level)
            if candidate.held_out:
                found.setdefault(candidate.english, candidate)
    return list(found.values())


def requests() -> list[dict[str, object]]:
    """The sample: 300 requests in a mixed order, six without a reference, one with two."""
    drawn = held_out(SEED, PER_LEVEL)
    rng = random.Random(SEED)  # drawn to be repeatable, not secret
    rng.shuffle(drawn)
    bare = set(rng.sample(range(len(drawn)), WITHOUT_REFERENCE))
    rows: list[dict[str, object]] = []
    two_given = False
    for number, text in enumerate(drawn):
        row: dict[str, object] = {"id": f"s{number + 1:03d}", "prompt": text.english}
        if number not in bare:
            variants = [text.german, expanded(text.german)]
            both = not two_given and variants[0] != variants[1]
            two_given = two_given or both
            row["reference"] = variants if both else text.german
        rows.append(row | {"level": text.level})
    return rows


def as_jsonl() -> str:
    """The sample as the text of its file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in requests())


def main(arguments: list[str]) -> int:
    """Write the sample to the file named in `arguments`, or print it."""
    parser = argparse.ArgumentParser(prog="python -m tools.bundled_zoo.samples", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="where to write; standard output if absent")
    file = parser.parse_args(arguments).file
    if file is None:
        sys.stdout.write(as_jsonl())
    else:
        file.write_text(as_jsonl(), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
