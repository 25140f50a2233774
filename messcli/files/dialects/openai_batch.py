"""OpenAI's batch format, which `vllm run-batch` reads and writes too.

https://platform.openai.com/docs/api-reference/batch: a request object per line in, a response object per line out.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from messcli.files.dialects.dialect import Dialect

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"


def _looks_like(line: Mapping[str, Any]) -> bool:
    return "custom_id" in line and isinstance(line.get("body"), dict)


def _read(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """`messages` or `prompt` of the body. Its model and sampling options are the zoo's business here."""
    body, url = line.get("body"), line.get("url", _CHAT)
    if not isinstance(body, dict):
        raise ValueError('field "body": expected an object with "messages". Is this an OpenAI batch request?')
    if url not in (_CHAT, _COMPLETION):
        raise ValueError(f'field "url": only {_CHAT} and {_COMPLETION} are answered. Leave such lines out')
    names = ("messages", "prompt")
    if not any(body.get(name) is not None for name in names):
        raise ValueError('field "body": has neither "messages" nor "prompt". Add one of them')
    ours = {"id": line.get("custom_id"), **{name: body[name] for name in names if name in body}}
    if "reference" in line:
        ours["reference"] = line["reference"]
    return ours


def _write(row: Mapping[str, Any]) -> dict[str, Any]:
    """A response line. What messcli knows besides (accuracy, joules, ...) stands in `messcli`."""
    custom_id, error = row.get("id"), row.get("error")
    digest = blake2b(str(custom_id).encode("utf-8", "replace"), digest_size=12).hexdigest()
    line: dict[str, Any] = {
        "id": f"batch_req_{digest}",
        "custom_id": custom_id,
        "response": None,
        "error": None,
    }
    if error is not None:
        line["error"] = {"code": "request_failed", "message": error}
    else:
        line["response"] = {"status_code": 200, "request_id": f"req_{digest}", "body": _body(row, digest)}
    known = ("id", "output", "prompt_tokens", "output_tokens", "error")
    line["messcli"] = {name: value for name, value in row.items() if name not in known}
    return line


def _body(row: Mapping[str, Any], digest: str) -> dict[str, Any]:
    read, written = row.get("prompt_tokens"), row.get("output_tokens")
    total = None if read is None or written is None else read + written
    return {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        "created": 0,  # the same run gives the same bytes
        "model": row.get("model"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": row.get("output")},
                "logprobs": None,
                "finish_reason": row.get("finish") or "stop",
            }
        ],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": total},
    }


def _unwrite(line: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `report` counts; the answer stays where it is."""
    ours, error = line.get("messcli"), line.get("error")
    if "custom_id" not in line or not isinstance(ours, dict):
        return None
    told = {} if not isinstance(error, dict) else {"error": error.get("message")}
    return {"id": line["custom_id"], **ours, **told}


OPENAI_BATCH = Dialect("OpenAI batch requests", _looks_like, _read, _write, _unwrite)
