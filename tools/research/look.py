"""docs/evidence/look.md from the lines of `ablate.py --off look`: what the second look is worth.

python tools/research/look.py LINES... > docs/evidence/look.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WITH, WITHOUT = "as it is", "without look"
HEAD = """# What the second look is worth

Tables whose answers have confidences, every joule billed, every run learning from nothing. `billed / static` as in
[routing.md](routing.md): the mean over places ({places} of the way from the smallest model's accuracy to the best
one's), below 1 is better. Request orders {orders}. Written by

```sh
python tools/research/ablate.py TABLE.jsonl.gz --orders {first}:{end} --at {at} --window W --off look --out LINES
python tools/research/look.py LINES... > docs/evidence/look.md
```

`fanconic_llama` has a check of each small answer by the large model (one prefill); the others have the probability of
the answer's tokens, or the model's own opinion of its answer (`cascade_triviaqa_llama`).
"""
COLUMNS = (
    "table",
    "window",
    "without",
    "with",
    "difference ± standard error",
    "with, by place",
    "alpha kept: without, with",
)


def written(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The page's lines."""
    places = sorted({row["at"] for row in rows})
    orders = sorted({row["order"] for row in rows})
    at = ",".join(f"{place:g}" for place in places)
    yield HEAD.format(
        places=at.replace(",", ", "),
        orders=f"{orders[0]} to {orders[-1]}",
        first=orders[0],
        end=orders[-1] + 1,
        at=at,
    )
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    differences = []
    for table, window in dict.fromkeys((row["table"], str(row["window"])) for row in rows):
        own = [row for row in rows if (row["table"], str(row["window"])) == (table, window)]
        ratios = {(row["variant"], row["at"], row["order"]): row["ratio"] for row in own}
        pairs = [
            (at, order) for variant, at, order in ratios if variant == WITH and (WITHOUT, at, order) in ratios
        ]
        # orders that were run at every place
        seen = sorted({o for _, o in pairs if all((place, o) in pairs for place in places)})
        pairs = [pair for pair in pairs if pair[1] in seen]
        if not seen:
            continue
        by_order = np.array(
            [
                np.mean(
                    [
                        ratios[WITH, at, order] - ratios[WITHOUT, at, order]
                        for at, other in pairs
                        if other == order
                    ]
                )
                for order in seen
            ]
        )
        means = [float(np.mean([ratios[(variant, *pair)] for pair in pairs])) for variant in (WITHOUT, WITH)]
        error = f" ± {by_order.std(ddof=1) / np.sqrt(len(seen)):.3f}" if len(seen) > 1 else ""
        by_place = ", ".join(
            f"{np.mean([ratios[(WITH, *pair)] for pair in pairs if pair[0] == place]):.2f}"
            for place in places
        )
        kept = ", ".join(
            f"{sum(row['kept'] for row in own if row['variant'] == variant and row['order'] in seen)}/{len(pairs)}"
            for variant in (WITHOUT, WITH)
        )
        differences.append(float(by_order.mean()))
        yield (
            f"| `{table}` ({len(seen)} order{'s' * (len(seen) > 1)}) | {window} | {means[0]:.3f} | **{means[1]:.3f}** "
            f"| {by_order.mean():+.3f}{error} | {by_place} | {kept} |"
        )
    yield ""
    yield f"Mean difference over these rows: {np.mean(differences):+.3f}."


def main() -> None:
    rows = [
        json.loads(line)
        for path in sys.argv[1:]
        for line in Path(path).read_text(encoding="utf-8").splitlines()
    ]
    print("\n".join(written(rows)))


if __name__ == "__main__":
    main()
