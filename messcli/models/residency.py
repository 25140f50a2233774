"""Which models are in memory, and which wait in the way that brings them back fastest.

Models on the same weights come and go together: memory holds a checkpoint once. Knows loading, suspending and
unloading; nothing of requests or joules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from messcli.errors import ModelTooLarge, ModelUnavailable
from messcli.models.backend import Backend, weights_of


class Residency:
    """Loads models together as far as memory allows, and in turns beyond that.

    Args:
        backends: one per model, in zoo order.
        most: checkpoints in memory at a time; None: as many as there is memory for.
    """

    def __init__(self, backends: Sequence[Backend], most: int | None) -> None:
        self._backends = backends
        self._most = most
        self._groups = weights_of(backends)  # models by their weights
        self._group_of = {m: number for number, group in enumerate(self._groups) for m in group}
        self._suspended: set[int] = set()  # groups
        self._last_used = dict.fromkeys(range(len(self._groups)), 0)  # group -> the round, counted from 1
        self._rounds = 0

    def preload(self) -> None:
        """Load models now instead of on first use: the first ones, as far as they may be loaded together."""
        for group in self._groups[: self._most]:
            for m in group:
                self._backends[m].load()

    def load_round(self, todo: Sequence[int]) -> list[int]:
        """Load as many of `todo` as may be in memory together; which these are, ascending.

        Loaded ones come first, so that the round that ends a window starts the next one.
        """
        wanted: dict[int, list[int]] = {}  # of each group, the models that have work
        for m in todo:
            if self._backends[m].occupies_memory:
                wanted.setdefault(self._group_of[m], []).append(m)
        elsewhere = [m for m in todo if not self._backends[m].occupies_memory]
        groups = sorted(wanted, key=lambda group: (not self._in_memory(group), group))[: self._most]
        together: list[int] = []
        for group in groups:
            try:
                self._make_room(keep=groups)
                for m in wanted[group]:
                    self._load(m, keep=[*together, group])
            except ModelTooLarge:
                if not together:
                    raise
                # it gets a round of its own, and no later window tries again
                self._most = len(together)
                break
            together.append(group)
        for m in elsewhere:
            with suppress(ModelUnavailable):  # its stream says so again, to the requests that it concerns
                self._backends[m].load()
        self._rounds += 1
        self._last_used.update(dict.fromkeys(together, self._rounds))
        return sorted([*(m for group in together for m in wanted[group]), *elsewhere])

    def _load(self, m: int, keep: Sequence[int]) -> None:
        """Load `m`; where memory is short, in place of groups that aren't in `keep`."""
        group = self._group_of[m]
        while not self._backends[m].loaded:
            try:
                self._backends[m].load()
            except ModelTooLarge:  # noqa: PERF203  # each turn frees memory and tries again
                if self._suspend_one(keep):
                    self._most = len(self._resident() - {group}) + 1
                elif not self._unload_suspended(group):
                    raise
        self._suspended.discard(group)

    def _make_room(self, keep: Sequence[int]) -> None:
        """Keep to `most` with one more group, or with one of `keep` that is loaded already."""
        if self._most is None:
            return
        needed = sum(1 for group in keep if not self._in_memory(group))
        while len(self._resident()) + needed > self._most and self._suspend_one(keep):
            pass

    def _in_memory(self, group: int) -> bool:
        return any(self._backends[m].loaded for m in self._groups[group])

    def _resident(self) -> set[int]:
        return {
            group
            for group, members in enumerate(self._groups)
            if self._backends[members[0]].occupies_memory and self._in_memory(group)
        }

    def _suspend_one(self, keep: Sequence[int]) -> bool:
        """Suspend the least recently used group that isn't in `keep`; False where there is none."""
        idle = self._resident() - set(keep)
        if not idle:
            return False
        least = min(idle, key=lambda group: (self._last_used[group], group))
        for m in self._groups[least]:
            if self._backends[m].loaded:
                self._backends[m].suspend()
        self._suspended.add(least)
        return True

    def _unload_suspended(self, but: int) -> bool:
        """Unload a suspended group other than `but`: an engine that sleeps still holds a little of its card."""
        others = sorted(self._suspended - {but})
        if not others:
            return False
        for m in self._groups[others[0]]:
            self._backends[m].unload()
        self._suspended.discard(others[0])
        return True
