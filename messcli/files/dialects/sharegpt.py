"""ShareGPT: `conversations`, a list of {"from": ..., "value": ...} turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from messcli.files.dialects.dialect import Dialect, without

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}


def _looks_like(line: Mapping[str, Any]) -> bool:
    turns = line.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _read(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The turns up to the last human one as a chat; the answer after it, if there is one, as the reference."""
    turns = line.get("conversations")
    if not isinstance(turns, list):
        raise ValueError('field "conversations": expected a list of turns. Is this ShareGPT?')
    messages = [_message(turn, index) for index, turn in enumerate(turns)]
    asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise ValueError('field "conversations": no turn is from "human". Leave such lines out')
    chat, rest = messages[: asked[-1] + 1], messages[asked[-1] + 1 :]
    if isinstance(line.get("system"), str) and line["system"].strip():
        chat = [{"role": "system", "content": line["system"]}, *chat]
    ours = {**without(line, "conversations", "system", "prompt"), "messages": chat}
    if rest and "reference" not in ours:
        ours["reference"] = rest[0]["content"]
    return ours


def _message(turn: Any, index: int) -> dict[str, str]:
    speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(text, str):
        raise ValueError(
            f'field "conversations"[{index}]: expected {{"from": "human" or "gpt" or "system", "value": "..."}}. '
            "Leave turns of tools out"
        )
    return {"role": role, "content": text}


SHAREGPT = Dialect("ShareGPT conversations", _looks_like, _read)
