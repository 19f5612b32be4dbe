"""Scan data once, without gradients, and record how large every site's inputs get."""

import functools
import inspect
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sized
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor

from forged_fx import channels, checked, histogram, misfit, ops, torch_internals
from forged_fx.arguments import by_name
from forged_fx.channels import ChannelCounts
from forged_fx.checked import in_a_line
from forged_fx.memory import in_halves
from forged_fx.models import device_of, is_sharded, unwrapped
from forged_fx.modes import as_found, uncompiled
from forged_fx.observe import Observer, Sighting
from forged_fx.processes import Processes, attempt, joined, result
from forged_fx.progress import track
from forged_fx.randomness import seeded
from forged_fx.sites import (
    COMPLEX,
    CONSTANT_INPUT,
    FORGEABLE,
    NOT_DENSE,
    OTHER_DTYPE,
    SCRIPTED,
    UNMEASURED,
    VMAPPED,
    module_of,
    names_of,
)
from forged_fx.stats import SiteStats, Stats, parameter_shapes
from forged_fx.thresholds import thresholds_of
from forged_fx.torch_internals import tree_leaves, tree_map
from forged_fx.weights import of_weights


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    where: str = "linear+conv",
    channels: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: bool | None = None,
) -> Stats:
    """Record, for every linear, convolution and matrix-product call, how large its inputs get.

    The scan runs the model as it is, on its device and under the caller's autocast, in eval mode and without
    gradients, and leaves it as it found it: mode, hooks, parameters and buffers. (What its forward itself writes into a
    parameter stays, as after any run.) Random generators are left as they were, too: what a model draws for a batch is
    seeded by the batch's number.

    Args:
        model: any `nn.Module`.
        batches: an iterable of tensors, of tuples or lists whose first item is the input, or of dicts of keyword
            arguments; a `DataLoader` is one. Tensors are moved to the model's device.
        max_batches: stop after this many.
        where: "activations" records the inputs of activations (ReLU, GELU and the like) besides.
        channels: measure the mean and standard deviation of each channel too, as kind "mean" needs them.
        checkpoint: a file that keeps the statistics so far, once a minute and when the scan is stopped. Killed at any
            moment, the same call goes on from there, and ends with the same statistics. The batches must be the same,
            in the same order: they are gone through from the beginning again, and compared; of a sequence of your own
            (`collections.abc.Sequence`, with slices) only the first, the last one scanned and those after it are asked
            for. The file stays, and `Stats.load` reads it; delete it when it has served. Of several processes each
            needs one of its own.
        shard: put together what the processes have seen that torchrun started, or that torch.distributed has. Each
            scans the batches that it is given, its own part of them, and all get the statistics of the whole: equal to
            those of one process that scans every part. None: if there are any. False: this process alone.

    Returns:
        Stats: per site `c_max = max |x|` over all elements of all inputs (section 3 of arXiv 2406.19622), the number of
        elements, and a histogram of |x|.

    Raises:
        ValueError: no batch, a batch of another form, a model that is forged already, or an input of a site that holds
            NaN or infinity (it names the site and the batch).
        FileExistsError: `checkpoint` holds the scan of another model, or of other batches.

    Where memory does not suffice for a batch it is run in two halves, once, and a warning says so.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"calibrate takes the model first, then the batches; the model is {type(model).__name__}")
    check_batches(batches)
    if max_batches is not None:
        checked.whole_number(max_batches, "max_batches", 1)
    if checkpoint is not None:
        checked.path(checkpoint, "calibrate(checkpoint=...)")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the device 'meta' and has no weights: load them first")
    if where not in ("linear+conv", "activations"):
        raise ValueError(f"where={where!r}: calibrate records 'linear+conv', or 'activations' besides")
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("this model is TorchScript, which cannot be opened: calibrate the model that it was made from")
    if thresholds_of(model):
        raise ValueError("this model is forged already, and is measured behind its thresholds: calibrate the plain one")

    def own() -> Stats:
        measured: dict[str, Any] = {"where": where, "channels": channels}
        if checkpoint is None:
            return scan(model, track(batches, "calibrating", max_batches), **measured)
        from forged_fx.checkpoint import resumed

        return resumed(model, batches, Path(checkpoint), max_batches=max_batches, **measured)

    with joined(shard, "calibrate") as processes:
        _agree(processes, model, batches, where=where, channels=channels)
        stats = together(processes, own)
    if stats.batches == 0:
        raise ValueError("calibrate got no batch: an iterator that was already used up gives none a second time")
    if stats.sites and not any(site.elements or site.left_out in UNMEASURED for site in stats.sites.values()):
        raise ValueError("calibrate saw no element: every batch was empty")
    if not any(site.left_out in FORGEABLE for site in stats.sites.values()):
        one = "".join(f"; {name!r} is left out: {site.left_out}" for name, site in [*stats.sites.items()][:1])
        warnings.warn(
            "calibrate saw no linear, convolution or matrix product of data with weights, so there is nothing to forge "
            f"(quantized layers, and operators that a library brings along, are out of its sight{one})",
            stacklevel=3,
        )
    return stats


def check_batches(batches: Any) -> None:
    """TypeError for what is no iterable of batches."""
    if isinstance(batches, Tensor):
        raise TypeError("batches is one tensor, and each of its rows would be a batch: pass [x] for one batch")
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(f"batches is {type(batches).__name__}: pass a DataLoader, a list or another iterable")


def scan(
    model: torch.nn.Module,
    batches: Iterable[Any],
    first: int = 0,
    *,
    where: str = "linear+conv",
    channels: bool = False,
) -> Stats:
    """What `calibrate` returns, of a part of its batches. first: how many came before them, for messages."""
    run = _Scan(model, where == "activations", channels)
    example, n = None, 0
    given: list[set[str]] = []
    with as_found(model), uncompiled(model), torch.no_grad():
        for n, batch in enumerate(batches, start=1):
            args, kwargs = model_inputs(batch, model)
            example = example or model_inputs(batch, model)  # of its own: the model may write into what it is given
            if (names := _arguments(model, args, kwargs)) not in given:
                given.append(names)
            what = f"batch {first + n - 1} (counted from 0)"
            try:
                with seeded(first + n - 1):  # what a model draws for a batch is the same wherever it is scanned
                    in_halves(partial(run.batch, what), args, kwargs, partial(model_inputs, batch, model), what)
            except Exception as error:
                if why := _why(error, model, batch, args, kwargs):
                    raise type(why)(f"{why} ({in_a_line(error)})") from error
                hint = "" if _is_own(error) else misfit.wanted(error, model, args, kwargs, batch)
                error.add_note(f"calibrate was at {what}{misfit.looks(args, kwargs)}{hint}")
                raise
    for name in _scripted(model):
        run.sites[name] = SiteStats("scripted", None, (), None, (), layer=False, left_out=SCRIPTED)
    seen, passed = run.observer, set[str]().union(*given)
    return Stats(
        run.sites,
        run.modules,
        n,
        seen.contexts,
        passed,
        example,
        at_times=passed - passed.intersection(*given),
        not_layers=seen.not_layers,
        calls=run.calls,
        no_sites=seen.no_sites,
        ways=seen.ways,
        weights=of_weights(model),
    )


def _arguments(model: torch.nn.Module, args: tuple, kwargs: dict) -> set[str]:
    """The names of the arguments that a batch gives the model's forward; None is none."""
    try:
        return {name for name, value in by_name(model, args, kwargs).items() if value is not None}
    except TypeError as error:
        signature = inspect.signature(model.forward)
        raise TypeError(
            f"a batch gives {', '.join(kwargs) or 'an input'}, and {type(model).__name__}.forward takes {signature}: "
            f"{error}. Pass tensors, tuples whose first item is the input, or dicts of the arguments by name"
        ) from None


