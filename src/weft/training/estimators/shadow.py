"""Derivatives of single sequences along v, taken from the training step's own backward pass.

Give sequence b a scalar s_b = 0 and let every module that owns parameters theta_m answer, for that sequence, as if it stood at
theta_m + s_b v_m. To first order its output gains s_b times a shadow term,

    y_b + s_b J_m(x_b) v_m        linear  x_b V^T + v_bias        embedding  V[idx_b]        anything else  by forward mode

so that backpropagation leaves dL_b / ds_b = <grad L_b, v> in the gradient of s. Since s is 0, nothing needs to be added in the
forward pass: the term exists only in the backward pass of `_Tap` functions, outputs and parameter gradients keep their every
bit, and nothing is saved that the backward pass of the module does not hold anyway. Inputs count as constants in the shadow
term: what an earlier module contributes arrives through its own. Tied parameters carry one V at every place they are used.

Cost: at most one forward pass (1F) per probed step, and V, which is as large as the trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers.pytorch_utils import Conv1D

from weft.errors import ConfigError
from weft.models.hf import SequenceLosses
from weft.training.estimators.direction import (
    check_direction,
    chunks,
    evaluation_mode,
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
    gradient accumulation, DDP and activation checkpointing. Inside the `with`, compiled models run eagerly: compiled code
    would not see the probe.

    The first axis of every module's output must run over sequences (or be 1 and broadcast over them, as position embeddings
    do): a module that sees sequences flattened together, such as a mixture of experts, is refused, because its output cannot be
    told apart by sequence. Dropout stays as the training step has it, so that <g_b, v> is of the gradient under that step's
    mask; use `shadow_dots` for a pass without.

    Args:
        model: see `gradient_direction`.
        direction: v. Modules without trainable parameters get no hook.
    Raises:
        ConfigError: the direction is of another model, a module cannot be probed, or parameters are sharded over ranks.
    """

    def __init__(self, model: nn.Module, direction: Mapping[str, Tensor]) -> None:
        self._model = unwrap(model)
        parameters = trainable_parameters(model)
        check_direction(direction, parameters)
        if is_sharded(parameters.values()):
            raise ConfigError(
                "the shadow estimator needs whole parameters on every rank, and these are sharded; use finite_difference"
            )
        v = {id(parameter): direction[name] for name, parameter in parameters.items()}
        self._taps = []
        for name, module in self._model.named_modules():
            own = {key: v[id(p)] for key, p in module._parameters.items() if p is not None and p.requires_grad}
            if own:
                self._taps.append(_tap_for(name or "model", module, own))
        self._slopes_B: Tensor | None = None
        self._dtype = wide(next(iter(parameters.values())).dtype)
        self._device = next(iter(parameters.values())).device
        self._seen: set[int] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._eager = torch.compiler.set_stance("default")

    def __enter__(self) -> ShadowProbe:
        self._eager = torch.compiler.set_stance("force_eager")
        for tap in self._taps:
            hook = self._hook(tap)
            self._handles.append(tap.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._slopes_B = None
        self._eager.__exit__(kind, error, trace)

    def begin(self, batch_size: int) -> Tensor:
        """Start a (micro-)batch; returns s_B, all zero, whose gradient the backward pass fills.

        Args:
            batch_size: B, sequences of the next forward pass.
        """
        self._slopes_B = torch.zeros(batch_size, dtype=self._dtype, device=self._device, requires_grad=True)
        self._seen.clear()
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
            if id(tap) not in self._seen and any(tap.module._parameters[key].grad is not None for key in tap.v):  # type: ignore[union-attr]
                raise ConfigError(tap.refuse("its parameters got a gradient although the module itself was not called"))
        if coefficients_B.shape != slopes_B.shape or bool((coefficients_B == 0).any()):
            raise ConfigError(
                f"coefficients of shape {tuple(coefficients_B.shape)} with {int((coefficients_B == 0).sum())} zeros came for "
                f"{len(slopes_B)} sequences; give one per sequence, none 0: a sequence without a share in the loss has no "
                f"gradient to measure (leave it out, give the mixture a floor, or set alignment.probe: extra)"
            )
        dots_B = slopes_B.grad / coefficients_B.detach().to(slopes_B)
        self._slopes_B = None
        return dots_B

    def _hook(self, tap: _Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        def attach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            slopes_B = self._slopes_B
            if slopes_B is None or not torch.is_grad_enabled():
                return None
            self._seen.add(id(tap))
            self._slopes_B = None  # a tap that runs the module again must not be tapped
            try:
                return tap.attach(args, kwargs, output, slopes_B)
            finally:
                self._slopes_B = slopes_B

        return attach


def shadow_dots(
    model: nn.Module,
    losses: SequenceLosses,
    tokens_BT1: Tensor,
    direction: Mapping[str, Tensor],
    *,
    micro_batch: int | None = None,
) -> Tensor:
    """<grad L_b, v> of every sequence by a pass of their own, without dropout and without parameter gradients.

    Args:
        model: see `gradient_direction`.
        losses: see `SequenceLosses`.
        tokens_BT1: this rank's probe sequences.
        direction: v.
        micro_batch: sequences per pass; None takes all at once.
    Returns:
        dots_B: float32 (float64 for a float64 model).
    """
    module = unwrap(model)
    found = []
    with evaluation_mode(module), ShadowProbe(module, direction) as probe:
        for chunk in chunks(tokens_BT1, micro_batch):
            slopes_B = probe.begin(len(chunk))
            (dots_B,) = torch.autograd.grad(losses(module, chunk).sum(), slopes_B)
            found.append(dots_B)
    return torch.cat(found) if found else torch.zeros(0, device=tokens_BT1.device)


# -- one kind of tap per way of using parameters ----------------------------------------------------------------------


class _Tap:
    """A module whose parameters have a V, and how its shadow term is formed. This one serves any module.

    The term J_m v_m is computed beside the forward pass by forward-mode differentiation of the module with respect to its
    own parameters, so the module may use them in any differentiable way; children answer for theirs.
    """

    def __init__(self, name: str, module: nn.Module, v: dict[str, Tensor]) -> None:
        self.name, self.module, self.v = name, module, v

    def refuse(self, why: str) -> str:
        """The message of a refusal."""
        return (
            f"the shadow estimator cannot probe {self.name} ({type(self.module).__name__}): {why}; "
            f"set alignment.estimator: finite_difference (or separate)"
        )

    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, slopes_B: Tensor) -> Any:
        """The module's output with the shadow term attached."""
        tangents = self._tangents(args, kwargs)
        flat, form = tree_flatten(output)
        for place, (y, tangent) in enumerate(zip(flat, tangents, strict=True)):
            if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad:
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
                f"its output of shape {tuple(y.shape)} does not run over the {batch} sequences of the batch first"
            )
        )

    def _tangents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        body = _Body(self.module)
        own = {f"module.{key}": self.module._parameters[key] for key in self.v}
        primals = {key: p.detach() for key, p in own.items() if p is not None}
        tangents = {f"module.{key}": v.to(primals[f"module.{key}"].dtype) for key, v in self.v.items()}

        def forward(parameters: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(body, parameters, args, kwargs)

        before = torch.get_rng_state()
        try:
            _, tangent = torch.func.jvp(forward, (primals,), (tangents,))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ConfigError(self.refuse(f"forward-mode differentiation fails in it ({error})")) from error
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise ConfigError(self.refuse("it draws random numbers in its forward pass"))
        return list(tree_flatten(tangent)[0])


class _Body(nn.Module):
    """A module's forward alone: hooks on the module itself do not run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


class _LinearTap(_Tap):
    """nn.Linear, weight (O, I), and transformers' Conv1D, weight (I, O)."""

    def __init__(self, name: str, module: nn.Module, v: dict[str, Tensor], *, transposed: bool) -> None:
        super().__init__(name, module, v)
        self.weight_OI = v["weight"].t() if transposed and "weight" in v else v.get("weight")
        self.bias_O = v.get("bias")

    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, slopes_B: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        shared = self.spread(output, slopes_B)
        return _Linear.apply(output, slopes_B, x.detach(), self.weight_OI, self.bias_O, shared)  # type: ignore


class _EmbeddingTap(_Tap):
    """nn.Embedding; one-dimensional indices are positions shared by all sequences."""

    def __init__(self, name: str, module: nn.Embedding, v: dict[str, Tensor]) -> None:
        super().__init__(name, module, v)
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise ConfigError(self.refuse("max_norm and scale_grad_by_freq mix sequences"))
        self.padding = module.padding_idx

    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, slopes_B: Tensor) -> Tensor:
        index = args[0] if args else next(iter(kwargs.values()))
        if index.ndim == 1 and len(slopes_B) > 1:
            index, output = index.unsqueeze(0), output.unsqueeze(0)
        shared = self.spread(output, slopes_B)
        return _Embedding.apply(output, slopes_B, index, self.v["weight"], self.padding, shared)  # type: ignore


