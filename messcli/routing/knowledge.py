"""What an earlier job taught, for another one to begin with: a part of its controller's state.

Knows names of parts; knows nothing of files, models or what the parts say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from messcli.snapshots import Part

LEARNT = ("space", "predictor", "joules", "answers", "recent", "loads")
"""Parts of a controller that say what prompts and models are like. The others are of the job that it was."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a job taught. Two with the same digest are the same."""

    name: str = field(compare=False)  # of the file that it comes from
    digest: str  # of what it was learnt from
    part: Part = field(compare=False)  # with the parts of `LEARNT` that there are

    @classmethod
    def of(cls, name: str, digest: str, controller: Part) -> Knowledge:
        """Of a controller's state."""
        parts = {part: controller.parts[part] for part in LEARNT if part in controller.parts}
        return cls(name, digest, Part("knowledge", parts=parts))
