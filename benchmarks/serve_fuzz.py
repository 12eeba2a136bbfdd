"""Asks a server everything that its OpenAPI document allows, and much that it does not.

python benchmarks/serve_fuzz.py [--examples 300] [--seed 0] [--out FILE]

Bodies are made by schemathesis from /openapi.json of a server on the bundled model; of each
operation as many as --examples, half of them wrong. No answer may be a 500 or take longer than
--seconds, each error has OpenAI's form, and at the end nothing is running. Prints one JSON object;
exit code 1 where something was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.served import serving
from qwencli.config import EngineConfig, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.models.resolve import resolve_model
from qwencli.server.settings import ServerSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    engine = create_engine(EngineConfig(resolve_model("scenes"), device="cpu"))
    usual = SamplingOptions(max_new_tokens=4)
    found: dict[str, Any] = {"statuses": Counter(), "faults": [], "slowest_s": 0.0}
    with serving(engine, ServerSettings("scenes", max_tokens=16, sampling=usual)) as running:
        fuzz(running.address, options, found)
        until = time.monotonic() + 10
        while running.thread.num_unfinished and time.monotonic() < until:
            time.sleep(0.05)
        found["unfinished"] = running.thread.num_unfinished
    text = json.dumps(found, indent=1, default=str)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    sys.exit(1 if found["faults"] or found["unfinished"] else 0)


def fuzz(address: str, options: argparse.Namespace, found: dict[str, Any]) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    with httpx.Client(base_url=address, timeout=options.seconds) as client:
        for operation in schema.get_all_operations():
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                # What has no body has nothing that could be wrong.
                if mode is GenerationMode.POSITIVE or operation.ok().method == "post":
                    case = operation.ok().as_strategy(generation_mode=mode)
                    ask_all(client, case, options, found)


def ask_all(client: httpx.Client, cases: Any, options: argparse.Namespace, found: Any) -> None:
    @settings(
        max_examples=options.examples // 2,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.seed(options.seed)
    @given(case=cases)
    def ask(case: Any) -> None:
        values = case.as_transport_kwargs(base_url=str(client.base_url))
        said = {
            "method": values["method"],
            "path": case.path,
            "body": str(values.get("json", values.get("data")))[:500],
        }
        start = time.perf_counter()
        try:
            reply = client.request(
                values["method"],
                values["url"],
                **{
                    name: values[other]
                    for name, other in (("json", "json"), ("content", "data"), ("params", "params"))
                    if values.get(other) is not None
                },
                headers=dict(values.get("headers") or {}),
            )
        except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError, TypeError, ValueError):
            return  # no client can send it
        except httpx.HTTPError as error:
            found["faults"].append({**said, "fault": repr(error)})
            return
        found["slowest_s"] = max(found["slowest_s"], time.perf_counter() - start)
        found["statuses"][f"{case.method} {case.path} {reply.status_code}"] += 1
        if reply.status_code >= 500 or (reply.status_code >= 400 and not _is_error(reply)):
            found["faults"].append({**said, "fault": f"{reply.status_code} {reply.text[:300]}"})

    ask()


def _is_error(reply: httpx.Response) -> bool:
    if reply.request.method == "HEAD":
        return True
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(error) == {"message", "type", "param", "code"}


if __name__ == "__main__":
    main()
