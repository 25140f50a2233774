"""Which models are in memory, and which wait in the way that brings them back fastest.

Knows loading, suspending and unloading; nothing of requests or joules.
"""

from __future__ import annotations

from collections.abc import Sequence

from messcli.errors import ModelTooLarge
from messcli.models.backend import Backend


class Residency:
    """Loads models together as far as memory allows, and in turns beyond that.

    Args:
        backends: one per model, in zoo order.
        most: models in memory at a time; None: as many as there is memory for.
    """

    def __init__(self, backends: Sequence[Backend], most: int | None) -> None:
        self._backends = backends
        self._most = most
        self._suspended: set[int] = set()
        self._last_used = dict.fromkeys(range(len(backends)), 0)  # model -> the round, counted from 1
        self._rounds = 0

    def preload(self) -> None:
        """Load models now instead of on first use: the first ones, as far as they may be loaded together."""
        for backend in self._backends[: self._most]:
            backend.load()

    def load_round(self, todo: Sequence[int]) -> list[int]:
        """Load as many of `todo` as may be in memory together; which these are, ascending.

        Loaded ones come first, so that the round that ends a window starts the next one.
        """
        resident = [m for m in todo if self._backends[m].occupies_memory]
        elsewhere = [m for m in todo if not self._backends[m].occupies_memory]
        resident.sort(key=lambda m: (not self._backends[m].loaded, m))
        together: list[int] = []
        for m in resident[: self._most]:
            try:
                self._make_room(keep=resident[: self._most])
                self._load(m, keep=together)
            except ModelTooLarge:
                if not together:
                    raise
                # it gets a round of its own, and no later window tries again
                self._most = len(together)
                break
            together.append(m)
        for m in elsewhere:
            self._backends[m].load()
        self._rounds += 1
        self._last_used.update(dict.fromkeys(together, self._rounds))
        return sorted([*together, *elsewhere])

    def _load(self, m: int, keep: Sequence[int]) -> None:
        """Load `m`; where memory is short, in place of models that aren't in `keep`."""
        while not self._backends[m].loaded:
            try:
                self._backends[m].load()
            except ModelTooLarge:  # noqa: PERF203  # each turn frees memory and tries again
                if self._suspend_one(keep):
                    self._most = len(self._in_memory()) + 1
                elif not self._unload_suspended(m):
                    raise
        self._suspended.discard(m)

    def _make_room(self, keep: Sequence[int]) -> None:
        """Keep to `most` with one more model, or with one of `keep` that is loaded already."""
        if self._most is None:
            return
        needed = sum(1 for m in keep if not self._backends[m].loaded)
        while len(self._in_memory()) + needed > self._most and self._suspend_one(keep):
            pass

    def _in_memory(self) -> list[int]:
        return [m for m, backend in enumerate(self._backends) if backend.occupies_memory and backend.loaded]

    def _suspend_one(self, keep: Sequence[int]) -> bool:
        """Suspend the least recently used model that isn't in `keep`; False where there is none."""
        idle = [m for m in self._in_memory() if m not in keep]
        if not idle:
            return False
        least = min(idle, key=lambda m: (self._last_used[m], m))
        self._backends[least].suspend()
        self._suspended.add(least)
        return True

    def _unload_suspended(self, but: int) -> bool:
        """Unload a suspended model other than `but`: an engine that sleeps still holds a little of its card."""
        others = sorted(self._suspended - {but})
        if not others:
            return False
        self._backends[others[0]].unload()
        self._suspended.discard(others[0])
        return True
