"""The part of an output that is no answer: what a model wrote between tags while it thought."""

from __future__ import annotations

import re

# think: Qwen, DeepSeek. [THINK]: Magistral. The others: fine-tunes of those.
_TAG = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\]")


def split_reasoning(output: str) -> tuple[str, str]:
    """(answer, reasoning) of an output; reasoning is "" where there is none, and the answer the output itself.

    An end without a start closes what a chat template opened: all before it is reasoning. A start without an
    end was cut off by the limit of tokens: all after it is reasoning, and the answer is what stands before it.
    """
    answer: list[str] = []
    reasoning: list[str] = []
    depth = last = 0
    for tag in _TAG.finditer(output):
        part, last = output[last : tag.start()], tag.end()
        closes = bool(tag[1] or tag[2])
        if depth == 0 and closes:
            reasoning += [*answer, part]
            answer = []
        else:
            (reasoning if depth else answer).append(part)
            depth += -1 if closes else 1
    if last == 0:
        return output, ""
    (reasoning if depth else answer).append(output[last:])
    return "".join(answer).strip(), "".join(reasoning).strip()