def _why(error: Exception, model: torch.nn.Module, batch: Any, args: tuple, kwargs: dict) -> Exception | None:
    """What to say of an error of the model's own that comes of how it was called or watched; None of any other."""
    if type(error).__module__.startswith("torch._dynamo"):
        return RuntimeError(
            f"{_running(error, model)!r} runs a part of itself through torch.compile, as torch.cond and flex_attention "
            "do, which cannot be watched: calibrate a model with plain code there, `if` or scaled_dot_product_attention"
        )
    if isinstance(error, RuntimeError) and "element 0 of tensors does not require grad" in str(error):
        return RuntimeError(
            "the model takes a gradient in its forward, and calibrate runs without them: put torch.enable_grad() "
            "around that part of the forward"
        )
    if isinstance(error, TypeError) and isinstance(batch, tuple | list) and len(batch) > 1:
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError:
            return TypeError(
                "of a batch that is a tuple or a list the model gets the first item alone (others may be labels): "
                "pass a dict of its arguments by name, {'first': ..., 'second': ...}"
            )
    return None


def _is_own(error: Exception) -> bool:
    """Whether it is of what was measured, and not of the model's run: the batch then has the form that it should."""
    return any(frame.f_code in (_Scan._see.__code__, _finish.__code__) for frame, _ in walk_tb(error.__traceback__))


