"""The stage `route`: routers compared, routed models written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from weftlm.config import Section, settings
from weftlm.errors import ConfigError
from weftlm.files import SEAL
from weftlm.pipeline.names import ROUTING
from weftlm.pipeline.stage import Stage, StageOptions, stages
from weftlm.pipeline.stages.evaluate import evaluation_settings
from weftlm.routing.config import MANIFEST, parse_router, router_config, routers

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe


class RoutingConfig(Section):
    """Which routers are compared over the experts, and which routed models are written."""

    routers: list[str] | None = Field(
        None,
        min_length=1,
        description="routers compared on held-out text, in one word each (`phatgoose:k=1`); absent: every one that "
        "the experts have what it needs for",
    )
    build: list[str] = Field(
        default_factory=lambda: ["phatgoose"],
        min_length=1,
        description="routed models written to `routed`, one folder each; the report shows the first that chooses by "
        "token at work",
    )
    trace: str | None = Field(
        None, min_length=1, description="text whose routing is shown; absent: held-out text that changes domain midway"
    )

    @field_validator("routers", "build")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for router in value or ():
            router_config(parse_router(router))
        if value is not None and len(set(value)) < len(value):
            raise ValueError(f"a router is named twice: {', '.join(value)}; name each once")
        return value


@stages.register("route", does="routers compared, routed models written", costs="held-out text once for each router")
class Route(Stage):
    """Every router of the recipe on held-out text, and the routed models that it asks for."""

    needs = ("prepare", "experts")

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.makes_experts and recipe.routing is not None

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"routing": settings(recipe.routing_settings), **evaluation_settings(recipe)}

    def outputs(self, recipe: Recipe) -> list[Path]:
        folders = [recipe.routed_folder(each) for each in recipe.routing_settings.build]
        return [recipe.run / ROUTING, *(folder / name for name in (MANIFEST, SEAL) for folder in folders)]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return [recipe.run / ROUTING, recipe.run / "routed"]

    def check(self, recipe: Recipe, known: Known) -> None:
        routing, experts = recipe.routing_settings, recipe.expert_settings
        made = {
            "gate": ("a gate", "gate.steps", experts.gate.steps),
            "statistics": ("statistics", "statistics_examples", experts.statistics_examples),
        }
        without = ", ".join(each.title for each in experts.imports if each.domain is None)
        asked = {**dict.fromkeys(routing.routers or (), "routers"), **dict.fromkeys(routing.build, "build")}
        for router, key in asked.items():
            name = router_config(parse_router(router)).router
            for what, setting, size in (made[need] for need in sorted(routers[name].needs)):
                if not size:
                    raise ConfigError(
                        f"routing.{key}: {name} needs {what} of the experts, and experts.{setting} is 0; raise it, or "
                        "name another router"
                    )
                if without:
                    raise ConfigError(
                        f"routing.{key}: {name} needs {what} of every expert, and the imported {without} gets none; "
                        "say which domain it belongs to (experts.imports: domain), or name another router"
                    )
            if known.base is not None and known.base.is_encoder_decoder and not routers[name].supports_encoder_decoder:
                raise ConfigError(f"router {name!r} follows a text from left to right and serves decoder-only models")

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.routes import route_experts  # noqa: PLC0415 - torch

        route_experts(recipe, progress=options.progress)

    def shown(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        from weftlm.pipeline.project_report import routing_facts  # noqa: PLC0415 - torch
        from weftlm.pipeline.routes import read_routing  # noqa: PLC0415 - torch

        found = read_routing(recipe)
        return {"routing": found["rows"]}, {"routing": routing_facts(recipe, found)}
