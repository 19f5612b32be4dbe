"""torch.compile(backend="forged"): Inductor, with the threshold as a pointwise node that fuses into its producer.

Found through the entry point group `torch_dynamo_backends`: nothing needs to be imported. Two uses:

    torch.compile(forged_model, backend="forged")
    torch.compile(plain_model, backend="forged", options={"stats": stats, "ratio": 2**-6})

The second forges Dynamo's graphs on their way to Inductor, at the same sites and with the same thresholds that
`transform` would use. Dynamo may cut the model into several graphs: what no graph reaches is an error.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import behind_relu, torch_internals
from forged_fx.bpda import let_through, straight_through_enabled
from forged_fx.frames import Compilation, Frame, passes
from forged_fx.hoist import hoist
from forged_fx.kinds import choose
from forged_fx.lowering import register_lowerings
from forged_fx.modes import runs_eagerly
from forged_fx.ops import THRESHOLD_OPS
from forged_fx.prologue import Patience, offer
from forged_fx.rewrite import find_calls, insert_thresholds, nested
from forged_fx.share import share, thresholds_in
from forged_fx.sites import OPENED, Origin, is_activation, names_of
from forged_fx.stats import Stats
from forged_fx.thresholds import thresholds_of
from forged_fx.transform import LAYERS, select
from forged_fx.weights import changed, weights_have_changed

OPTIONS = ("stats", "ratio", "kind", "where", "statistic", "include", "exclude", "strict")
_OF_TRANSFORM = ("only", "fuse", "graph", "example")

# For each plain model that is being compiled, what all of its graphs and recompilations share, one for each options.
_compilations: WeakKeyDictionary[torch.nn.Module, list[Compilation]] = WeakKeyDictionary()


def forged(
    gm: fx.GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable:
    """The backend. Dynamo calls it with a graph; it returns what runs in the graph's place.

    mode: one of Inductor's (`default`, `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`).
    options: `stats` (a Stats, or the path of one), `ratio`, `kind`, `where` (layers only), `statistic`, `include`,
        `exclude` as in `forged_fx.transform`, to forge a plain model; `strict=False` to compile it although some sites
        cannot be reached; every other key must be one of Inductor's own options.
    Raises ValueError for an unknown option (it offers the nearest known one), statistics of another model, or a site
    that no graph reaches; the last one at the end of each forward pass.
    """
    ours, inductor = _split(options or {})
    register_lowerings()
    patches = {**torch_internals.inductor().list_mode_options(mode), **inductor} if mode else inductor
    if not ours:
        callers = list(torch_internals.modules_on_stack())
        if not (thresholds_of(callers[-1]) if callers else _forged_or_no_model(gm)):
            warnings.warn(
                "this model is not forged, and there is no options={'stats': ...}: compiled as it is. (Where one that "
                "was compiled with them runs within, Dynamo looks through it, and drops them: forge it with "
                "forged_fx.transform instead.)",
                stacklevel=2,
            )
        share(gm.graph)
        if straight_through_enabled():
            _straight_through(gm.graph)
        with torch_internals.choosing(Patience):
            return _compile(gm, inputs, patches, _version())
    frame = _forge_graph(torch_internals.twin(gm), ours)
    # Freezing writes thresholds into the code as numbers, which Inductor's cache does not look at.
    frozen = patches.get("freezing", torch_internals.inductor().config.freezing)
    version = _version() + repr(frame.scalars() if frozen else "").encode()
    with torch_internals.choosing(Patience):
        return frame.bind(_compile(frame.gm, [*inputs, *frame.examples], patches, version))


def _straight_through(graph: fx.Graph) -> None:
    """Tell the thresholds of a graph, as the mode would: those that Dynamo has recorded in what is checkpointed, where
    it heeds no mode, and those that were put into its graph since."""
    for node in graph.nodes:
        if inside := nested(node):
            _straight_through(inside[0].graph)
            inside[0].recompile()
        elif node.target in THRESHOLD_OPS:
            node.args, node.kwargs = let_through(node.target, node.args, node.kwargs)


def _forged_or_no_model(gm: fx.GraphModule) -> bool:
    """Of a compiled function's graph: whether a forged model runs in it, or none at all."""
    lifted = map(torch_internals.lifted_value, gm.graph.find_nodes(op="placeholder"))
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    return any(map(thresholds_in, graphs)) or not any(isinstance(v, torch.nn.Parameter) and v.dim() > 1 for v in lifted)