def _running(error: Exception, model: torch.nn.Module) -> str:
    """The name of the innermost module that the error came out of."""
    names, at, found = names_of(model), error.__traceback__, ""
    while at is not None:
        if at.tb_frame.f_code is torch_internals.MODULE_CALL:
            found = names.get(id(at.tb_frame.f_locals["self"]), found)
        at = at.tb_next
    return found or "the model"


def _agree(processes: Processes, model: torch.nn.Module, batches: Iterable[Any], **asked: Any) -> None:
    """ValueError where the processes scan different models or for different things, whose statistics would be no
    model's; or where a sharded model would wait for ever: its processes run every forward pass together."""
    if processes.size == 1:
        return
    from forged_fx.evaluate import journal  # late: evaluate serves models of any make

    journal.agree(processes, asked, {"the model": model})
    if not is_sharded(model) or not isinstance(batches, Sized):
        return
    lengths = [int(length) for length in processes.gather(str(len(batches)).encode())]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the processes of this sharded model have {', '.join(map(str, lengths))} batches: give all as many"
        )


def together(processes: Processes, own: Callable[[], Stats]) -> Stats:
    """The statistics of all processes' scans, in each of them; what fails in one is raised in all."""
    if processes.size == 1:
        return own()
    mine = Stats()

    def part() -> bytes:
        nonlocal mine
        mine = own()
        return _packed(mine) if mine.batches else b""

    error, answer = attempt(part)
    answers = processes.gather(answer)
    if error:
        raise error
    parts = [result(answer, f"process {rank} of {processes.size}") for rank, answer in enumerate(answers)]
    whole = functools.reduce(Stats.merge, (_unpacked(part) for part in parts if part), Stats())
    whole.example = mine.example
    return whole


def _packed(stats: Stats) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        stats.save(Path(folder) / "stats")
        return (Path(folder) / "stats").read_bytes()


def _unpacked(data: bytes) -> Stats:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stats").write_bytes(data)
        return Stats.load(Path(folder) / "stats")


class _Scan:
    """The running statistics. Numbers stay on the device until the batch is through: one wait a batch, not a site."""

    def __init__(self, model: torch.nn.Module, activations: bool, channels: bool) -> None:
        self.observer = Observer(model, self._see, activations)
        self.channels = channels
        self.sites: dict[str, SiteStats] = {}
        self.modules: dict[str, dict[str, tuple[int, ...]]] = {}
        self.calls: dict[str, int] = {}
        self._pending: list[tuple[str, SiteStats, tuple[Tensor, ...]]] = []

    def batch(self, what: str, args: tuple, kwargs: dict) -> None:
        """Add one batch, whole or not at all. what: its name, for messages."""
        self._pending.clear()
        self.observer.run(*args, **kwargs)
        _finish([(f"{name!r} ({one.kind})", one, measured) for name, one, measured in self._pending if measured], what)
        for name, one, _ in self._pending:
            self.sites[name] = self.sites[name].merge(one) if name in self.sites else one
        for key, made in self.observer.numbering.all_calls().items():
            self.calls[key] = max(self.calls.get(key, 0), made)

    def _see(self, seen: Sighting) -> None:
        x, weight = seen.operand.value.detach(), seen.operand.weight
        if module_of(seen.name) != seen.module:
            raise ValueError(
                f"the module {seen.module!r} is named like the call of another one (see forged_fx/sites.py): give "
                "it a name that does not end with #, @ or : and a number"
            )
        if seen.module not in self.modules:
            self.modules[seen.module] = parameter_shapes(self.observer.model.get_submodule(seen.module))
        vmapped = any(isinstance(v, Tensor) and torch_internals.is_vmapped(v) for v in (x, weight))
        unmeasured = VMAPPED if vmapped else _unmeasured(x)
        one = SiteStats(
            kind=seen.kind,
            shape=tuple(x.shape),
            weight_shape=tuple(weight.shape) if isinstance(weight, Tensor) else (),
            weight=self.observer.name_of(seen.module, weight),
            key=seen.operand.key,
            layer=seen.reads_module_input,
            once=seen.first_run,
            in_place=seen.in_place,
            left_out=unmeasured or seen.operand.left_out,
            calls=1,
            channel=seen.channel,
        )
        measured: tuple[Tensor, ...] = ()
        if x.numel() and not unmeasured:
            one.elements = x.numel()
            low, high = torch.aminmax(histogram.flat(x))  # of other layouts it would make a copy
            values = histogram.sample(x).clone()  # to be counted after the run, all together
            one.sampled = values.numel()
            measured = (low, high, values)
            if self.channels and x.dim() >= -seen.channel:
                measured += (channels.measure(x, seen.channel),)
        self._pending.append((seen.name, one, measured))