def _tap_for(name: str, module: nn.Module, v: dict[str, Tensor]) -> _Tap:
    """The cheapest tap that is exact for a module; one that overrides a known forward counts as unknown."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return _LinearTap(name, module, v, transposed=False)
    if forward is Conv1D.forward:
        return _LinearTap(name, module, v, transposed=True)
    if forward is nn.Embedding.forward and isinstance(module, nn.Embedding):
        return _EmbeddingTap(name, module, v)
    return _Tap(name, module, v)


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


class _Embedding(torch.autograd.Function):
    """Shadow V[idx]; the padding row of an embedding has no gradient, so it has no shadow."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, slopes_B: Tensor, index: Tensor, weight_VH: Tensor, padding: int | None, shared: bool
    ) -> Tensor:
        ctx.save_for_backward(index, weight_VH)
        ctx.batch, ctx.dtype, ctx.shared, ctx.padding = len(slopes_B), slopes_B.dtype, shared, padding
        return _spread_over(y, slopes_B, shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, weight_VH = ctx.saved_tensors
        shadow = torch.nn.functional.embedding(index, weight_VH)
        if ctx.padding is not None:
            shadow = shadow.masked_fill((index == ctx.padding).unsqueeze(-1), 0.0)
        slopes_B = _rows(grad, shadow, ctx.batch, ctx.dtype)
        return _gathered(grad, ctx.shared), slopes_B, None, None, None, None
