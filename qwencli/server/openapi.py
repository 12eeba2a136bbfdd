"""The OpenAPI document of the server, made of the bodies that it takes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from qwencli import __version__
from qwencli.server.chat_api import ChatBody
from qwencli.server.responses_api import ResponsesBody

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_POSTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
}
_GETS = {
    "/health": "application/json",
    "/v1/models": "application/json",
    "/status": "application/json",
    "/metrics": "text/plain",
}


def openapi_document() -> dict[str, Any]:
    """Bodies, and what they are answered with."""
    kinds = [(kind, "validation") for kind in _POSTS.values()]
    references, definitions = models_json_schema(
        kinds,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    failed = {
        "description": "An error in OpenAI's form.",
        "content": {"application/json": {"schema": _ERROR}},
    }
    paths: dict[str, Any] = {
        path: {"get": {"responses": {"200": _answer_schema(kind), "default": failed}}}
        for path, kind in _GETS.items()
    }
    for path, kind in _POSTS.items():
        schema = references[kind, "validation"]
        answers = {
            "description": "The answer, or its events.",
            "content": {"application/json": {}, "text/event-stream": {}},
        }
        paths[path] = {
            "post": {
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                },
                "responses": {"200": answers, "default": failed},
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwencli", "version": __version__},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }


def _answer_schema(kind: str) -> dict[str, Any]:
    return {"description": "What is asked for.", "content": {kind: {}}}
