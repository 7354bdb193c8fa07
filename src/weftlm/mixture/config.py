"""The `mixture` section of a recipe: every policy's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat

from weftlm.config import Section
from weftlm.registry import Registry

if TYPE_CHECKING:
    from weftlm.mixture.policy import MixturePolicy


Signal = Literal["losses", "reference_losses", "target_alignment", "generalist_alignment", "target_histogram", "basis"]
"""What a policy can ask for. The first four are measured by the loop and arrive in a `Report`; `target_histogram` and
`basis` are prepared before training and arrive in the `MixtureSetting`."""

Initial = Literal["uniform", "importance", "proportional"]
"""Policy whose weights another one starts from."""


class PolicyConfig(Section):
    """Base of every policy's configuration.

    A subclass narrows `policy` to `Literal["<registered name>"]` with that name as default.
    """

    policy: str = Field(description="Registered name of the mixture policy.")
    update_every_steps: int = Field(
        default=100, ge=1, description="T_r, optimizer steps between two updates; constant policies ignore it."
    )

    @classmethod
    def example(cls, domains: Sequence[str]) -> Self:
        """A valid configuration for these domains: the defaults, unless a key has none (then override this).

        The reference pages and the conformance suite are built on it, so that a new policy joins both unasked.
        """
        return cls.model_validate({})

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals the policy follows; a policy whose settings do not tell says so in its own `needs`."""
        return frozenset()


class MirrorPolicyConfig(PolicyConfig):
    """Base of the configuration of policies that move by mirror steps (`mirror.py`)."""

    eta: FiniteFloat = Field(gt=0.0, description="Step of the mirror update.")
    initial: Initial = Field(default="uniform", description="Weights before the first update.")

    @property
    def measured(self) -> frozenset[Signal]:
        """Signals that move the weights."""
        raise NotImplementedError

    @property
    def needs(self) -> frozenset[Signal]:
        return self.measured | {"target_histogram"} if self.initial == "importance" else self.measured


class AlignmentPolicyConfig(MirrorPolicyConfig):
    """Base of the configuration of policies driven by gradient alignment.

    `precondition` is kept for the estimator of the alignment: it decides the direction v, not the rule.
    """

    normalize: Literal["raw", "scale", "cosine"] = Field(
        default="scale",
        description=(
            "raw: a_i = <g_i, v>. scale: a_i / (||v|| mean_j ||g_j||), which keeps the groups' relative magnitudes and "
            "makes eta free of units. cosine: a_i / (||v|| ||g_i||)."
        ),
    )
    precondition: Literal["none", "adam"] = Field(
        default="none",
        description="Direction v = g, or v = g / (sqrt(vhat) + eps) with Adam's second moment of the run.",
    )


policies: Registry[MixturePolicy[Any, Any]] = Registry("mixture policy", "weftlm.mixture", "policy", "weftlm.policies")


class UniformConfig(PolicyConfig):
    """Configuration of `uniform`: nothing to choose."""

    policy: Literal["uniform"] = Field(default="uniform", description="Name of this policy.")


class ProportionalConfig(PolicyConfig):
    """Configuration of `proportional`."""

    policy: Literal["proportional"] = Field(default="proportional", description="Name of this policy.")
    temperature: FiniteFloat = Field(
        default=1.0,
        ge=0.0,
        description="Exponent on the token counts: 1 draws every token equally often, 0 is uniform over domains.",
    )


class StaticConfig(PolicyConfig):
    """Configuration of `static`."""

    policy: Literal["static"] = Field(default="static", description="Name of this policy.")
    weights: dict[str, Annotated[FiniteFloat, Field(ge=0.0)]] = Field(
        description="Weight of every domain by name, not negative; they sum to 1 within 1e-6. 0 leaves a domain out."
    )

    @classmethod
    def example(cls, domains: Sequence[str]) -> StaticConfig:
        """Weights rising in the order of the domains: 1, 2, ..., D over their sum."""
        total = len(domains) * (len(domains) + 1) / 2
        return cls(weights={name: (i + 1) / total for i, name in enumerate(domains)})


class ImportanceConfig(PolicyConfig):
    """Configuration of `importance`."""

    policy: Literal["importance"] = Field(default="importance", description="Name of this policy.")
    smoothing: FiniteFloat = Field(
        default=0.0, ge=0.0, le=1.0, description="Share of the uniform distribution mixed into the histogram."
    )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"target_histogram"})


