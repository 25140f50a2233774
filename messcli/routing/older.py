"""What messcli 0.1.0 kept of a controller, as the parts of this one: its states (schema 3) go on.

There, arrays and JSON stood under the names of attributes, without versions. Knows that layout and no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from messcli.errors import StateError
from messcli.snapshots import Part

# Digests of the tuned numbers of 0.1.0 (`tuning` of the parts): under others, these parts learn anew.
TUNING = {
    "ridge": "6c12928889c2",
    "joules": "e544bd8e36b3",
    "linear": "4a18107b5d9a",
    "fasttext": "c2cde4dabea5",
    "mean": "",
}
ALL_TUNING = "569bb75727e0"  # of all tuned numbers of 0.1.0

_Arrays = Mapping[str, NDArray[Any]]


def read_snapshot(data: bytes, predictor: str, alphas: Mapping[str, float]) -> Part:
    """The controller's part of a snapshot, whoever wrote it.

    Args:
        predictor: name of the predictor that the state was made with.
        alphas: plan -> target at that time.

    Raises:
        StateError: it can't be read, or isn't known.
    """
    try:
        arrays = safetensors.numpy.load(data)
        if "controller" not in arrays:
            return Part.loads(data)
        return _of_0_1(arrays, predictor, alphas)
    except (KeyError, ValueError, TypeError, IndexError, safetensors.SafetensorError) as error:
        raise StateError(
            f"what was learnt can't be read ({type(error).__name__}: {error}). Go on with the messcli that wrote it, "
            "or start anew with another --state and output"
        ) from None


def _of_0_1(arrays: _Arrays, predictor: str, alphas: Mapping[str, float]) -> Part:
    plain = json.loads(arrays["controller"].tobytes())
    promises = plain["policy"]
    return Part(
        "controller",
        values={"t": plain["t"], "explored": plain["explored"], "owed": plain["owed"], "in_window": 0},
        parts={
            "accounts": Part(
                "accounts",
                parts={
                    plan: _account(kept, promises.get(plan), alphas.get(plan, 0.0))
                    for plan, kept in plain["accounts"].items()
                },
            ),
            "best": Part(
                "running", values={name: plain["best"][name] for name in ("count", "mean", "squares")}
            ),
            "policy": _policy(promises, remembers=bool(len(arrays["recent.estimates"]))),
            "predictor": _PREDICTORS[predictor](_under("predictor.", arrays)),
            "joules": _joules(_under("joules.", arrays)),
            "recent": _recent(_under("recent.", arrays)),
        },
    )


def _under(prefix: str, arrays: _Arrays) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _account(kept: Mapping[str, Any], promise: Mapping[str, Any] | None, alpha: float) -> Part:
    known = kept["observed"] + kept["estimated"]
    names = ("observed", "observed_sum", "estimated", "estimated_sum", "explored", "failed")
    if promise is None:  # of a policy that had no use for it
        surplus, settled = kept["observed_sum"] + kept["estimated_sum"] - alpha * known, known
    else:
        surplus, settled = promise["surplus"], promise["settled"]
    return Part(
        "account",
        values={
            **{name: kept[name] for name in names},
            "queue": kept["queue"]["length"],
            "unknown": max(0, settled - known),
            "surplus": surplus,
        },
    )


def _policy(promises: Mapping[str, Any], *, remembers: bool) -> Part:
    if not remembers:
        return Part("nothing")
    return Part("auto", parts={plan: _promise(kept) for plan, kept in promises.items()})


def _promise(kept: Mapping[str, Any]) -> Part:
    residuals = {
        "variance": kept["variance"],
        "variance_weight": kept["variance_weight"],
        "total": kept["residual_sum"],
        "count": kept["residuals"],
        "recent_total": kept["near_sum"],
        "recent_weight": kept["near_weight"],
    }
    return Part(
        "promise",
        values={
            "gain": kept["reach"],
            "price": kept["price"],
            "reachable": kept["reachable"],
            "whole_zoo": kept["whole_zoo"],
            "solve_at": kept["solve_at"],
        },
        parts={"residuals": Part("residuals", values=residuals)},
    )


def _recent(arrays: _Arrays) -> Part:
    capacity = len(arrays["estimates"])
    return Part(
        "recent",
        arrays={"estimates": arrays["estimates"], "joules": arrays["joules"]},
        values={
            "texts": _json(arrays["texts"]),
            "count": int(arrays["count"][0]),
            "versions": arrays["versions"].tolist(),
        },
        tuning=f"the latest {capacity}",
    )


def _json(array: NDArray[Any]) -> Any:
    return json.loads(array.tobytes())


def _regression(arrays: _Arrays) -> tuple[dict[str, Any], dict[str, Any], dict[str, Part]]:
    """Arrays, values and parts that accuracies and joules share."""
    pending = int(arrays["evidence._pending"][0])
    evidence = Part(
        "evidence",
        arrays={
            "count": arrays["evidence.count"],
            "sum_x": arrays["evidence._sum_x"],
            "gram": arrays["evidence._gram"],
            "cross": arrays["evidence._cross"],
            "sum_y": arrays["evidence._sum_y"],
            "pending_x": arrays["evidence._pending_x"][:pending],
            "pending_y": arrays["evidence._pending_y"][:pending],
        },
        values={"sum_y2": float(arrays["evidence._sum_y2"][0])},
    )
    space = Part("space", arrays={"directions": arrays["space.directions"], "middle": arrays["space.middle"]})
    lessons = Part(
        "lessons",
        arrays={"observed": arrays["lessons.values"].astype(float)},
        values={"texts": _json(arrays["lessons.texts"]), "fits": int(arrays["lessons.fits"][0])},
    )
    values = {"version": int(arrays["version"][0]), "solve_at": float(arrays["_solve_at"][0])}
    parts = {"evidence": evidence, "space": space, "lessons": lessons}
    return {"weights": arrays["_weights"]}, values, parts


def _ridge(arrays: _Arrays) -> Part:
    shared, values, parts = _regression(arrays)
    own = {"losses": arrays["_losses"], "candidates": arrays["_candidates"]}
    return Part("ridge", arrays=shared | own, values=values, parts=parts, tuning=TUNING["ridge"])


def _joules(arrays: _Arrays) -> Part:
    shared, values, parts = _regression(arrays)
    own = {"floor": arrays["_floor"], "prior": arrays["_prior"]}
    values["unit"] = float(arrays["_unit"][0])
    return Part("joules", arrays=shared | own, values=values, parts=parts, tuning=TUNING["joules"])


def _linear(arrays: _Arrays) -> Part:
    return Part("linear", arrays=_only(arrays, "weights", "samples"), tuning=TUNING["linear"])


def _mean(arrays: _Arrays) -> Part:
    return Part("mean", arrays=_only(arrays, "sums", "counts"))


def _fasttext(arrays: _Arrays) -> Part:
    kept = _json(arrays["json"])
    return Part(
        "fasttext",
        arrays=_only(arrays, "skill"),
        values={name: kept[name] for name in ("buffer", "fitted_from", "seen", "next_fit")},
        parts={"means": _mean(arrays)},
        tuning=TUNING["fasttext"],
    )


def _only(arrays: _Arrays, *names: str) -> dict[str, NDArray[Any]]:
    return {name: np.array(arrays[name]) for name in names}


_PREDICTORS = {"ridge": _ridge, "linear": _linear, "fasttext": _fasttext, "mean": _mean}
