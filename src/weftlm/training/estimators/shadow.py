"""Derivatives of single sequences along v, taken from the training step's own backward pass.

Give sequence b a scalar s_b = 0 and let every module m that owns parameters theta_m answer, for that sequence, as if it
were at theta_m + s_b v_m. To first order its output gains s_b times a shadow term J_m(x_b) v_m,

    linear            x_b V^T + v_bias, in the backward pass
    affine in theta   (m(x_b; t V) - m(x_b; 0)) / t, t so that the largest entry of t V is about 1
    else              forward mode

and backpropagation leaves dL_b / ds_b = <grad L_b, v> in the gradient of s. As s is 0, nothing is added in the forward
pass: the shadow exists only in the backward pass of the functions at the foot of this file, which hand y and its
gradient on untouched, so losses and parameter gradients keep their every bit. Inputs count as constants in a shadow;
what an earlier module contributes arrives through its own. Tied parameters carry one V at every place they are used.

Cost: at most one forward pass (1F) per probed step, and V, which is as large as the trainable parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError, reason
from weftlm.evaluation.perplexity import evaluation_mode
from weftlm.mixture.policy import Alignment
from weftlm.training.config import estimators
from weftlm.training.estimators.contract import (
    NO_NORMS,
    SHARDED,
    BatchProbe,
    Cost,
    Estimator,
    Facts,
    Place,
    Probe,
    group_alignment,
)
from weftlm.training.estimators.direction import (
    check_direction,
    chunks,
    is_sharded,
    trainable_parameters,
    unwrap,
    wide,
)


class ShadowProbe:
    """Measures <g_b, v> of every sequence b of a batch while it is trained on.

        with ShadowProbe(model, direction) as probe:
            for tokens_BT1, weights_B in micro_batches:
                probe.begin(len(tokens_BT1))
                losses_B = losses(model, tokens_BT1)
                coefficients_B = weights_B / batch
                (coefficients_B * losses_B).sum().backward()
                dots_B = probe.dots(coefficients_B)

    Losses and parameter gradients are those of the step without the probe, bit for bit. The same holds under autocast,
    gradient accumulation, DDP and activation checkpointing. Compiled models run eagerly inside the `with`.

    The first axis of every module's output must run over sequences (or be 1 and broadcast over them, as that of
    position embeddings). A module that sees sequences flattened together, such as a mixture of experts, is refused,
    because its output cannot be told apart by sequence. An output changed in place by what follows is refused by
    PyTorch. Dropout stays as the training step has it: <g_b, v> is then of the gradient under that step's mask;
    `Shadow.measure` has none.

    Args:
        model: see `gradient_direction`.
        direction: v. Modules without trainable parameters get no hook.
    Raises:
        ConfigError: the direction is of another model, a module cannot be probed, or parameters are sharded over ranks.
    """

    def __init__(self, model: nn.Module, direction: Mapping[str, Tensor]) -> None:
        parameters = trainable_parameters(model)
        if is_sharded(parameters.values()):
            raise ConfigError(
                "the shadow estimator needs whole parameters on every rank, and these are sharded; use separate"
            )
        check_direction(direction, parameters)
        v = {id(parameter): direction[name] for name, parameter in parameters.items()}
        self._taps = []
        for name, module in unwrap(model).named_modules():
            own = {key: v[id(p)] for key, p in module._parameters.items() if p is not None and p.requires_grad}
            if own:
                linear = type(module).forward in (nn.Linear.forward, Conv1D.forward)
                self._taps.append((_LinearTap if linear else _Tap)(name or "model", module, own))
        first = next(iter(parameters.values()))
        self._dtype, self._device = wide(first.dtype), first.device
        self._slopes_B: Tensor | None = None
        self._exits = ExitStack()

    def __enter__(self) -> ShadowProbe:
        self._exits.enter_context(torch.compiler.set_stance("force_eager"))
        for tap in self._taps:
            handle = tap.module.register_forward_hook(self._hook(tap), prepend=True, with_kwargs=True)
            self._exits.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._slopes_B = None
        self._exits.close()

    def begin(self, batch_size: int) -> Tensor:
        """Start a (micro-)batch; returns s_B, all zero, whose gradient the backward pass fills.

        Args:
            batch_size: B, sequences of the next forward pass.
        """
        self._slopes_B = torch.zeros(batch_size, dtype=self._dtype, device=self._device, requires_grad=True)
        for tap in self._taps:
            tap.called = False
        return self._slopes_B

    def dots(self, coefficients_B: Tensor) -> Tensor:
        """<grad L_b, v> of the batch that `begin` started, after its backward pass.

        Args:
            coefficients_B: what each sequence's loss was multiplied by before `backward`: 1 / B for a plain mean,
                w_b / B for a stratified batch with weights w_b, times any accumulation or loss-scaling factor.
        Returns:
            dots_B: float32 (float64 for a float64 model), in nats per token per unit of v.
        Raises:
            ConfigError: a coefficient is 0, no backward pass was taken, or a parameter was used outside its module.
        """
        slopes_B = self._slopes_B
        if slopes_B is None or slopes_B.grad is None:
            raise ConfigError("no derivative has arrived: call begin, the model, backward and then dots, in this order")
        for tap in self._taps:
            if not tap.called and any(getattr(tap.module, key).grad is not None for key in tap.v):
                raise ConfigError(tap.refuse("its parameters got a gradient although the module was not called"))
        if coefficients_B.shape != slopes_B.shape or bool((coefficients_B == 0).any()):
            raise ConfigError(
                f"coefficients of shape {tuple(coefficients_B.shape)} with {int((coefficients_B == 0).sum())} zeros "
                f"came for {len(slopes_B)} sequences; give one per sequence, none 0: a sequence without a share in the "
                f"loss has no gradient to measure (leave it out, give the mixture a floor, or set probe: extra)"
            )
        dots_B = slopes_B.grad / coefficients_B.detach().to(slopes_B)
        self._slopes_B = None
        return dots_B

    def require_all_called(self) -> None:
        """Refuse a parameter that v says matters and whose module was not called, after a pass without `backward`.

        Raises:
            ConfigError: there is one.
        """
        for tap in self._taps:
            if not tap.called and any(bool(part.any()) for part in tap.v.values()):
                raise ConfigError(tap.refuse("its parameters matter to the loss although the module was not called"))

    def _hook(self, tap: _Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        def attach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            slopes_B = self._slopes_B
            if slopes_B is None or not torch.is_grad_enabled():
                return None
            tap.called = True
            self._slopes_B = None  # a tap that runs the module again must not be tapped
            try:
                return tap.attach(args, kwargs, output, slopes_B)
            finally:
                self._slopes_B = slopes_B

        return attach


@estimators.register(
    "shadow",
    does="every sequence's derivative out of one backward pass",
    costs="on the batch, products of what linear modules read and their gradients with the direction",
)
class Shadow(Estimator):
    """Every sequence's derivative out of one backward pass."""

    merits: ClassVar[Mapping[Place, str]] = {
        "batch": "the training step itself gives every sequence's derivative",
        "extra": "exact, all groups in one pass",
    }

    def obstacle(self, facts: Facts) -> str | None:
        if facts.needs_norms:
            return NO_NORMS
        return SHARDED if facts.sharded else None

    def cost(self, facts: Facts, place: Place) -> Cost:
        return Cost(forwards=1.0 if place == "batch" else 3.0)

    def on_batch(self, model: nn.Module, direction: Mapping[str, Tensor]) -> AbstractContextManager[BatchProbe]:
        return ShadowProbe(model, direction)

    def measure(self, probe: Probe) -> Alignment:
        """See `Estimator.measure`; a pass of its own, without dropout and without parameter gradients."""
        module, tokens_BT1 = unwrap(probe.model), probe.tokens_BT1
        found = [torch.zeros(0, device=tokens_BT1.device)]
        with evaluation_mode(module), ShadowProbe(module, probe.direction) as meter:
            for chunk in chunks(tokens_BT1, probe.micro_batch):
                slopes_B = meter.begin(len(chunk))
                found += torch.autograd.grad(probe.losses(module, chunk).sum(), slopes_B)
                meter.require_all_called()
        return group_alignment(torch.cat(found), probe.groups_B, probe.groups, probe.direction)