def _compile(gm: fx.GraphModule, inputs: list[Any], patches: dict[str, Any], version: bytes) -> Callable:
    """By Inductor, with its options, and ours ahead of the caller's own passes.

    Thresholds move before Inductor has the graph: of what a pass has changed, and of all that comes behind it, it works
    out the tensors once more.
    """
    inductor = torch_internals.inductor()

    def inner(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        hoist(graph.graph)
        behind_relu.join(graph.graph)
        return inductor.compile_fx_inner(graph, *args, **kwargs)

    ours, theirs = torch_internals.graph_pass(offer, version), patches.get("post_grad_custom_pre_pass") or []
    several = [ours, *(theirs if isinstance(theirs, list) else [theirs])]
    patches = {**patches, "post_grad_custom_pre_pass": several if theirs else ours}  # (2.11, 2.12: no list)
    return inductor.compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)


@functools.cache
def _version() -> bytes:
    """Of everything that decides which code comes out: the library's own source."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted({*here.glob("**/*.py"), *(here / "kernels").glob("*.py")}):  # a link in a checkout: ** passes by
        digest.update(path.read_bytes())
    return digest.digest()


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options, and Inductor's."""
    if not isinstance(options, dict):
        raise TypeError(f"options={options!r}: a dict, such as {{'stats': stats}}")
    known = [*OPTIONS, *torch_internals.inductor().list_options()]
    for key in options:
        if not isinstance(key, str) or key.replace("-", "_") not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"ours are {', '.join(OPTIONS)}, the rest Inductor's"
            if key in _OF_TRANSFORM:
                hint = "forged_fx.transform takes it: compile what that returns"
            raise ValueError(f"backend 'forged' has no option {key!r}; {hint}")
    options = {key.replace("-", "_"): value for key, value in options.items()}  # both are Inductor's spelling
    ours = {key: value for key, value in options.items() if key in OPTIONS}
    if ours and "stats" not in ours:
        raise ValueError(f"options {', '.join(ours)} need 'stats' too: what forged_fx.calibrate returned, or its file")
    if ours and not isinstance(ours["stats"], Stats | str | os.PathLike):
        kind = type(ours["stats"]).__name__
        raise TypeError(f"option 'stats' is {kind}: pass what forged_fx.calibrate returned, or its file's path")
    type_of = torch_internals.inductor().config.get_type
    for key, value in options.items():
        is_flag = key == "strict" if key in OPTIONS else type_of(key) is bool
        if is_flag and not isinstance(value, bool):
            raise ValueError(f"option {key!r} is {value!r}: True, or False")
    return ours, {key: value for key, value in options.items() if key not in OPTIONS}


def _forge_graph(gm: fx.GraphModule, options: dict[str, Any]) -> Frame:
    """Put the thresholds into one of Dynamo's graphs."""
    callers = list(torch_internals.modules_on_stack())
    if not callers:
        raise ValueError("options={'stats': ...} needs a compiled module: torch.compile(model, ...), not a function")
    compilation = _compilation(callers, options)
    compilation.this_pass()  # from now on, the pass is checked when it is through
    _open_compositions(gm)
    root = compilation.root()
    names = names_of(root)
    here = next((module for module in callers if id(module) in names), root)
    calls = find_calls(gm.graph, lambda node: _module_of_node(node, names, names[id(here)]), {})
    alike = [module for module in root.modules() if type(module) is type(here)]
    weights = (weight for module in alike for weight in module.parameters() if weight.dim() > 1)  # (a norm's tell none)
    shared = len(alike) > 1 and all(compilation.owner(weight) is not None for weight in weights)
    frame = Frame(gm, calls, compilation, shared)
    insert_thresholds(gm.graph, calls, frame.names, frame.place, _source(root))
    if straight_through_enabled():
        _straight_through(gm.graph)
    gm.recompile()
    if frame.bound:
        torch_internals.guard_identity(gm)
    return frame


