"""Times an OpenAI-compatible endpoint (vLLM, SGLang, llama-server, our own) from outside.

python benchmarks/side_by_side/openai_endpoint.py --url http://127.0.0.1:8000/v1 --served NAME \\
    --name qwen3-vl-4b --out campaigns/vllm

What it sees is the endpoint's time and the way to it. A delta of the stream counts as a token,
unless the server's own count (`usage`) says otherwise; then speeds use that count.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.side_by_side.foreign import Run, Work, main, measure, options, work_of
from qwencli.errors import BenchError

TIMEOUT_S = 600.0


def script(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "", image=True)
    parser.add_argument("--url", required=True, help="up to and with /v1")
    parser.add_argument("--served", required=True, help="the model's name at the endpoint")
    parser.add_argument("--engine", default="openai", help="what stands behind the endpoint")
    said = parser.parse_args(arguments)
    work = work_of(said.engine, said)
    measure(said.out, work, lambda: _runs(said.url, said.served, work))


def _runs(url: str, served: str, work: Work) -> Iterator[Run]:
    body = json.dumps(request_body(served, work)).encode()
    for _ in range(work.runs + 1):
        yield ask(url, body)


def request_body(served: str, work: Work) -> dict[str, Any]:
    """Greedy and of fixed length: `ignore_eos` is what vLLM, SGLang and llama-server call it."""
    content: list[dict[str, Any]] = []
    for path in work.images:
        kind = "jpeg" if path.suffix in (".jpg", ".jpeg") else "png"
        data = base64.b64encode(path.read_bytes()).decode()
        content.append(
            {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}
        )
    content.append({"type": "text", "text": work.prompt})
    return {
        "model": served,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": work.max_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def ask(url: str, body: bytes) -> Run:
    """One answer.

    Raises:
        BenchError: the endpoint cannot be reached, refuses, or ends early.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
    begun = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return read_stream((line, time.perf_counter() - begun) for line in answer)
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace").strip()
        raise BenchError(f"{url} answers {error.code}: {said}", "check --served") from error
    except (OSError, ValueError) as error:
        raise BenchError(f"{url} gives no answer: {error}", "check --url") from error


def read_stream(lines: Iterator[tuple[bytes, float]]) -> Run:
    """From the lines of a stream of server-sent events and when each came, in seconds.

    Raises:
        BenchError: an error event, or an end without `[DONE]`.
    """
    times: list[float] = []
    text = ""
    usage: dict[str, Any] = {}
    for line, at in lines:
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not data:
            continue
        if data == b"[DONE]":
            if not times:
                raise BenchError("the endpoint sent no token", "check --max-new-tokens")
            return Run(
                num_new_tokens=usage.get("completion_tokens") or len(times),
                num_prompt_tokens=usage.get("prompt_tokens"),
                token_s=tuple(times),
                text=text,
            )
        event = json.loads(data)
        if "error" in event:
            raise BenchError(f"the endpoint says: {event['error']}", "see its log")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            piece = delta.get("content") or delta.get("reasoning_content")
            if piece:
                text += piece
                times.append(at)
    raise BenchError("the endpoint's stream ended before it was done", "see its log")


if __name__ == "__main__":
    raise SystemExit(main(script))
