"""The part of an output that is no answer: what a model wrote between tags while it thought."""

from __future__ import annotations

import re

# think: Qwen, DeepSeek. seed:think: Seed-OSS. longcat_think: LongCat. ◁think▷: Kimi-VL. [THINK]: Magistral.
# begin_of_thought: Sky-T1, OpenThinker. START_THINKING: Command A. inner_prefix: Apertus. The others: fine-tunes.
_TAG = re.compile(
    r"[<◁](/?)(?:(?:\w{1,16}[:_])?(?:think|thinking)|thoughts?|reasoning)[>▷]|\[(/?)THINK\]"
    r"|<\|(?:begin_of_thought|START_THINKING|inner_prefix|(end_of_thought|END_THINKING|inner_suffix))\|>",
    re.IGNORECASE,
)
# gpt-oss, with its control tokens or (decoded without them) the words between them
_CHANNELS = re.compile(
    r"\s*(?:<\|channel\|>)?analysis(?:<\|message\|>)?(.*)assistant(?:<\|channel\|>)?final(?:<\|message\|>)?(.*)",
    re.DOTALL,
)
_AROUND_ANSWERS = re.compile(
    r"<\|(?:(?:begin|end)_of_solution|(?:START|END)_RESPONSE|start|end|return)\|>", re.IGNORECASE
)


def split_reasoning(output: str) -> tuple[str, str]:
    """(answer, reasoning) of an output; reasoning is "" where there is none, and the answer the output itself.

    An end without a start closes what a chat template opened: all before it is reasoning. A start without an
    end was cut off by the limit of tokens: all after it is reasoning, and the answer is what stands before it.
    A start inside reasoning that has no end of its own was only spoken of.
    """
    if channels := _CHANNELS.match(output):
        return _bare(channels[2]), _bare(channels[1])
    answer: list[str] = []
    reasoning: list[str] = []
    depth = last = 0
    closed: int | None = None  # how many parts were reasoning where it may have ended
    for tag in _TAG.finditer(output):
        part, last = output[last : tag.start()], tag.end()
        closes = any(tag.groups())
        if depth == 0 and closes:
            reasoning += [*answer, part]
            answer = []
        else:
            (reasoning if depth else answer).append(part)
            depth += -1 if closes else 1
            closed = len(reasoning) if closes else None
    if last == 0:
        return output, ""
    (reasoning if depth else answer).append(output[last:])
    if depth and closed is not None:
        answer, reasoning = [*answer, *reasoning[closed:]], reasoning[:closed]
    return _bare("".join(answer)), "".join(reasoning).strip()


def _bare(text: str) -> str:
    return _AROUND_ANSWERS.sub("", text).strip()