def _compilation(callers: list[torch.nn.Module], options: dict[str, Any]) -> Compilation:
    """The one that these options have begun, or a new one, for the module that the statistics belong to: the outermost
    running one that fits, or the first within it."""
    said, written = _said(options)
    # as they are now: the caller may change them in place
    said = {key: copy.copy(value) if isinstance(value, dict | list | set) else value for key, value in said.items()}
    stats = options["stats"] if isinstance(options["stats"], Stats) else Stats.load(options["stats"])
    candidates = [*reversed(callers), *(m for m in callers[-1].modules() if m is not callers[-1])]
    for module in candidates:
        for compilation in _compilations.get(module, ()):
            if compilation.options == said and compilation.stats == stats:
                return compilation
    root = next((module for module in candidates if stats.fits(module)), None)
    if any(thresholds_of(module) for module in callers):
        raise ValueError(
            "this model is forged already: compile it without options={'stats': ...}, or compile the plain model"
        )
    if root is None:
        stats.check_model(callers[-1])
    if moved := changed(root, stats.weights):
        warnings.warn(weights_have_changed(moved), stacklevel=2)
    wanted, _ = select(stats, said.get("include"), said.get("exclude"), said.get("where", LAYERS))
    if activations := [site for site in wanted if is_activation(site)]:
        raise ValueError(
            f"sites ahead of activations, such as {activations[0]!r}, are not forged on the way through torch.compile: "
            "forge the model with forged_fx.transform, and compile that"
        )
    choice = choose(stats, said.get("kind", "hard"), wanted, said.get("statistic"))
    new = Compilation(root, stats, choice, said, written, repeats=root is not callers[-1])
    _compilations.setdefault(root, []).append(new)
    return new


def _said(options: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """What the options say, but for the statistics; and of a file of those, which may be another by now, when it was
    written, and how long it is. Asked for at each call."""
    written = None
    if not isinstance(stats := options["stats"], Stats):
        with contextlib.suppress(OSError):  # gone, it says nothing else
            found = os.stat(stats)
            written = found.st_mtime_ns, found.st_size
    return {key: value for key, value in options.items() if key != "stats"}, written


def _check_said(ran: Compilation, options: dict[str, Any]) -> None:
    """Dynamo takes options for the same that hold the same objects, or name the same file."""
    said, written = _said(options)
    if said == ran.options and (written in (None, ran.written) or Stats.load(options["stats"]) == ran.stats):
        ran.written = written
        return
    raise ValueError(
        "what ran is what the options said when this model was compiled with them: since then they were changed in "
        "place, or another file was written to the path of the statistics. torch._dynamo.reset() has it compiled anew"
    )


def _open_compositions(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if body := nested(node):
            _open_compositions(body[0])
            body[0].recompile()
        elif node.target in OPENED:
            torch_internals.inline_opened(gm, node, OPENED[node.target])


def _strict(backend: Callable, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Our options, where every site is to be forged."""
    options = arguments.get("options", {})
    if backend is not forged or "stats" not in options or not options.get("strict", True):
        return None
    return {key: value for key, value in options.items() if key in OPTIONS}


def _watch(model: torch.nn.Module, options: dict[str, Any]) -> Callable[[], None]:
    """Dynamo may give a whole pass up without a graph; then neither the backend nor a graph of its hears of it."""
    before = passes.ended

    def check() -> None:
        if runs_eagerly():
            return
        if passes.ended > before and passes.last.root() is model:
            _check_said(passes.last, options)
        if passes.ended == before and (missed := (compilation := _compilation([model], options)).always):
            compilation.refuse(missed)

    return check


torch_internals.around_calls_of_compiled_modules(_strict, _watch)


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
        if node.op == "get_attr" or is_size or id(value) in constants:
            return Origin.CONSTANT
        return Origin.DATA if torch_internals.is_local(node) else Origin.UNKNOWN

    return source