# -- taps: how a module's shadow term is formed -----------------------------------------------------------------------


class _Tap:
    """A module whose parameters have a V. This one serves any module.

    The term J_m v_m is computed beside the forward pass, by forward-mode differentiation of the module with respect to
    its own parameters where it is not affine in them, so it may use them in any differentiable way; children answer for
    theirs.
    """

    def __init__(self, name: str, module: nn.Module, v: dict[str, Tensor]) -> None:
        self.name, self.module, self.v = name, module, v
        self.called = False
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            raise ConfigError(self.refuse("max_norm and scale_grad_by_freq mix sequences"))

    def refuse(self, why: str) -> str:
        """The message of a refusal."""
        return (
            f"the shadow estimator cannot probe {self.name} ({type(self.module).__name__}): {why}; "
            f"set alignment.estimator: separate"
        )

    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, slopes_B: Tensor) -> Any:
        """The module's output with the shadow term attached."""
        tangents = self._tangents(args, kwargs)
        flat, form = tree_flatten(output)
        for place, (y, tangent) in enumerate(zip(flat, tangents, strict=True)):
            if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad:
                if y.ndim == 2 and isinstance(self.module, nn.Embedding) and len(slopes_B) > 1:  # positions, shared
                    y, tangent = y.unsqueeze(0), tangent.unsqueeze(0)
                flat[place] = _Known.apply(y, slopes_B, tangent, self.spread(y, slopes_B))  # type: ignore[no-untyped-call]
        return tree_unflatten(flat, form)

    def spread(self, y: Tensor, slopes_B: Tensor) -> bool:
        """Whether the output is shared by all sequences; refuses one whose rows cannot be told apart by sequence."""
        batch = len(slopes_B)
        if batch == 1 or (y.ndim >= 3 and y.shape[0] == batch):
            return False
        if y.ndim >= 3 and y.shape[0] == 1:
            return True
        raise ConfigError(
            self.refuse(
                f"the first axis of its output, of shape {tuple(y.shape)}, does not run over the {batch} sequences"
            )
        )

    def _tangents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        body = _Body(self.module)
        primals = {f"module.{key}": getattr(self.module, key).detach() for key in self.v}
        # V is brought to the size of 1, by a power of 2, so that it is not lost beside a constant part of the module.
        peak = torch.stack([v.abs().max() for v in self.v.values()]).max()
        scale = torch.exp2(-peak.log2().floor().clamp(min=-120))
        tangents = {f"module.{key}": (v * scale).to(primals[f"module.{key}"].dtype) for key, v in self.v.items()}
        padding = getattr(self.module, "padding_idx", None)
        if isinstance(padding, int) and "module.weight" in tangents:  # that row of an embedding has no gradient
            rows = torch.arange(len(tangents["module.weight"]), device=tangents["module.weight"].device)
            tangents["module.weight"] = tangents["module.weight"].masked_fill((rows == padding).unsqueeze(1), 0.0)

        def forward(parameters: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(body, parameters, args, kwargs)

        before = _random_states()
        try:
            with warnings.catch_warnings():  # forward mode loads rules that PyTorch itself wrote with torch.jit.script
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
                if self.module not in _affine:
                    _affine[self.module] = _is_affine(forward, primals)
                if _affine[self.module]:
                    with torch.no_grad():
                        at_v, at_0 = tree_flatten(forward(tangents))[0], tree_flatten(forward(_zeros(primals)))[0]
                    shadows = [y - z if isinstance(y, Tensor) else y for y, z in zip(at_v, at_0, strict=True)]
                else:
                    shadows = list(tree_flatten(torch.func.jvp(forward, (primals,), (tangents,))[1])[0])
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ConfigError(self.refuse(f"forward-mode differentiation fails in it ({reason(error)})")) from error
        if not all(map(torch.equal, before, _random_states())):
            torch.set_rng_state(before[0])
            for state in before[1:]:
                torch.cuda.set_rng_state(state)
            raise ConfigError(self.refuse("it draws random numbers in its forward pass"))
        return [shadow / scale if isinstance(shadow, Tensor) else shadow for shadow in shadows]


_affine: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a module is affine in its own parameters, as norms and embeddings are: J v is (f(t v) - f(0)) / t then,
which is several times as fast as forward mode."""


def _is_affine(forward: Callable[[dict[str, Tensor]], Any], parameters: dict[str, Tensor]) -> bool:
    """f(a + b) + f(0) = f(a) + f(b) for random a and b, on the input at hand."""
    random = torch.Generator("cpu").manual_seed(0)
    a, b = (
        {key: torch.randn(p.shape, generator=random, device="cpu").to(p) for key, p in parameters.items()}
        for _ in range(2)
    )
    both = {key: a[key] + b[key] for key in a}
    with torch.no_grad():
        found = [tree_flatten(forward(at))[0] for at in (both, _zeros(parameters), a, b)]
    for outputs in zip(*found, strict=True):
        if isinstance(outputs[0], Tensor):
            sum_f, none, f_a, f_b = (y.double() for y in outputs)
            near = 1e-9 if outputs[0].dtype == torch.float64 else 1e-4 if outputs[0].dtype == torch.float32 else 0.05
            if not torch.allclose(sum_f + none, f_a + f_b, rtol=near, atol=near * float(f_a.abs().max())):
                return False
    return True


def _zeros(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(p) for key, p in parameters.items()}


class _Body(nn.Module):
    """A module's forward alone: hooks on the module itself do not run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _random_states() -> list[Tensor]:
    """States of the generators of the CPU and of the present CUDA device, if one is in use."""
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_cuda else [])]


