"""What the distance to a router that knew the table is made of."""

from __future__ import annotations

import numpy as np
import pytest
from test_simulate import make_table

from messcli.routing.setup import Setup
from tools.research.distance import PARTS, informed_bill, informed_estimates, taken_apart

TABLE = make_table(120)


def test_the_parts_of_a_bill_add_up_to_it() -> None:
    found = taken_apart(TABLE, informed_estimates(TABLE), 0.5, Setup(window=32))
    assert sum(found[part] for part in PARTS) == pytest.approx(found["ratio"])
    assert found["informed"] > 0.0
    assert found["explorations"] >= 0.0


def test_who_knows_every_accuracy_pays_least() -> None:
    alpha = float(TABLE.accuracies.mean())
    informed, price = informed_bill(TABLE, *informed_estimates(TABLE), alpha)
    truth, _ = informed_bill(TABLE, TABLE.accuracies, TABLE.joules, alpha)
    assert truth < informed < TABLE.joules[:, -1].mean()
    assert np.isfinite(price)
    assert price >= 0.0