class DgaConfig(AlignmentPolicyConfig):
    """Configuration of `dga`."""

    policy: Literal["dga"] = Field(default="dga", description="Name of this policy.")
    eta: FiniteFloat = Field(
        default=5.0, gt=0.0, description="Step of the mirror update; free of units with normalize: scale or cosine."
    )
    ema: FiniteFloat = Field(
        default=0.1, gt=0.0, le=1.0, description="beta, the share of the new weights in the smoothed ones; 1: no EMA."
    )
    ema_feedback: bool = Field(
        default=True,
        description=(
            "true: the next mirror step starts from the smoothed weights. false: it continues from its own last "
            "result, and only what is sampled is smoothed."
        ),
    )
    floor: FiniteFloat = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        description="c, the share of the uniform distribution in every mirror step, so that no group is lost for good.",
    )
    initial: Initial = Field(
        default="uniform",
        description=(
            "Weights before the first update. With reweight: basis, those of the basis distributions whose mixture is "
            "nearest to it."
        ),
    )
    anchor: FiniteFloat = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description=(
            "tau, the pull of every mirror step towards the initial weights, so that probe noise does not add up over "
            "updates; 0: none."
        ),
    )
    reweight: Literal["domains", "basis"] = Field(
        default="domains",
        description=(
            "domains: one alignment and one weight per domain. basis: one per basis distribution over the domains, for "
            "domains in the hundreds and more."
        ),
    )

    @property
    def measured(self) -> frozenset[Signal]:
        return frozenset({"target_alignment", "basis"} if self.reweight == "basis" else {"target_alignment"})


class DogeConfig(AlignmentPolicyConfig):
    """Configuration of `doge`."""

    policy: Literal["doge"] = Field(default="doge", description="Name of this policy.")
    target: bool = Field(
        default=False,
        description="false: align with the mean gradient of all domains. true: with the target's (out-of-domain DoGE).",
    )
    eta: FiniteFloat = Field(
        default=0.5,
        gt=0.0,
        description="Step of the mirror update, learning rate / mu in the paper; no EMA follows, so keep it small.",
    )
    floor: FiniteFloat = Field(
        default=0.0, ge=0.0, le=1.0, description="Share of the uniform distribution in every step; the paper has none."
    )
    sample: Literal["current", "average"] = Field(
        default="current",
        description="What is sampled: the newest weights, or their mean over updates (the paper's final run).",
    )

    @property
    def measured(self) -> frozenset[Signal]:
        return frozenset({self.direction})

    @property
    def direction(self) -> Literal["target_alignment", "generalist_alignment"]:
        """The alignment that moves the weights."""
        return "target_alignment" if self.target else "generalist_alignment"


class DoremiConfig(MirrorPolicyConfig):
    """Configuration of `doremi`."""

    policy: Literal["doremi"] = Field(default="doremi", description="Name of this policy.")
    reference: str | None = Field(
        default=None,
        description="Folder of a finished run whose model is the reference; null: one of equal size is trained first.",
    )
    reference_policy: Literal["proportional", "uniform"] = Field(
        default="proportional", description="Mixture the reference model is trained on when `reference` is null."
    )
    eta: FiniteFloat = Field(default=1.0, gt=0.0, description="Step per nat of excess loss.")
    smoothing: FiniteFloat = Field(
        default=1e-3, ge=0.0, le=1.0, description="c, the share of the uniform distribution in every step."
    )
    sample: Literal["current", "average"] = Field(
        default="current",
        description="What is sampled: the newest weights, or their mean over updates (the paper's final run).",
    )

    @property
    def measured(self) -> frozenset[Signal]:
        return frozenset({"losses", "reference_losses"})


class GroupDroConfig(MirrorPolicyConfig):
    """Configuration of `group_dro`."""

    policy: Literal["group_dro"] = Field(default="group_dro", description="Name of this policy.")
    eta: FiniteFloat = Field(
        default=1.0,
        gt=0.0,
        description=(
            "Step per nat of loss and update. The paper's 0.01 is taken at every optimizer step; 1.0 every 100 steps "
            "moves as far."
        ),
    )
    adjustment: FiniteFloat = Field(
        default=0.0,
        ge=0.0,
        description="C in the paper's C / sqrt(n_i), added to a domain's loss; n_i counts training tokens here.",
    )
    floor: FiniteFloat = Field(
        default=0.0, ge=0.0, le=1.0, description="Share of the uniform distribution in every step; the paper has none."
    )

    @property
    def measured(self) -> frozenset[Signal]:
        return frozenset({"losses"})


class OdmConfig(PolicyConfig):
    """Configuration of `odm`."""

    policy: Literal["odm"] = Field(default="odm", description="Name of this policy.")
    decay: FiniteFloat = Field(
        default=0.9, ge=0.0, lt=1.0, description="Share of the old estimate in the moving average of rewards."
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Optimizer steps during which the mixture stays uniform and nothing is learned (the paper: 1%).",
    )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"losses"})


def policy_config(value: Mapping[str, Any] | PolicyConfig, where: str = "mixture") -> PolicyConfig:
    """The settings of the policy a recipe asks for.

    Args:
        value: `{"policy": name, ...}` with the keys of that policy's `Config`, or a ready section.
        where: the place in the recipe, for messages.
    Raises:
        ConfigError: no or unknown policy name, unknown key or wrong value, each with what is allowed.
    """
    if isinstance(value, PolicyConfig):
        return value
    section = policies.settings(value, where)
    assert isinstance(section, PolicyConfig)
    return section
