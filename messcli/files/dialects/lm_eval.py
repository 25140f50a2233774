"""Samples that the LM Evaluation Harness logs (`lm_eval --log_samples`): samples_TASK.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from messcli.files.dialects.dialect import Dialect
from messcli.jsonl import decoded


def _looks_like(line: Mapping[str, Any]) -> bool:
    return "doc_id" in line and "doc" in line and "arguments" in line


def _read(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first argument's text as the prompt, the target as the reference.

    Of a multiple choice (a loglikelihood per option) the target counts the options, and the reference is its text.
    Fields of the document pass through in `doc`; what the harness's own model answered doesn't.
    """
    pairs = _pairs(line.get("arguments"))
    if not pairs or not isinstance(pairs[0][0], str):
        raise ValueError('field "arguments": has no text. Log samples with lm_eval --log_samples')
    text, target = pairs[0][0], line.get("target")
    options = [pair[1] for pair in pairs if len(pair) > 1 and isinstance(pair[1], str)]
    if len(options) > 1 and isinstance(target, int | str) and str(target).isdecimal():
        target = options[int(target)].strip() if int(target) < len(options) else target
    kept = line.get("filter")  # a document is logged once per filter of answers
    identity = line.get("doc_id") if kept in (None, "none") else f"{line.get('doc_id')}-{kept}"
    ours: dict[str, Any] = {"id": identity, "doc": line.get("doc"), "reference": target}
    messages = _chat(text)
    return {**ours, "prompt": text} if messages is None else {**ours, "messages": messages}


def _pairs(arguments: Any) -> list[Sequence[Any]]:
    """Lists of arguments, as versions before 0.4.3 log them, or objects with arg_0, arg_1, ... as later ones do."""
    if isinstance(arguments, dict):
        found = [arguments[name] for name in sorted(arguments, key=lambda name: (len(name), name))]
        arguments = [
            [one[name] for name in sorted(one) if name.startswith("arg_")]
            for one in found
            if isinstance(one, dict)
        ]
    if not isinstance(arguments, list):
        return []
    return [one for one in arguments if isinstance(one, list) and one]


def _chat(text: str) -> Any:
    """Messages, where a chat was handed over as JSON (`--apply_chat_template` with a served model)."""
    if not text.startswith('[{"role"'):
        return None
    try:
        return decoded(text)
    except ValueError:
        return None


LM_EVAL = Dialect("samples of lm-eval", _looks_like, _read)