def _unmeasured(x: Tensor) -> str | None:
    """Why the magnitudes of a site's input cannot be measured; None: they can."""
    if x.layout != torch.strided:
        return NOT_DENSE
    if x.is_complex():
        return COMPLEX
    return None if x.dtype in ops.DTYPES else OTHER_DTYPE


def _finish(calls: list[tuple[str, SiteStats, tuple[Tensor, ...]]], batch: str) -> None:
    """Give the statistics of a batch's calls, each with what it is called, the numbers that were waited for."""
    lows, highs, samples = ([measured[i] for _, _, measured in calls] for i in range(3))
    counts = histogram.count(samples)
    for (site, one, measured), low, high, found in zip(calls, _read(lows), _read(highs), counts, strict=True):
        one.lowest, one.c_max = low, max(abs(low), abs(high))
        if not math.isfinite(one.c_max) and one.left_out == CONSTANT_INPUT:  # a mask's -inf, say: no one forges it
            one.c_max, one.lowest, one.elements, one.sampled = 0.0, math.inf, 0, 0
            continue
        if not math.isfinite(one.c_max):
            raise ValueError(
                f"the input of site {site} holds {one.c_max} in {batch}: calibrate on data and weights that give "
                "finite activations, or under another autocast dtype"
            )
        one.zeros, one.histogram = int(found[0]), found[1:]
        for sums in measured[3:]:
            one.channel_counts = ChannelCounts.one(one.elements // sums.shape[1], sums.cpu().numpy())


def _read(values: list[Tensor]) -> list[float]:
    """Scalars as the file will hold them, in float32 (NaN stays NaN); of one device in one go, since each is a wait."""
    found: dict[int, float] = {}
    for here in histogram.by_device(values):
        found |= zip(here, torch.stack([values[i] for i in here]).to(torch.float32).tolist(), strict=True)
    return [found[i] for i in range(len(values))]


def _scripted(model: torch.nn.Module) -> list[str]:
    """The outermost TorchScript modules with parameters: what they compute is out of an observer's sight."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, torch.jit.ScriptModule) and not inside and any(True for _ in module.parameters()):
            found.append(name)
    return found


def model_inputs(batch: Any, model: torch.nn.Module) -> tuple[tuple, dict]:
    """A batch as the model's (args, kwargs), of copies on its device: it may write into what it is given."""
    args: tuple = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, tuple | list) and batch and any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch[0])):
        args = (batch[0],)
    elif hasattr(batch, "keys"):
        kwargs = {key: batch[key] for key in batch.keys()}
    else:
        raise ValueError(
            f"a batch must be a tensor, a tuple or list whose first item is the input tensor, or a dict of keyword "
            f"arguments; got {type(batch).__name__}"
        )
    device = device_of(model, None)
    return tree_map(lambda v: v.to(device, copy=True) if isinstance(v, Tensor) else v, (args, kwargs))
