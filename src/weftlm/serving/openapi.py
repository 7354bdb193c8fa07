"""The OpenAPI document: what FastAPI knows of the routes, and what is checked besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from weftlm.serving.api_errors import ErrorBody
from weftlm.serving.limits import is_open
from weftlm.serving.replies import ChatChunk

TEMPLATE = "#/components/schemas/{model}"
WRONG = (
    "The request is wrong; `error.param` names the field. A text may also be valid and too long in tokens, which no "
    "schema can say: `error.code` is then `context_length_exceeded`."
)
METHODS = frozenset({"get", "put", "post", "delete", "options", "head", "patch", "trace"})


class Document:
    """The document of an app, made when it is first asked for.

    Bodies that a route reads by itself are put in; every operation names its errors; 422 goes.
    """

    def __init__(
        self, app: FastAPI, bodies: Mapping[str, Sequence[type[BaseModel]]], *, keyed: bool, named: bool
    ) -> None:
        """Describe an app.

        Args:
            app: with all its routes.
            bodies: path -> models of the body of its POST, one for each group of served models with the same limits.
            keyed: whether a key is asked for.
            named: whether requests under some names alone are answered.
        """
        self.app = app
        self.bodies = bodies
        self.keyed = keyed
        self.named = named
        self._made: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> dict[str, Any]:
        document = get_openapi(
            title=self.app.title,
            version=self.app.version,
            description="Models of weftlm behind OpenAI's API. Every error has a JSON body.",
            routes=self.app.routes,
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (ErrorBody, ChatChunk):
            schemas[model.__name__] = _with_parts(model, schemas)
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if method not in METHODS:
                    continue
                if method == "post" and path in self.bodies:
                    names = []
                    for number, body in enumerate(self.bodies[path]):
                        names.append(f"{body.__name__}{number or ''}")
                        schemas[names[-1]] = _with_parts(body, schemas)
                    operation["requestBody"] = {"required": True, "content": _json(*names)}
                    operation["responses"]["400"]["description"] = WRONG
                self._errors(path, operation)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if self.keyed:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    def _errors(self, path: str, operation: dict[str, Any]) -> None:
        responses = operation["responses"]
        responses.pop("422", None)
        also = {"500": "The server failed."}
        if operation.get("parameters") or "requestBody" in operation:
            also["400"] = "The request is wrong."
        if "requestBody" in operation:
            also |= {"408": "The body did not arrive in time.", "413": "The body is too large."}
        if self.keyed and not is_open(path):
            operation["security"] = [{"key": []}]
            also["401"] = "No valid key came."
        if self.named:
            also["403"] = "The host is not one of the server's names."
        for status, description in also.items():
            responses.setdefault(status, {"description": description, "content": _json("ErrorBody")})


def _json(*names: str) -> dict[str, Any]:
    """Content in any of some schemas."""
    schemas = [{"$ref": TEMPLATE.format(model=name)} for name in names]
    return {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}


def _with_parts(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    """A model's schema; the parts it refers to join the others."""
    schema = model.model_json_schema(ref_template=TEMPLATE)
    schemas.update(schema.pop("$defs", {}))
    return schema
