"""What is asked of the caller's input; and the caller's models, handed back as they were found."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from forged_fx import checked
from forged_fx.bpda import callers_gradient_off
from forged_fx.checked import in_a_line
from forged_fx.evaluate.threat import NORMS, Threat
from forged_fx.memory import ran_out
from forged_fx.models import device_of, dtype_of, has_parts_elsewhere, waits_for_others
from forged_fx.modes import as_found, same_bits
from forged_fx.randomness import kept_randomness
from forged_fx.stats import is_number
from forged_fx.thresholds import thresholds_of


def threat(eps: float, norm: str) -> Threat:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: choose one of {', '.join(NORMS)}")
    if not is_number(eps):
        raise TypeError(f"eps={eps!r}: pass a number, such as 8 / 255")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps={eps!r} must be a positive number")
    if norm == "Linf" and eps > 1:
        raise ValueError(f"eps={eps!r} covers the whole range of pixels in [0, 1]; did you mean {eps:g}/255?")
    return Threat(float(eps), norm)


def module(model: object, who: str, does: str = "evaluate judges") -> nn.Module:
    """The module to run, or an error. DistributedDataParallel has processes wait for each other in every run: what it
    was given, then."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the {who} is {type(model).__name__}; {does} an nn.Module: wrap it in one")
    return model.module if isinstance(model, DistributedDataParallel) else model


def attacked(model: object, who: str, does: str = "evaluate judges") -> nn.Module:
    """`module`, or an error for one that several processes run together, as each attacks other inputs."""
    model = module(model, who, does)
    if has_parts_elsewhere(model):
        raise ValueError(
            f"the {who} is sharded over processes, which would have to run it together, and each attacks other inputs: "
            "pass a model that has all of its weights, such as what torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) gives can be loaded into"
        )
    if waits_for_others(model):
        raise ValueError(
            f"within the {who} is DistributedDataParallel, which has processes wait for each other in every run, and "
            "each attacks other inputs: put what it was given, its .module, in its place (and compile that)"
        )
    return model


def pair(model: nn.Module, base: nn.Module) -> str:
    """What to say of a forged model whose weights are not the base's; "" of any other. ValueError where the base is the
    forged one of the two."""
    if not thresholds_of(model):
        if thresholds_of(base):
            raise ValueError(
                "the base is forged, and the model is not: evaluate(forged, base=plain), or leave base out"
            )
        return ""
    theirs = dict(base.named_parameters())
    common = [(name, own, theirs[name]) for name, own in model.named_parameters() if name in theirs]
    other = [name for name, own, their in common if not same_bits(own, their.to(own.device))]
    if not other:
        return ""
    return (
        f"the model's weights are not the base's ({len(other)} of {len(common)} parameters differ, {other[0]!r} among "
        "them): what it gains or loses is not its thresholds' alone"
    )


def inputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y, detached, x without gaps; or an error that names what is wrong with them and the next step."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        given = f"{type(x).__name__} and {type(y).__name__}"
        raise TypeError(f"x and y must be tensors, not {given}: torch.as_tensor(...) makes them")
    if x.dtype != torch.float32:
        raise TypeError(f"x is {x.dtype}; attacks compute in float32: pass x.float(), scaled to [0, 1]")
    if torch.get_default_dtype() != torch.float32:
        raise TypeError(
            f"torch's default dtype is {torch.get_default_dtype()}, in which attacks would draw their starts: "
            "torch.set_default_dtype(torch.float32) for this call"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected a batch of inputs, (n, channels, height, width)")
    x = x.detach()
    finite(x)
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        how = "put the normalisation into the model (nn.Sequential(normalise, model)) and pass pixels in [0, 1]"
        if low >= 0 and 2 < high <= 255:
            how = "divide by 255, or by what else white is"
        if low > -1e-3 and high < 1 + 1e-3:
            how = "by rounding, in all likelihood: pass x.clamp(0, 1)"
        raise ValueError(f"x spans [{low:.9g}, {high:.9g}], outside [0, 1] where attacks stay; {how}")
    if y.dim() != 1 or len(y) != len(x):
        hint = "" if y.dim() else "; of one input, pass x[None] and y[None]"
        raise ValueError(f"y has shape {tuple(y.shape)}; expected one class index per input, ({len(x)},){hint}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y is {y.dtype}; expected class indices, int64")
    return x.detach().contiguous(), y.detach().long()  # attacks take views


def context(bpda: Any) -> None:
    """TypeError unless this makes context managers."""
    verb, found = "is", bpda
    if callable(bpda) and not isinstance(bpda, AbstractContextManager):
        verb, found = "makes", bpda()
        if isinstance(found, AbstractContextManager):
            return
    raise TypeError(
        f"bpda {verb} {checked.short(found)}; pass what makes a context manager, uncalled: forged_fx.straight_through"
    )


def finite(x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"x has {int((~torch.isfinite(x)).sum())} elements that are NaN or infinite; remove them")


def ask(model: nn.Module, x: Tensor, who: str) -> Any:
    """The model's answer to unattacked inputs, a copy of them; an error says what it was given, and what it may not
    take: their dtype, their size, their number."""
    try:
        return model(x.clone())
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        if ran_out(error):
            raise
        dtype = dtype_of(model, x.dtype)
        if dtype != x.dtype:
            raise TypeError(
                f"the {who} has {dtype} weights and does not take {x.dtype} inputs ({in_a_line(error)}): pass "
                f"model.to({x.dtype}), or wrap it so that it casts them"
            ) from error
        raise RuntimeError(
            f"the {who} fails on a batch of shape {tuple(x.shape)}, {x.dtype}, on {x.device} ({in_a_line(error)}): "
            "is that the size of image that it takes (else resize x; on a terminal, --resize SIDE)? A program that was "
            "exported for one number of inputs takes no other: export it with that dimension in dynamic_shapes"
        ) from error


@torch.no_grad()
def answers(model: nn.Module, x: Tensor, batch_size: int, who: str) -> Tensor:
    """`ask`, in batches on the model's device; the logits, on the CPU."""
    device = device_of(model, x.device)
    return torch.cat([ask(model, part.to(device), who).cpu() for part in x.split(batch_size)])


def same_code(same: bool, who: str, since: str, what: str = "logits") -> None:
    """ValueError where a model of the same state no longer gives the same logits as `since` then."""
    if not same:
        raise ValueError(
            f"the {who} gives other {what} than when {since}, and has the same state: its code has changed; choose "
            "another folder"
        )


def output(out: object, who: str) -> Tensor:
    """The model's output on unattacked inputs, if it is one that can be measured."""
    if not isinstance(out, Tensor):
        raise TypeError(f"the {who} returns {type(out).__name__}; wrap it so that it returns its logits as a tensor")
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"the {who} gives NaN or infinite logits on unattacked inputs; repair it first")
    return out


def logits(given: object, x: Tensor, y: Tensor, who: str, classes: int | None = None) -> Tensor:
    """The model's output on a batch, if it is one that can be judged."""
    out = output(given, who)
    if not out.is_floating_point():
        raise TypeError(f"the {who} returns {out.dtype}: classes, maybe; it must return floating-point logits")
    if out.dim() != 2 or len(out) != len(x) or out.shape[1] < 2:
        alone = out.shape in ((len(x),), (len(x), 1))
        hint = "; of one score s for each input make two, torch.stack([-s, s], 1)" if alone else ""
        raise ValueError(f"the {who} returns shape {tuple(out.shape)} for {len(x)} inputs; expected (n, classes){hint}")
    if classes is not None and out.shape[1] != classes:
        raise ValueError(f"the {who} has {out.shape[1]} classes, the model {classes}: they cannot be compared")
    if int(y.min()) < 0 or int(y.max()) >= out.shape[1]:
        raise ValueError(
            f"y spans [{int(y.min())}, {int(y.max())}], and the {who} has {out.shape[1]} classes, counted from 0"
        )
    return out


@contextmanager
def at_peace(models: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """The models as `borrowed` has them, with their own gradient for attacks, the caller's modes and random numbers
    kept; afterwards all is as it was. Yields for each name how many of the model's modules were in train mode."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(callers_gradient_off())
        stack.enter_context(kept_randomness())
        yield {name: stack.enter_context(borrowed(model, name)) for name, model in models.items()}


@contextmanager
def borrowed(model: nn.Module, who: str) -> Iterator[int]:
    """The model as `modes.as_found` has it, and its parameters without gradients; afterwards all is as it was.

    Yields how many of its modules were in train mode. Parameters that ask for no gradient get none: attacks
    differentiate for the input alone, and FAB's call to `backward` would fill every parameter's `.grad`.
    """
    tensors = *model.parameters(), *model.buffers()
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"the {who} is on the meta device, where it has no weights: move it and load them first")
    if any(tensor.is_inference() for tensor in tensors):
        raise ValueError(
            f"the {who} was made within torch.inference_mode, and nothing can be differentiated through its tensors: "
            "make it outside, or pass copy.deepcopy(model)"
        )
    if any(not hasattr(module, "training") for module in model.modules()):
        raise ValueError(f"the {who} was frozen by torch.jit.freeze, and has no mode: pass what was frozen")
    training = [module for module in model.modules() if module.training]
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with as_found(model):
        try:
            for parameter in asked:
                parameter.requires_grad_(False)
            yield sum(not module.training for module in training)
        finally:
            for parameter in asked:
                parameter.requires_grad_(True)
