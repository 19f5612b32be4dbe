"""torch.compile(backend="forged"): Inductor, with the threshold as a pointwise node that fuses into its producer.

Found through the entry point group `torch_dynamo_backends`: nothing needs to be imported. Two uses:

    torch.compile(forged_model, backend="forged")
    torch.compile(plain_model, backend="forged", options={"stats": stats, "ratio": 2**-6})

The second forges Dynamo's graphs on their way to Inductor, at the same sites and with the same thresholds that
`transform` would use. Dynamo may cut the model into several graphs: what no graph reaches is an error.
"""

import difflib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import ops, torch_internals
from forged_fx.hoist import hoist
from forged_fx.rewrite import CallNode, find_calls, insert_thresholds
from forged_fx.sites import OPENED, Origin, call_of, module_of, names_of
from forged_fx.stats import Stats
from forged_fx.transform import select

OPTIONS = ("stats", "ratio", "include", "exclude", "strict")

# Thresholds of a plain model that is being compiled, by site: all of its graphs, and all recompilations, share them.
_thresholds: WeakKeyDictionary[torch.nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_seen: WeakSet[torch.nn.Module] = WeakSet()  # compiled modules whose backend was called


def forged(
    gm: fx.GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable:
    """The backend. Dynamo calls it with a graph; it returns what runs in the graph's place.

    mode: one of Inductor's (`default`, `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`).
    options: `stats` (a Stats, or the path of one), `ratio`, `include`, `exclude` as in `forged_fx.transform`, to forge
        a plain model; `strict=False` to compile it although some sites cannot be reached; every other key must be one
        of Inductor's own options.
    Raises ValueError for an unknown option (it offers the nearest known one), statistics of another model, or a site
    that no graph reaches; the last one at the end of the first forward pass.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    ours, inductor = _split(options or {})
    ops.register_lowerings()
    if ours:
        _forge_graph(gm, **ours)
    patches = {**list_mode_options(mode), **inductor} if mode else inductor
    theirs = patches.get("post_grad_custom_pre_pass") or []
    passes = [torch_internals.graph_pass(hoist, _version()), *(theirs if isinstance(theirs, list) else [theirs])]
    return compile_fx(gm, inputs, config_patches={**patches, "post_grad_custom_pre_pass": passes})


@functools.cache
def _version() -> bytes:
    """Of everything that decides which code comes out: the library's own source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("**/*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options, and Inductor's."""
    from torch._inductor import list_options

    known = [*OPTIONS, *list_options()]
    for key in options:
        if key.replace("-", "_") not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"ours are {', '.join(OPTIONS)}, the rest Inductor's"
            raise ValueError(f"backend 'forged' has no option {key!r}; {hint}")
    ours = {key: value for key, value in options.items() if key in OPTIONS}
    if ours and "stats" not in ours:
        raise ValueError(f"options {', '.join(ours)} need 'stats' too: what forged_fx.calibrate returned, or its file")
    return ours, {key: value for key, value in options.items() if key not in OPTIONS}


def _forge_graph(
    gm: fx.GraphModule,
    stats: Stats | str | os.PathLike,
    ratio: Any = 2**-6,
    include: Any = None,
    exclude: Any = None,
    strict: bool = True,
) -> None:
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    callers = list(torch_internals.modules_on_stack())
    if not callers:
        raise ValueError("options={'stats': ...} needs a compiled module: torch.compile(model, ...), not a function")
    root = _root(callers, stats)
    wanted, _ = select(stats, include, exclude)
    values = stats.thresholds(ratio, wanted)
    shared = _thresholds.setdefault(root, {})
    device = next((t.device for t in [*root.parameters(), *root.buffers()]), torch.device("cpu"))

    def place(site: str) -> fx.Node | None:
        if site not in values:
            return None
        buffer = shared.setdefault(site, torch.zeros((), device=device)).fill_(values[site])
        name = f"forged_threshold_{len(list(gm.named_buffers(recurse=False)))}"
        gm.register_buffer(name, buffer)
        torch_internals.declare_buffer(gm, name)
        return gm.graph.get_attr(name)

    for function, opened in OPENED.items():
        for node in gm.graph.find_nodes(op="call_function", target=function):
            torch_internals.inline_opened(gm, node, opened)
    names = names_of(root)
    here = next((names[id(module)] for module in callers if id(module) in names), "")
    calls = find_calls(gm.graph, lambda node: _module_of_node(node, names, here), set())
    call_names = _resolve(calls, stats, root, wanted if strict else [])
    insert_thresholds(gm.graph, calls, call_names, place, _source(root), ops.straight_through_enabled())
    gm.recompile()
    torch_internals.guard_identity(gm)
    if strict:
        torch_internals.at_end_of_call(lambda: _check_reached(stats, wanted, shared))


def _check_called(model: torch.nn.Module, backend: Callable, arguments: dict[str, Any]) -> None:
    """Dynamo may give the whole model up without a graph; then the backend never hears of it."""
    options = arguments.get("options", {})
    if backend is not forged or "stats" not in options or not options.get("strict", True) or model in _seen:
        return
    if not any(module in _thresholds for module in model.modules()):
        stats = options["stats"] if isinstance(options["stats"], Stats) else Stats.load(options["stats"])
        _check_reached(stats, select(stats, options.get("include"), options.get("exclude"))[0], {})
    _seen.add(model)


torch_internals.after_calls_of_compiled_modules(_check_called)


def _root(callers: list[torch.nn.Module], stats: Stats) -> torch.nn.Module:
    """The module that the statistics belong to: the outermost running one that fits, or the first within it."""
    candidates = [*reversed(callers), *(m for m in callers[-1].modules() if m is not callers[-1])]
    for module in candidates:
        if stats.fits(module):
            return module
    stats.check_model(callers[-1])
    raise AssertionError("check_model raises where fits is False")


def _resolve(calls: list[CallNode], stats: Stats, root: torch.nn.Module, wanted: list[str]) -> list[str]:
    """The names of the calls in one of the graphs that Dynamo has cut a forward pass into.

    Where the graph holds all calls of a module, their order tells them apart, else the parameter that they read.
    """
    in_graph: dict[str, list[CallNode]] = {}
    for call in calls:
        in_graph.setdefault(call.module, []).append(call)
    parameters = {id(value): name for name, value in root.named_parameters()}
    names = {}
    for module, group in in_graph.items():
        sites = {call_of(name): site for name, site in stats.sites.items() if module_of(name) == module}
        whole = len(group) == max((site.module_calls for site in sites.values()), default=-1)
        for i, call in enumerate(group):
            weight = _weight_name(call, parameters)
            same = [k for k, s in sites.items() if (s.kind, s.weight) == (call.call.kind, weight)]
            if whole:
                k = i
            elif len(same) == 1:
                (k,) = same
            elif ambiguous := [s for s in wanted if module_of(s) == module and call_of(s) in same]:
                raise ValueError(
                    f"sites {', '.join(map(repr, ambiguous))} cannot be told apart: a graph break lies between these "
                    "calls on one weight. Forge the model with forged_fx.transform, or leave them out with exclude="
                )
            else:
                k = -1
            names[call.node] = module if k == 0 and module else f"{module}#{k}"
    return [names[call.node] for call in calls]


def _weight_name(call: CallNode, parameters: dict[int, str]) -> str | None:
    operands = call.call.operands(call.node.args, call.node.kwargs)
    found = [parameters.get(id(torch_internals.lifted_value(v))) for _, _, v in operands if isinstance(v, fx.Node)]
    return next((name for name in reversed(found) if name is not None), None)


def _check_reached(stats: Stats, wanted: list[str], reached: dict[str, Tensor]) -> None:
    """Every wanted site that calibration saw in each batch must be in some graph by the end of a forward pass."""
    missed = [s for s in wanted if s not in reached and stats.sites[s].calls >= stats.batches]
    if missed:
        message = (
            f"sites {', '.join(map(repr, missed))} are not in any graph that torch.compile made: their code runs "
            "uncompiled, in attention's fused eval-mode kernel (torch.backends.mha.set_fastpath_enabled(False) opens "
            "it), or beyond torch._dynamo.config.recompile_limit. Forge the model with forged_fx.transform, leave "
            "them out with exclude=, or accept it with strict=False"
        )

        def refuse() -> None:
            raise ValueError(message)

        torch_internals.before_every_call(refuse)
        refuse()


def _module_of_node(node: fx.Node, names: dict[int, str], here: str) -> str:
    return next((names[key] for key in torch_internals.module_ids(node) if key in names), here)


def _source(root: torch.nn.Module) -> Callable[[fx.Node], Origin]:
    constants = {id(v) for module in root.modules() for v in vars(module).values() if isinstance(v, Tensor)}
    constants |= {id(buffer) for buffer in root.buffers()}

    def source(node: fx.Node) -> Origin:
        value = torch_internals.lifted_value(node)
        if isinstance(value, torch.nn.Parameter):
            return Origin.PARAMETER
        is_size = isinstance(node.meta.get("example_value"), int | torch.SymInt)
        return Origin.CONSTANT if node.op == "get_attr" or is_size or id(value) in constants else Origin.DATA

    return source
