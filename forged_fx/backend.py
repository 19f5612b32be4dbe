"""torch.compile(backend="forged"): Inductor, with the threshold as a pointwise node that fuses into its producer.

Found through the entry point group `torch_dynamo_backends`: nothing needs to be imported. Two uses:

    torch.compile(forged_model, backend="forged")
    torch.compile(plain_model, backend="forged", options={"stats": stats, "ratio": 2**-6})

The second forges Dynamo's graph on its way to Inductor, at the same sites and with the same thresholds that `transform`
would use.
"""

import difflib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import ops
from forged_fx.rewrite import insert_thresholds
from forged_fx.sites import Origin, names_of
from forged_fx.stats import Stats
from forged_fx.transform import select

OPTIONS = ("stats", "ratio", "include", "exclude")

# Thresholds of a plain model that is being compiled, by site: all of its graphs, and all recompilations, share them.
_thresholds: WeakKeyDictionary[torch.nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def forged(
    gm: fx.GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable:
    """The backend. Dynamo calls it with a graph; it returns what runs in the graph's place.

    mode: one of Inductor's (`default`, `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`).
    options: `stats` (a Stats, or the path of one), `ratio`, `include`, `exclude` as in `forged_fx.transform`, to forge
        a plain model; every other key must be one of Inductor's own options.
    Raises ValueError for an unknown option (it offers the nearest known one), or statistics of another model.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    ours, inductor = _split(options or {})
    ops.register_lowerings()
    if ours:
        _forge_graph(gm, **ours)
    patches = {**list_mode_options(mode), **inductor} if mode else inductor
    return compile_fx(gm, inputs, config_patches={"post_grad_custom_post_pass": _version_stamp(), **patches})


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
    gm: fx.GraphModule, stats: Stats | str | os.PathLike, ratio: Any = 2**-6, include: Any = None, exclude: Any = None
) -> None:
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    callers = list(_modules_on_stack())
    root = _root(callers, stats)
    names = names_of(root)
    here = next((names[id(module)] for module in callers if id(module) in names), "")
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
        _declare_buffer(gm, name)
        return gm.graph.get_attr(name)

    module_of_node, straight_through = _module_of_node(names, here), ops.straight_through_enabled()
    insert_thresholds(gm.graph, place, module_of_node, set(), _source(root), straight_through)
    gm.recompile()


def _modules_on_stack() -> Iterator[torch.nn.Module]:
    """The modules whose forward is running now, innermost first. Dynamo compiles a frame while it waits to run."""
    call = torch.nn.Module._call_impl.__code__
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is call:
            module = frame.f_locals["self"]
            yield getattr(module, "_orig_mod", module)
        frame = frame.f_back


def _root(callers: list[torch.nn.Module], stats: Stats) -> torch.nn.Module:
    """The module that the statistics belong to: the outermost running one that fits."""
    if not callers:
        raise ValueError("options={'stats': ...} needs a compiled module: torch.compile(model, ...), not a function")
    errors = []
    for module in reversed(callers):
        try:
            stats.check_model(module)
            return module
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _module_of_node(names: dict[int, str], here: str) -> Callable[[fx.Node], str]:
    def module_of_node(node: fx.Node) -> str:
        # The stack's names are relative to the frame that Dynamo compiled, but its keys are the modules' ids.
        inner = (int(key.partition("@")[0]) for key in reversed(node.meta.get("nn_module_stack") or {}))
        return next((names[key] for key in inner if key in names), here)

    return module_of_node


def _source(root: torch.nn.Module) -> Callable[[fx.Node], Origin]:
    known = {id(value): Origin.CONSTANT for module in root.modules() for value in [*vars(module).values()]}
    known |= {id(value): Origin.CONSTANT for value in root.buffers()}

    def source(node: fx.Node) -> Origin:
        if node.op == "get_attr":
            return Origin.CONSTANT
        example = getattr(node.meta.get("grapharg"), "example", None)
        if isinstance(example, torch.nn.Parameter):
            return Origin.PARAMETER
        return known.get(id(example), Origin.DATA)

    return source


def _declare_buffer(gm: fx.GraphModule, name: str) -> None:
    """Tell AOTAutograd where a buffer that Dynamo did not make came from."""
    from torch._dynamo.source import ConstantSource

    gm._param_name_to_source[name] = ConstantSource(name)


def _version_stamp() -> Any:
    """A pass that does nothing, for its uuid: Inductor's cache key does not cover a lowering's body, so without it a
    changed lowering would be served from the cache with the old numbers."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class VersionStamp(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            pass

        def uuid(self) -> bytes:
            return Path(ops.__file__).read_bytes()

    return VersionStamp()