class _LinearTap(_Tap):
    """nn.Linear, weight (O, I), and transformers' Conv1D, weight (I, O): the term is formed in the backward pass."""

    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, slopes_B: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        weight = self.v.get("weight")
        weight_OI = weight.t() if weight is not None and isinstance(self.module, Conv1D) else weight
        return _Linear.apply(  # type: ignore[no-any-return, no-untyped-call]
            output, slopes_B, x.detach(), weight_OI, self.v.get("bias"), self.spread(output, slopes_B)
        )


# -- the backward passes: y goes through untouched, s_b receives <grad y_b, shadow_b> ----------------------------------


def _spread_over(y: Tensor, slopes_B: Tensor, shared: bool) -> Tensor:
    return y.expand(len(slopes_B), *y.shape[1:]) if shared else y.view_as(y)


def _gathered(grad: Tensor, shared: bool) -> Tensor:
    return grad.sum(0, keepdim=True) if shared else grad


def _rows(left: Tensor, right: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """sum of left * right within each sequence, in at least `dtype`."""
    return (left.to(dtype) * right.to(dtype)).reshape(batch, -1).sum(1)


class _Known(torch.autograd.Function):
    """A shadow term known from the forward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slopes_B: Tensor, shadow: Tensor, shared: bool) -> Tensor:
        ctx.save_for_backward(shadow)
        ctx.batch, ctx.dtype, ctx.shared = len(slopes_B), slopes_B.dtype, shared
        return _spread_over(y, slopes_B, shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (shadow,) = ctx.saved_tensors
        return _gathered(grad, ctx.shared), _rows(grad, shadow, ctx.batch, ctx.dtype), None, None


class _Linear(torch.autograd.Function):
    """Shadow x V^T + v_bias, contracted with grad y on whichever side of V is narrower."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, slopes_B: Tensor, x: Tensor, weight_OI: Tensor | None, bias_O: Tensor | None, shared: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI, bias_O)
        ctx.batch, ctx.dtype, ctx.shared = len(slopes_B), slopes_B.dtype, shared
        return _spread_over(y, slopes_B, shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, bias_O = ctx.saved_tensors
        batch, dtype = ctx.batch, ctx.dtype
        slopes_B = torch.zeros(batch, dtype=dtype, device=grad.device)
        if weight_OI is not None:
            # float16 cannot hold the small entries of a gradient; bfloat16 can.
            product = torch.float32 if grad.dtype == torch.float16 else grad.dtype
            x, weight_OI, left = x.to(product), weight_OI.to(product), grad.to(product)
            if weight_OI.shape[0] >= weight_OI.shape[1]:
                slopes_B += _rows(left @ weight_OI, x, batch, dtype)
            else:
                slopes_B += _rows(left, x @ weight_OI.t(), batch, dtype)
        if bias_O is not None:
            slopes_B += grad.reshape(batch, -1, grad.shape[-1]).to(dtype).sum(1) @ bias_O.to(dtype)
        return _gathered(grad, ctx.shared), slopes_B, None, None, None, None
