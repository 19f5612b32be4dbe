"""transform(model, stats): a copy of the model with a threshold ahead of every site."""

import copy
import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.fx as fx

from forged_fx import in_place, write_back
from forged_fx.audit import AuditFailed, alike, audit, audit_at_work, same, same_on_fast_path
from forged_fx.capture import capture, opened_modules
from forged_fx.containers import ListContainer, Numbered, check_place, container_for, hold, skeleton, take_attributes
from forged_fx.effects import settle, written_attribute
from forged_fx.fuse import fuse as fuse_producers
from forged_fx.kinds import OWN, Choice, Kind, choose
from forged_fx.models import copied, hooks_its_input, is_sharded, unwrapped
from forged_fx.modes import of_ordinary_tensors
from forged_fx.regions import forge_regions
from forged_fx.rewrite import WHOLE, Placed, find_calls, insert_thresholds, number
from forged_fx.sites import ACTIVATIONS as ACTIVATION_CALLS
from forged_fx.sites import CALLS, FORGEABLE, Origin, is_activation, mark_of, module_of
from forged_fx.stats import Ratio, SiteStats, Stats, given_stats, match_sites, means
from forged_fx.straight import is_straight
from forged_fx.surroundings import one_at_a_time
from forged_fx.thresholds import (
    HoldsThresholds,
    lost,
    not_forged,
    parameters_of,
    qualified,
    register,
    thresholds_of,
    valued,
)
from forged_fx.untraceable import Untraceable
from forged_fx.weights import changed, weights_have_changed

Globs = str | Iterable[str]
LAYERS, ACTIVATIONS = "linear+conv", "activations"


@dataclass
class Forging:
    """The record of what was done to a model.

    reached: site name -> how its threshold is placed. left_out: site name -> why it has none. not_whole: why the model
    is not one graph, or None. audited: the result was compared with the model on a batch; not_audited: why it was not.
    fused: how many thresholds share a call with their producer, None where that was not asked for; not_fused: why none
    could. choice: the kind of each site.
    """

    stats: Stats
    reached: dict[str, str]
    left_out: dict[str, str]
    choice: Choice
    not_whole: str | None = None
    audited: bool = False
    not_audited: str = "there was no batch to run it on"
    fused: int | None = None
    not_fused: str | None = None


