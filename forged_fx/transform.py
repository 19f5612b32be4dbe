"""transform(model, stats): a copy of the model with a threshold ahead of every site."""

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from forged_fx.audit import audit
from forged_fx.capture import Untraceable, capture, opened_modules
from forged_fx.rewrite import insert_thresholds
from forged_fx.sites import FIXED_FILTER, Origin, module_of
from forged_fx.stats import Ratio, Stats, match_sites

Globs = str | Iterable[str]


@dataclass
class Forging:
    """What was done to a model: the statistics it rests on, and each site's threshold buffer or why it has none."""

    stats: Stats
    buffers: dict[str, str] = field(default_factory=dict)  # site name -> qualified name of its threshold
    left_out: dict[str, str] = field(default_factory=dict)  # site name -> why


class ForgedModule(fx.GraphModule):
    """A GraphModule whose thresholds are buffers: float32 scalars that `.to()` moves and `state_dict()` holds.

    `.half()` and its like leave them in float32, as the comparison is made there. A checkpoint of the plain model
    loads, with `strict=True` too: thresholds that it does not name keep their values.
    """

    @property
    def forging(self) -> Forging:
        return self.meta["forged_fx"]

    def set_ratio(self, ratio: Ratio) -> None:
        """Move the thresholds, in place and without recompiling. See `Stats.thresholds` for `ratio`."""
        set_ratio(self, ratio)

    def _apply(self, fn: Any, recurse: bool = True) -> "ForgedModule":
        before = {name: self.get_buffer(name) for name in self.forging.buffers.values()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self.get_buffer(name)
            if after.dtype != value.dtype:
                _set_buffer(self, name, value.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in self.forging.buffers.values():
            state_dict.setdefault(prefix + name, self.get_buffer(name))
        super()._load_from_state_dict(state_dict, prefix, *args)


def transform(
    model: torch.nn.Module,
    stats: Stats | str | os.PathLike,
    ratio: Ratio = 2**-6,
    *,
    include: Globs | None = None,
    exclude: Globs | None = None,
    example: tuple[tuple, dict] | None = None,
) -> ForgedModule:
    """A copy of `model` in which every site's small inputs are set to zero; `model` itself is left untouched.

    Ahead of each linear, convolution and matrix product with weights comes the forged function (section 3 of
    arXiv 2406.19622): `0 where |x| < c_r * c_max, else x`.

    Args:
        model: the calibrated model.
        stats: what `calibrate(model, ...)` returned, or the path it was saved to.
        ratio: c_r, a number in [0, 1] or a mapping from site name or glob to one. 0 changes nothing, bit for bit.
        include: globs over site names; only these are forged. Also the way to forge a convolution with a fixed filter.
        exclude: globs over site names; these are not.
        example: (args, kwargs) for an audit of the result; by default the first calibration batch, where it is at hand.
            The audit runs model and result at ratio 0 and raises unless they agree bit for bit and every site ran.

    Returns:
        A `torch.fx.GraphModule` with the model's parameter names, and a float32 scalar buffer `forged_threshold` beside
        the weights of each site.

    Raises:
        ValueError: the statistics are another model's; a glob or ratio matches no site; the model is forged already.
        NotImplementedError: the model cannot be traced to a graph; the message says why.
        RuntimeError: the audit failed.
    """
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    model = getattr(model, "_orig_mod", model)
    if any(isinstance(module, ForgedModule) for module in model.modules()):
        raise ValueError("this model is forged already: move its thresholds with set_ratio, or forge the plain model")
    stats.check_model(model)
    wanted, left_out = select(stats, include, exclude)
    forged = _forge(copy.deepcopy(model), stats, wanted, left_out)
    set_ratio(forged, ratio)
    if example or stats.example:
        audit(model, forged, wanted, *(example or stats.example))
    return forged


def select(stats: Stats, include: Globs | None, exclude: Globs | None) -> tuple[list[str], dict[str, str]]:
    """The sites to forge, and for each of the others why it is left out."""
    names = list(stats.sites)
    by_default = [name for name in names if stats.sites[name].left_out is None]
    chosen = match_sites(_globs(include), names, "include") if include is not None else by_default
    chosen = [name for name in chosen if stats.sites[name].left_out in (None, FIXED_FILTER)]
    dropped = match_sites(_globs(exclude), names, "exclude") if exclude is not None else []
    wanted = [name for name in chosen if name not in dropped]
    reasons = {name: stats.sites[name].left_out or "not in include" for name in names if name not in chosen}
    return wanted, reasons | dict.fromkeys((n for n in dropped), "in exclude")


def forgings(model: torch.nn.Module) -> Iterator[tuple[ForgedModule, Forging]]:
    """Every forged module within `model` (itself, as a rule) with the record of what was done to it."""
    yield from ((module, module.forging) for module in model.modules() if isinstance(module, ForgedModule))


def set_ratio(forged: torch.nn.Module, ratio: Ratio) -> None:
    """Set every threshold of a forged model to `ratio * c_max`, in place: nothing is traced or compiled again."""
    for module, forging in forgings(forged):
        for site, value in forging.stats.thresholds(ratio, list(forging.buffers)).items():
            module.get_buffer(forging.buffers[site]).data.fill_(value)


def _forge(model: torch.nn.Module, stats: Stats, wanted: list[str], left_out: dict[str, str]) -> ForgedModule:
    layer_sites = {name for name, site in stats.sites.items() if site.layer}
    opened = opened_modules(wanted, layer_sites)
    try:
        graph = capture(model, opened, stats.given, stats.switches)
    except Untraceable as error:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be forged as one graph: {error}. torch.compile(model, backend='forged', "
            "options={'stats': ...}) does not need one"
        ) from error

    buffers: dict[str, str] = {}

    def place(site: str) -> fx.Node | None:
        if site not in wanted_set:
            return None
        buffers[site] = _register_threshold(model, site)
        return graph.get_attr(buffers[site])

    wanted_set = set(wanted)
    insert_thresholds(graph, place, _module_of_node, {module_of(s) for s in layer_sites} - opened, _source(model))
    if missed := [name for name in wanted if name not in buffers]:
        raise RuntimeError(f"sites that calibration saw are not in the graph: {missed}; leave them out with exclude=")
    forged = ForgedModule(model, graph, class_name=f"Forged{type(model).__name__}")
    forged.meta["forged_fx"] = Forging(stats, {name: buffers[name] for name in wanted}, left_out)
    for name, module in forged.named_modules():  # one by one: a user may have set some of them apart
        module.training = model.get_submodule(name).training
    return forged


def buffer_name(site: str) -> str:
    """The threshold's name beside its module's own parameters: `forged_threshold`, `forged_threshold_1`, ..."""
    k, _, operand = site.partition("#")[2].partition(":")
    operand = operand or site.partition(":")[2]
    return "forged_threshold" + (f"_{k}" if k and k != "0" else "") + (f"_input{operand}" if operand else "")


def _register_threshold(model: torch.nn.Module, site: str) -> str:
    owner = model.get_submodule(module_of(site))
    near = next((t for t in [*owner.parameters(), *owner.buffers(), *model.parameters()]), None)
    owner.register_buffer(buffer_name(site), torch.zeros((), device=None if near is None else near.device))
    return f"{module_of(site)}.{buffer_name(site)}".removeprefix(".")


def _set_buffer(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = value


def _module_of_node(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def _source(model: torch.nn.Module) -> Any:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def source(node: fx.Node) -> Origin:
        if node.op == "placeholder":
            return Origin.DATA
        return Origin.PARAMETER if node.target in parameters else Origin.CONSTANT

    return source


def _globs(globs: Globs) -> list[str]:
    return [globs] if isinstance(globs, str) else list(globs)
