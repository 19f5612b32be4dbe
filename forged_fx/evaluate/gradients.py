"""The two backwards that an attack may see, and the model as attacks call it.

A hard threshold sends no gradient through what it zeroed: an attack that follows the true gradient does not learn
that these elements matter. BPDA (Athalye, Carlini, Wagner, ICML 2018) keeps the forward and lets the backward
pass as if the threshold were the identity.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from forged_fx.evaluate.threat import Threat
from forged_fx.models import device_of

Context = Callable[[], AbstractContextManager]


def name_of(context: Context) -> tuple[str, bool]:
    """By what a context is known in a record; and whether that tells it from all others: a lambda's name does not, nor
    that of a function or method with values of its own, nor an address."""
    if isinstance(context, functools.partial):
        func, told = name_of(context.func)
        given = [*map(repr, context.args), *(f"{key}={value!r}" for key, value in context.keywords.items())]
        return f"{func}({', '.join(given)})", told and " at 0x" not in "".join(given)
    function = inspect.unwrap(context)  # contextlib.contextmanager's
    name = getattr(context, "__qualname__", None)
    if name is None:
        return type(context).__name__, False
    own = getattr(function, "__closure__", None) or hasattr(context, "__self__")
    home = getattr(context, "__module__", None) or ""
    told = "<lambda>" not in name and not own
    return name if home.partition(".")[0] == "forged_fx" else f"{home}.{name}", told


class Logits:
    """A model as attacks call it: float32 logits (n, classes) that they may write into.

    context: entered for each forward; it decides which backward the attack sees. batch_size: the model is fed no more
    inputs at a time, and memory holds the graph of no more: see `_InBatches`. fed: told how many inputs each call has.
    finite: what of a gradient is no finite number is 0: one such number, and an attack would lose what it had found.

    The Square attack does write into the logits, which may be the model's own memory or a view of its input; and a
    model may write into its input, so it is given a copy. A model that cuts the graph altogether gets a zero gradient,
    as one that rounds does: autograd would raise.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int | None = None,
        context: Context = nullcontext,
        fed: Callable[[int], object] = lambda inputs: None,
        finite: bool = False,
    ) -> None:
        self.model, self.batch_size, self.context, self.fed, self.finite = model, batch_size, context, fed, finite
        self.classes = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.fed(len(x))
        if not len(x):  # Square asks so, where the logits of all classes are equal
            return x.new_zeros(0, self.classes)
        if self.batch_size is None or len(x) <= self.batch_size:
            return self.batch(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _InBatches.apply(x, self)
        return torch.cat([self.batch(part) for part in x.split(self.batch_size)])

    def batch(self, x: Tensor) -> Tensor:
        given = x.clone()
        if self.finite and given.requires_grad:
            given.register_hook(lambda grad: grad.nan_to_num(0.0, 0.0, 0.0))
        with self.context():
            logits = self.model(given).float()
        self.classes = logits.shape[1]
        if not torch.is_grad_enabled() or not x.requires_grad:
            return logits.clone()
        return logits if logits.requires_grad else logits + 0 * x.flatten(1).sum(1, keepdim=True)


class Borrowed(nn.Module):
    """The model's logits with the gradient of another, the lender: whatever the model does to hide its own.

    For a model that was made from the lender this is BPDA at its coarsest: forward as it is, backward as if nothing had
    been made of the lender at all. (To rounding: attacks ask the model itself before anything counts.)
    """

    def __init__(self, model: nn.Module, lender: nn.Module) -> None:
        super().__init__()
        self.model, self.lender = model, lender

    def forward(self, x: Tensor) -> Tensor:
        own, lent = (m(x.clone().to(device_of(m, x.device))).to(x.device) for m in (self.model, self.lender))
        return lent + (own - lent).detach()


class _InBatches(torch.autograd.Function):
    """Logits without a graph; the backward runs the forward again, a batch at a time (activation checkpointing).

    By hand, because the second forward must be under the first one's context, which torch.utils.checkpoint leaves.
    It begins with the first one's random numbers, so that a model which draws some draws the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Logits) -> Tensor:
        ctx.logits, ctx.states = logits, []
        ctx.save_for_backward(x)
        parts = []
        for part in x.split(logits.batch_size):
            ctx.states.append(_random_state(x.device))
            parts.append(logits.batch(part))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        size, grads = ctx.logits.batch_size, []
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
            for part, out_grad, state in zip(x.split(size), grad.split(size), ctx.states, strict=True):
                _set_random_state(x.device, state)
                part = part.detach().requires_grad_()
                grads += torch.autograd.grad(ctx.logits.batch(part), part, out_grad)
        return torch.cat(grads), None


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


def _set_random_state(device: torch.device, state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def centred(logits: Tensor) -> Tensor:
    """In float64, less what all classes share: that changes no prediction, and may be larger than all that does."""
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)


def combined(out: Tensor) -> Tensor:
    """A random combination of the logits, (n,): a loss may saturate, and then all its gradients are 0. Its weights add
    up to 0: see `centred`."""
    weights = torch.randn(1, out.shape[1], generator=torch.Generator().manual_seed(0))
    return out @ centred(weights)[0].to(out)


def gradient(logits: Logits, x: Tensor) -> Tensor:
    """The gradient of `combined` in x, in x's shape."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = combined(logits(leaf))
        return torch.autograd.grad(out, leaf, torch.ones_like(out))[0]


def loss_gradient(logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of each input's cross-entropy, in x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(logits(leaf), y, reduction="sum"), leaf)[0]


def predicted(logits: Tensor) -> Tensor:
    """The classes, (n,) int64; -1, which is none, where a logit is no number."""
    return logits.max(1)[1].masked_fill(logits.isnan().any(1), -1)


def lead(logits: Tensor, y: Tensor) -> Tensor:
    """How far the logit of the right class lies above the best other, (n,); above 0: it is classified rightly."""
    of_class = logits.gather(1, y[:, None]).squeeze(1)
    return of_class - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def differ(model: nn.Module, x: Tensor, threat: Threat, bpda: Context, batch_size: int) -> bool:
    """Does BPDA change any gradient? If not, its rows would be the true gradient's over again.

    Compared bit for bit, on x and where an attack may go: a limit may lie above all that unattacked inputs reach.
    """
    true, through = (Logits(model, batch_size, context) for context in (nullcontext, bpda))
    uphill = gradient(true, x)
    if not torch.equal(uphill, gradient(through, x)):  # NaN differs from itself: then the rows are run
        return True
    moved = threat.steps(x, uphill)
    return any(not torch.equal(gradient(true, point), gradient(through, point)) for point in moved)