class ForgedModule(Numbered, HoldsThresholds, fx.GraphModule):
    """The whole model as one graph, with its thresholds as buffers beside the weights that they guard."""

    @property
    def forging(self) -> Forging:
        return self.meta["forged_fx"]

    @property
    def threshold_buffers(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        return self.meta["threshold_buffers"]

    @property
    def constants(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.meta.get("constants", ())  # (a pickle of an older version's has none)

    def recompile(self) -> Any:
        code = super().recompile()
        if "__call__" in vars(type(self)):  # torch.fx's, which words errors at greater length, at 2 us a call
            del type(self).__call__
        in_place.offer(self)
        return code

    def set_ratio(self, ratio: Ratio) -> None:
        """Move the thresholds, in place and without recompiling. See `transform` for `ratio`."""
        set_ratio(self, ratio)

    def __setattr__(self, name: str, value: Any) -> None:
        check_place(self, name, value)
        super().__setattr__(name, value)

    def _numbered(self) -> dict[str, torch.nn.Module | None]:
        if "numbered" not in self.meta:
            raise TypeError(f"{type(self).__name__!r} object is not subscriptable")
        return self._modules

    def __deepcopy__(self, memo: dict) -> "ForgedModule":
        # Not torch.fx's, which drops hooks and attributes, and looks for parameters where it has taken them from.
        twin: ForgedModule = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        type(twin).__name__ = type(self).__name__  # (a class of its own, as every graph module has)
        twin.graph = twin._graph
        return twin

    def __copy__(self) -> "ForgedModule":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(vars(self))
        hold(twin, self)
        type(twin).__name__ = type(self).__name__
        twin.recompile()
        return twin

    def _replicate_for_data_parallel(self) -> "ForgedModule":
        twin = self.__copy__()
        twin.__dict__ |= {"_parameters": {}, "_is_replica": True}  # nn.DataParallel gives it others, as plain tensors
        return twin

    def __reduce__(self) -> tuple:
        _, (body, imports) = super().__reduce__()
        return _rebuild, (body, imports, type(self).__name__, self.meta)


def _rebuild(body: dict, imports: str, class_name: str, meta: dict, *_: Any) -> ForgedModule:
    """What a pickle calls. It has the parameters, buffers and modules of what was pickled, and no others.

    _: an older version's pickle holds one thing more.
    """
    from torch.fx.graph_module import reduce_graph_module

    pickled = torch.nn.Module()
    hold(pickled, SimpleNamespace(**body))
    plain = reduce_graph_module(body, imports)
    forged = ForgedModule(plain, plain.graph, class_name)
    hold(forged, pickled)
    # what torch.fx leaves out: hooks, and attributes that a user has set
    forged.__dict__.update((n, v) for n, v in body.items() if n.endswith("_hooks") or n not in vars(forged))
    forged.meta = meta
    forged.training = body["training"]
    return forged


@of_ordinary_tensors
def transform(
    model: torch.nn.Module,
    stats: Stats | str | os.PathLike[str],
    ratio: Ratio = OWN,
    *,
    kind: str | Mapping[str, str] = "hard",
    where: Globs = LAYERS,
    statistic: str | None = None,
    include: Globs | None = None,
    exclude: Globs | None = None,
    strict: bool = True,
    example: tuple[tuple, dict] | None = None,
    fuse: bool | None = None,
    only: str | None = None,
    graph: bool = True,
) -> torch.nn.Module:
    """A copy of `model` in which every site's small inputs are set to zero; `model` itself is left untouched.

    Ahead of each linear, convolution and matrix product with weights comes the forged function (section 3 of
    arXiv 2406.19622): `0 where |x| < c_r * c_max, else x`; or one of another kind.

    The copy is one `torch.fx.GraphModule` where a graph is exactly the model, else the model's own modules with the
    thresholds put in place one by one (`describe` says which, and why). Both keep the parameter names and have a
    float32 scalar buffer `forged_threshold` beside the weights of each site (other kinds: docs/kinds.md).

    Args:
        model: the calibrated model.
        stats: what `calibrate(model, ...)` returned, or the path it was saved to.
        ratio: c_r, a number in [0, 1] or a mapping from site name or glob to one. By default 2^-6. 0 changes nothing,
            bit for bit (to rounding where a layer reads a slice with gaps in memory, which a threshold closes, or the
            model ran attention's fused eval-mode kernel, which is opened). For kind "clamp" the share that inputs are
            limited to, for "band" a pair (low, high), for "mean" how many standard deviations; these have no default.
            None, for an end or a site, changes nothing.
        kind: a key of `forged_fx.kinds.KINDS`, or a mapping from site name or glob to one.
        where: "linear+conv", or "activations" (calls of ReLU, GELU and the like, where
            `calibrate(..., where="activations")` saw them), or globs over the names of both.
        statistic: what a ratio is a share of: "max", which is c_max, or "quantile(q)" of |x|: "quantile(0.999)".
        include: globs over site names; only these are forged. Also the way to forge a convolution with a fixed filter.
        exclude: globs over site names; these are not.
        strict: raise if a site cannot be reached. False: leave it out; `describe` says so.
        example: (args, kwargs) for an audit of the result; by default the first calibration batch, where it is at hand
            (statistics from a file have none: a warning says so). The audit runs model and result at ratio 0, compares
            them bit for bit and counts the thresholds that ran; then both with thresholds at work, where the model's
            own are put ahead of its sites as it runs.
        fuse: run thresholds and what produces their inputs (BatchNorm, residual addition, activation, LayerNorm,
            RMSNorm) as one kernel each, in eager mode; see `forged_fx/fuse.py`. By default where the model is on a
            GPU. On a CPU it changes nothing. Needs the whole model as one graph. A second audit compares the result
            with the model, on a GPU within rounding.
        only: "free" forges only the sites whose threshold costs nothing in compiled code, by `forged_fx.cost`, which
            needs an example; the others are left out, each with what it would cost.
        graph: False forges module by module also where one graph is exactly the model. In a graph the layers run, and
            the modules around them do not: they cannot be called. Module by module all of them run, under their own
            classes, so that hooks on a block, activation checkpointing by class and `fully_shard` block by block do
            what they do to the plain model. The results are the same, bit for bit.

    Raises:
        ValueError: the statistics are another model's, or lack what a kind needs; a glob or ratio matches no site;
            there is no such kind; the model is forged already.
        RuntimeError: the audit found sites that cannot be reached (it names each), or a result that is not the model.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"transform takes the model first, then its statistics; the model is {type(model).__name__}")
    stats = Stats().merge(given_stats(stats, "transform"))  # the forged model's own
    check_example(example)
    model = unwrapped(model)
    if fuse not in (None, True, False):
        raise ValueError(f"fuse={fuse!r}: True, False, or None to decide by the model's device")
    if graph not in (True, False):
        raise ValueError(f"graph={graph!r}: True for one graph where it is exactly the model, or False")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("this model is TorchScript, which cannot be opened: forge the model that it was made from")
    if is_sharded(model):
        raise ValueError(
            "this model is sharded: forge it before, and shard the forged one, "
            "fully_shard(forged_fx.transform(model, stats)); statistics of the sharded model fit"
        )
    if thresholds_of(model):
        raise ValueError("this model is forged already: move its thresholds with set_ratio, or forge the plain model")
    stats.check_model(model)
    for name, site in stats.sites.items():  # what calibration saw may have been another class's module
        site.layer = site.layer and is_straight(model.get_submodule(module_of(name)))
    if moved := changed(model, stats.weights):
        warnings.warn(weights_have_changed(moved), stacklevel=3)
    wanted, left_out = select(stats, include, exclude, where)
    tensors = (*model.parameters(), *model.buffers())
    on_meta = any(tensor.is_meta for tensor in tensors)
    example = None if on_meta else example or stats.example
    choice = choose(stats, kind, wanted, statistic)
    choice.values(stats, ratio)  # an error in it had better be seen now
    if only is not None:
        given = {"ratio": ratio, "kind": choice.kinds, "statistic": statistic, "strict": strict, "graph": graph}
        costly = _costly(model, stats, wanted, example, only, **given)
        wanted, left_out = [site for site in wanted if site not in costly], left_out | costly
        choice = choice.of(wanted)
        if costly and not wanted:
            warnings.warn(
                f"only='free' leaves none of {len(costly)} sites forged: forged_fx.describe says what each would cost",
                stacklevel=3,
            )
    with one_at_a_time:
        forged, ran = _forge(model, Forging(stats, {}, left_out, choice), example, strict, graph)
    record = forging_of(forged)
    record.audited = example is not None
    if example:
        _check_seen(ran, record, strict)
        _warn_of_fast_path(model, *example)
    else:
        why, then = _NO_BATCH
        if on_meta:
            record.not_audited, (why, then) = "it had no weights", _ON_META
        warnings.warn(
            f"forged without an audit: {why}, and what a graph lost of the model (type(x) is another one as it is "
            f"recorded, say) was not looked for: {then}",
            stacklevel=3,
        )
    on_gpu = any(tensor.is_cuda for tensor in tensors)
    if on_gpu if fuse is None else fuse:
        _fuse(model, forged, example, exact=not on_gpu)
    set_ratio(forged, ratio)
    return forged


_NO_BATCH = "statistics from a file keep no batch to run", "pass one, example=((x,), {})"
_ON_META = "a model on the meta device has no weights to run with", "forge it once with weights, example=((x,), {})"


def _warn_of_fast_path(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Say so where the plain model, without gradients, is another function than the one that is forged."""
    encoders = [name for name, module in model.named_modules() if isinstance(module, torch.nn.TransformerEncoder)]
    if encoders and not same_on_fast_path(model, args, kwargs):
        warnings.warn(
            f"without gradients the plain model gives something else than with them: {encoders[0] or 'it'!r} takes "
            "PyTorch's fast path, which gives 0 at padded positions. The forged model computes them, as the plain one "
            "does with gradients, and calibration saw them. Build it with enable_nested_tensor=False to have one "
            "function, or switch the fast path off: torch.backends.mha.set_fastpath_enabled(False)",
            stacklevel=4,
        )


def check_example(example: Any) -> None:
    """TypeError for what is neither None nor (args, kwargs)."""
    is_call = (
        isinstance(example, tuple | list)
        and len(example) == 2
        and isinstance(example[0], tuple | list)
        and isinstance(example[1], Mapping)
    )
    if example is not None and not is_call:
        raise TypeError(
            "example is what the model is called with, (args, kwargs): for one tensor example=((x,), {}), not "
            f"{type(example).__name__}"
        )


def _forge(
    model: torch.nn.Module, asked: Forging, example: Any, strict: bool, graph: bool
) -> tuple[torch.nn.Module, set[str]]:
    """The forged model, its thresholds off, and the sites that the audit saw `model` run.

    As one graph, else, where that is not exactly the model or not asked for, module by module. asked: the record of it,
    in which nothing is reached yet.
    """
    wanted = [*asked.choice.kinds]
    try:
        if not graph:
            raise Untraceable("as graph=False asked for")
        forged = _forge_whole(model, asked.stats, asked.choice, example)
        forged.meta["forged_fx"] = dataclasses.replace(asked, reached=dict.fromkeys(wanted, "in the graph"))
        if not example:
            return forged, set()
        missed, ran = audit(model, forged, wanted, *example)
        if missed:
            raise Untraceable(f"the graph does not run the sites {', '.join(missed)}")
        _audit_at_work(model, forged, example)
        return forged, ran
    except (Untraceable, AuditFailed) as error:
        why = error
    try:
        return _forge_modules(model, asked, example, strict, why)
    except AuditFailed:
        opened = copy.copy(asked.stats)  # in which no module is a layer: each runs as written, and its calls are forged
        opened.sites = {name: dataclasses.replace(site, layer=False) for name, site in opened.sites.items()}
        return _forge_modules(model, dataclasses.replace(asked, stats=opened), example, strict, why)


def _forge_modules(
    model: torch.nn.Module, asked: Forging, example: Any, strict: bool, why: Exception
) -> tuple[torch.nn.Module, set[str]]:
    """The same module by module. why: it is not one graph."""
    wanted = [*asked.choice.kinds]
    forged = copied(model, own=sorted(opened_modules(wanted, set())))
    reached = forge_regions(forged, asked.stats, asked.choice)
    forged.forging = record = Forging(
        asked.stats, reached, dict(asked.left_out), asked.choice.of(wanted), not_whole=str(why)
    )
    if not example:
        return forged, set()
    missed, ran = audit(model, forged, wanted, *example)
    if missed and strict:
        raise RuntimeError(
            f"sites {', '.join(map(repr, missed))} cannot be reached: the audit did not see their thresholds run. "
            f"Leave them out with exclude={missed!r}, or accept it with strict=False{_hint(model, missed)}"
        ) from why
    for site in missed:
        del record.reached[site], record.choice.kinds[site]
        record.left_out[site] = "the audit did not see its threshold run"
    _audit_at_work(model, forged, example)
    return forged, ran


def _audit_at_work(model: torch.nn.Module, forged: torch.nn.Module, example: Any) -> None:
    """With thresholds that change much; behind it they change nothing again."""
    record, buffers = forging_of(forged), parameters_of(forged)
    changes: dict[str, Callable] = {
        site: functools.partial(_changed, record.choice[site], record.stats.sites[site], buffers[site])
        for site in record.reached
    }
    _write(buffers, record.choice.tried(record.stats))
    try:
        audit_at_work(model, forged, changes, *example)
    finally:
        _write(buffers, record.choice.off(record.stats))


def _changed(kind: Kind, site: SiteStats, parameters: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    return kind.op(x, *parameters, *kind.rest(site))


def _check_seen(ran: set[str], record: Forging, strict: bool) -> None:
    """What the model ran in the audit is what calibration saw of it, or the statistics are not this model's."""
    seen = record.stats.sites
    if seen and ran.isdisjoint(seen):
        what = f"it ran {', '.join(map(repr, sorted(ran)[:3]))}" if ran else "it ran no site at all"
        raise RuntimeError(
            f"the model runs none of the {len(seen)} sites that calibration saw ({what}): the statistics are "
            "those of another form of it (a traced or exported one, say); calibrate the model that is to be forged"
        )
    unseen = sorted(ran - seen.keys())
    if unseen and strict:
        raise RuntimeError(
            f"the model runs sites that calibration did not see: {', '.join(map(repr, unseen))}. They would stay as "
            "they are. Calibrate on data that reaches them, or accept it with strict=False"
        )
    record.left_out |= dict.fromkeys(unseen, "calibration did not see it")


def _hint(model: torch.nn.Module, missed: list[str]) -> str:
    """What else may help: a hook's calls count as its module's, and run ahead of the forward that is forged."""
    hooked = {module_of(site) for site in missed if model.get_submodule(module_of(site))._forward_pre_hooks}
    if not hooked:
        return ""
    return (
        f". {', '.join(map(repr, sorted(hooked)))} has hooks that run ahead of its forward: where torch.nn.utils made "
        "them (spectral_norm), remove_spectral_norm leaves the weight as it is, and torch.nn.utils.parametrizations "
        "has one without hooks"
    )


def _costly(
    model: torch.nn.Module, stats: Stats, wanted: list[str], example: Any, only: str, **given: Any
) -> dict[str, str]:
    """The sites whose threshold is not free -> what it costs. given: how to forge, as `transform` takes it."""
    from forged_fx.cost import cost  # late: it needs the compiler

    if only != "free":
        raise ValueError(f"only={only!r}: 'free' is the one choice; to name sites, take include= or exclude=")
    if not wanted:
        return {}
    if example is None:
        raise ValueError("only='free' runs a model with weights to see what costs: pass example=(args, kwargs)")
    forged = transform(model, stats, **given, where=wanted, example=example, fuse=False)
    costs = cost(forged, *example)
    return {site: f"not free: {price.alone or price}" for site, price in costs.items() if not price.free}


def _fuse(model: torch.nn.Module, forged: torch.nn.Module, example: Any, exact: bool) -> None:
    """Fuse in place, thresholds at 0, and say so in the record; or leave it, and say why."""
    record = forging_of(forged)
    record.fused = 0
    if not isinstance(forged, ForgedModule):
        record.not_fused = "only one graph can be"
        return
    unfused = copy.deepcopy(forged.graph)
    fused = fuse_producers(forged)
    try:
        missed = audit(model, forged, [*record.reached], *example, agree=same if exact else alike)[0] if example else []
        record.not_fused = f"the audit did not see the thresholds of {', '.join(missed)} run" if missed else None
    except AuditFailed as error:
        record.not_fused = str(error)
    if record.not_fused:
        forged.graph = unfused
        return
    record.fused = len(fused)
    record.reached |= {site: f"in the graph, in one call with {producer}" for site, producer in fused.items()}


def select(
    stats: Stats, include: Globs | None, exclude: Globs | None, where: Globs = LAYERS
) -> tuple[list[str], dict[str, str]]:
    """The sites to forge, and for each of the others why it is left out. ValueError where the globs leave none."""
    include = None if include is None else _globs(include, "include")
    exclude = None if exclude is None else _globs(exclude, "exclude")
    where = where if isinstance(where, str) and where in (LAYERS, ACTIVATIONS) else _globs(where, "where")
    if include == []:
        raise ValueError("include names no site: leave it out to forge all of them")
    if where == []:
        raise ValueError(f"where names no site: leave it out to forge {LAYERS}, or pass globs over site names")
    names = _places(stats, where)
    by_default = [name for name in names if stats.sites[name].left_out is None]
    chosen = match_sites(include, names, "include") if include is not None else by_default
    chosen = [name for name in chosen if stats.sites[name].left_out in FORGEABLE]
    dropped = match_sites(exclude, names, "exclude") if exclude is not None else []
    wanted = [name for name in chosen if name not in dropped]
    reasons = {name: stats.sites[name].left_out or "not in include" for name in names if name not in chosen}
    if isinstance(where, list):
        reasons |= {name: "not in where" for name in stats.sites if name not in names}
    reasons |= dict.fromkeys((n for n in dropped if n in chosen), "in exclude")
    if not wanted and (include or exclude or isinstance(where, list)):
        site, why = min(reasons.items(), key=lambda reason: reason[1] in ("not in include", "not in where"))
        raise ValueError(
            f"no site is left to forge ({site!r}: {why}): ask for others; what is to stay the model as it is needs no "
            "forging, and forged_fx.set_ratio(forged, None) turns a forged one off"
        )
    return wanted, reasons


def forging_of(module: torch.nn.Module) -> Forging | None:
    """The record of a forged model, None for any other module."""
    return module.meta.get("forged_fx") if isinstance(module, ForgedModule) else vars(module).get("forging")


def in_force(module: torch.nn.Module, record: Forging) -> dict[str, tuple[torch.Tensor, ...]]:
    """site name -> its buffers' values, of a forged model and its record; ValueError if a layer that held some was
    replaced."""
    found = parameters_of(module)
    if gone := lost(found, record.reached):
        raise ValueError(gone)
    return {site: tuple(map(valued, buffers)) for site, buffers in found.items()}


def set_ratio(forged: torch.nn.Module, ratio: Ratio) -> None:
    """Set every threshold of a forged model to `ratio * c_max`, in place.

    Nothing is traced or compiled again, but once where layers that read the same tensor are given different thresholds.

    ratio: as in `transform`, for the kind that each site has; None turns them all off.
    Raises ValueError for a model that is not forged, or whose layers were replaced since, and as `transform` does.
    """
    found = [(module, record) for module in forged.modules() if (record := forging_of(module))]
    if not found:
        raise ValueError(not_forged(forged, "set_ratio"))
    sites = [[*record.stats.sites] for _, record in found]
    if isinstance(ratio, Mapping):
        match_sites([*ratio], [name for names in sites for name in names], "ratio")
    values = []  # all of them first: an error leaves every model as it is
    for (module, record), names in zip(found, sites, strict=True):
        own = ratio
        if isinstance(ratio, Mapping):  # of the patterns those that mean this model
            own = {pattern: r for pattern, r in ratio.items() if any(means(pattern, name) for name in names)}
        values.append((in_force(module, record), record.choice.values(record.stats, own)))
    for buffers, of_sites in values:
        _write(buffers, of_sites)


def _write(buffers: Mapping[str, tuple[torch.Tensor, ...]], values: Mapping[str, tuple[Any, ...]]) -> None:
    """Give the sites' buffers these values, in place."""
    with torch.no_grad():
        for site in values:
            for buffer, value in zip(buffers[site], values[site], strict=True):
                buffer.copy_(torch.as_tensor(value, dtype=torch.float32, device=buffer.device))


def _forge_whole(model: torch.nn.Module, stats: Stats, choice: Choice, example: Any) -> ForgedModule:
    """The model as one graph, with thresholds that change nothing yet. Raises Untraceable."""
    wanted = [*choice.kinds]
    if stats.at_times:
        raise Untraceable(f"only some of calibration's batches gave {', '.join(map(repr, sorted(stats.at_times)))}")
    layer_sites = {
        name
        for name, site in stats.sites.items()
        if site.layer and not hooks_its_input(model.get_submodule(module_of(name)))
    }
    opened = opened_modules(wanted, layer_sites)
    graph, constants = capture(model, opened, stats.given, stats.contexts, example)
    if written := written_attribute(graph):
        raise Untraceable(f"its forward writes into {written!r}, which a graph would not do")
    keys, own = model.state_dict().keys(), {name for name, _ in _tensors_of(model)}
    model = copied(model, own=sorted(opened_modules(wanted, set())))
    settle(graph, model)
    for name, value in constants.items():
        model.register_buffer(name, value, persistent=False)
    buffers: dict[str, tuple[str, ...]] = {}

    def place(site: str) -> Placed | None:
        if site not in wanted:
            return None
        kind, row = choice[site], stats.sites[site]
        buffers[site] = qualified(site, register(model.get_submodule(module_of(site)), site, kind, row, model))
        return Placed(kind.op, (*map(graph.get_attr, buffers[site]), *kind.rest(row)))

    layers = {module_of(site): WHOLE[mark_of(site)] for site in layer_sites if module_of(site) not in opened}
    calls = find_calls(graph, _module_of_node, layers, {**CALLS, **ACTIVATION_CALLS})
    names = number(calls)
    for name, call in zip(names, calls, strict=True):
        if name in wanted and (made := call.call) not in WHOLE.values() and made.kind != stats.sites[name].kind:
            raise Untraceable(f"what calibration saw as {stats.sites[name].kind} at {name!r} is {made.kind} in a graph")
    insert_thresholds(graph, calls, names, place, _source)
    write_back.in_graph(graph, model, stats)
    write_back.keep_what_is_read(graph, model)
    if missed := [name for name in wanted if name not in buffers]:
        raise Untraceable(f"the graph lacks the sites {', '.join(missed)}")
    # torch.fx writes Python with the modules' names in it
    if odd := [name for name, _ in model.named_modules() if set(name) & {'"', "\\", "\n", "\r", "\0"}]:
        raise Untraceable(f"its graph cannot be written as Python: a module is called {odd[0]!r}")
    held = skeleton(model, opened, {node.target for node in graph.find_nodes(op="get_attr")})
    try:
        forged = ForgedModule(held, graph, class_name=f"Forged{type(model).__name__}")
    except SyntaxError as error:
        raise Untraceable(f"its graph cannot be written as Python: {error}") from error
    hold(forged, held)
    take_attributes(forged, held)
    if gone := keys - forged.state_dict().keys():
        raise Untraceable(f"the graph cannot hold {min(gone)!r}")
    forged.meta["threshold_buffers"] = buffers
    own.update(*buffers.values())
    forged.meta["constants"] = tuple(name for name, _ in _tensors_of(forged) if name not in own)
    if container_for(model) is ListContainer:
        forged.meta["numbered"] = True
    return forged


def _tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _module_of_node(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def _source(node: fx.Node) -> Origin:
    """Calibration has told parameters from buffers; here it is enough to know what is data."""
    return Origin.DATA if node.op == "placeholder" else Origin.CONSTANT


def _places(stats: Stats, where: str | list[str]) -> list[str]:
    """The names of the sites that are in question."""
    if isinstance(where, list):
        return match_sites(where, list(stats.sites), "where")
    found = [name for name in stats.sites if is_activation(name) == (where == ACTIVATIONS)]
    if not found and where == ACTIVATIONS:
        raise ValueError(
            "these statistics hold no activation: take them with "
            "forged_fx.calibrate(model, batches, where='activations'), unless that is how they were taken; then the "
            f"model calls none of {', '.join(sorted({call.kind for call in ACTIVATION_CALLS.values()}))}"
        )
    return found


def _globs(given: Globs, name: str) -> list[str]:
    """As a list, which can be gone through twice. name: of the argument."""
    if not isinstance(given, str | Iterable):
        raise TypeError(f"{name}={given!r}: a glob over site names, or several, such as ['conv*', 'head']")
    return [given] if isinstance(given, str) else list(given)
