"""What was done to a model, site by site, and what was left out, and why."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forged_fx.checked import visible
from forged_fx.configuration import written
from forged_fx.cost import Cost
from forged_fx.cost import cost as site_costs
from forged_fx.evaluate import checks, fingerprint
from forged_fx.sites import is_activation, module_of
from forged_fx.stats import SiteStats
from forged_fx.thresholds import PREFIX, not_forged, numbers
from forged_fx.transform import Forging, check_example, in_force
from forged_fx.weights import changed, weights_have_changed
from forged_fx.within import forged_within


@dataclass(frozen=True)
class Row:
    """One site. kind: of call. What follows share_zeroed's rule is None where it was left out, or does not apply.

    threshold: below which values are changed; limit: to which they are limited; width: the mean over the channels of
    how near to its mean a value becomes it. share_zeroed, share_limited: of the inputs seen in calibration, in [0, 1],
    those that lie below the threshold, or above the limit. net_zeroed: share_zeroed without those that were 0 already
    (a ReLU's), which is what forging zeroed; this is what `sparsity` and `sweep` call so, and what is printed. ratio:
    threshold or limit as a share of c_max, or of the statistic that was chosen; None where it is not one number.
    forging: a key of `forged_fx.kinds.KINDS`. cost is None also where it was not asked for.
    """

    site: str
    kind: str
    shape: tuple[int, ...] | None
    c_max: float
    threshold: float | None
    share_zeroed: float | None
    left_out: str | None
    reached: str | None
    cost: Cost | None = None
    forging: str | None = None
    limit: float | None = None
    width: float | None = None
    share_limited: float | None = None
    net_zeroed: float | None = None
    ratio: float | None = None

    @property
    def off(self) -> bool:
        """Whether it has a threshold, and a ratio at which that changes nothing. (Of inputs that were all 0 no ratio
        can be told.)"""
        at_work = self.threshold or self.width or self.limit is not None
        return self.left_out is None and not at_work and self.c_max > 0

    def ends(self) -> str:
        """Threshold, limit and width in force, for a table."""
        ends = {"": self.threshold, "<=": self.limit, "+-": self.width}
        return " ".join(f"{sign}{end:.4g}" for sign, end in ends.items() if end is not None)


class Description(list[Row]):
    """The rows; printed, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []  # how each forged model was captured
        self.elsewhere: list[str] = []  # weights that no site has
        self.forging: str | None = None  # which it is, see `fingerprint.of_forging`; None: not said

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("site", "kind", "input seen", "c_max", "threshold", "zeroed, placed")]
        table += [_cells(row) for row in self]
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[5]]) for line in table]
        lines.insert(1, "-" * max(map(len, lines)))
        forged = [row for row in self if row.left_out is None]
        if forged:
            lines.append("zeroed: of the inputs seen in calibration, beyond those that were 0 already")
        if self.elsewhere:
            lines.append(f"in no product that calibration saw by name: {_some(self.elsewhere)}")
        lines.append(f"{self.summary()}, as {'; '.join(self.notes)}")
        return visible("\n".join(line.rstrip() for line in lines))

    def summary(self) -> str:
        """At which ratio how many sites are forged; a site whose ratio leaves it as it was is not counted."""
        off = [row for row in self if row.off]
        forged = [row for row in self if row.left_out is None and not row.off]
        ratios = {row.ratio for row in forged if row.c_max}
        at = ""
        if ratios and None not in ratios:  # (of some kinds a ratio is not one number)
            at = f"at ratio {written(*ratios)}: " if len(ratios) == 1 else "at ratios of their own: "
        how = "left at ratio 0" if all(row.ratio == 0 for row in off) else "switched off"
        return f"{at}{len(forged)} of {len(self)} sites forged" + (f", {len(off)} {how}" if off else "")


def describe(model: torch.nn.Module, *, cost: bool = False, example: tuple[tuple, dict] | None = None) -> Description:
    """Every site of a forged model, in the order in which they run.

    A row holds the site's name (with the path to its forged model, where several are within `model`), its kind of call,
    the shape of its input as seen in calibration (-1, printed `*`: it varied), c_max, the threshold in force now, the
    share of its inputs that this threshold would have zeroed in calibration, beyond those that were 0 already, or why
    it was left out. Below stands the ratio, where all sites have the same. With `cost`, also what the threshold costs
    in compiled code (see `forged_fx.cost`), for `example` = (args, kwargs) or the first calibration batch, where it is
    at hand.

    Raises ValueError for a model that is not forged, or whose layers were replaced since, or where `cost` has no
    example.
    """
    checks.module(model, "model", "describe takes")
    check_example(example)
    found = forged_within(model)
    if not found:
        raise ValueError(not_forged(model, "describe"))
    rows = Description()
    rows.forging = fingerprint.of_forging(model)
    for prefix, owner, record in found:
        parameters = in_force(owner, record)
        input = example or record.stats.example
        if cost and input is None:
            raise ValueError("describe(cost=True) looks at a forward pass: pass example=(args, kwargs)")
        costs = site_costs(owner, *input) if cost else {}
        for name, site in record.stats.sites.items():
            if name in record.reached:
                row = _forged(name, site, record, parameters[name], costs.get(name))
            elif name in record.left_out:
                row = Row(name, site.kind, site.shape, site.c_max, None, None, record.left_out[name], None)
            else:
                continue
            rows.append(replace(row, site=prefix + name))
        whole = "one graph" if record.not_whole is None else f"module by module ({record.not_whole})"
        if record.fused is not None:
            why = f" ({record.not_fused})" if record.not_fused else ""
            whole += f"; {record.fused or 'no'} thresholds fused with what produces their inputs{why}"
        if moved := changed(owner, record.stats.weights):
            whole += f"; {weights_have_changed(moved)}"
        if unseen := [prefix + name for name in _unseen(owner, record)]:
            whole += f"; left as they are, as calibration saw no call of them: {_some(unseen)}"
        rows.elsewhere += (prefix + name for name in _in_no_product(owner, record))
        rows.notes.append(whole + ("" if record.audited else f"; not audited: {record.not_audited}"))
    return rows


def _unseen(owner: torch.nn.Module, record: Forging) -> list[str]:
    """Sites that only the audit saw, and layers without a site, of their own or where their weight is used."""
    sites = record.stats.sites
    names = {module_of(site) for site in sites} | {(site.weight or "").rpartition(".")[0] for site in sites.values()}
    modules = dict(owner.named_modules(remove_duplicate=False))
    seen = {id(modules[name]) for name in names if name in modules}  # (one that is registered twice has two names)
    layers = [
        name
        for name, m in owner.named_modules()
        # (one that holds a threshold was seen, and has been wrapped since, by torch.compile or checkpoint_wrapper)
        if isinstance(m, _LAYERS) and id(m) not in seen and not any(held.startswith(PREFIX) for held in m._buffers)
    ]
    return [*dict.fromkeys([*(site for site in record.left_out if site not in sites), *layers])]


def _in_no_product(owner: torch.nn.Module, record: Forging) -> list[str]:
    """Parameters that could be a product's weights, and modules whose weights are packed out of sight, that no site
    names: they are added, say, or meet data where calibration does not see it."""
    sites = [(name, site.weight) for name, site in record.stats.sites.items() if not is_activation(name)]
    parameters = dict(owner.named_parameters(remove_duplicate=False))
    known = {id(parameters[weight]) for _, weight in sites if weight in parameters}
    # Modules with a weight that is made from parameters: most likely from their own, or from those of modules in them.
    makers = [module_of(name) for name, weight in sites if weight is None]
    found = []
    for path, module in owner.named_modules():
        made_of = any(not maker or f"{path}.".startswith(f"{maker}.") for maker in makers)
        if made_of:
            continue
        theirs = ("weight", "bias") if isinstance(module, _LAYERS + _LOOKED_UP) else ()
        weight = getattr(module, "weight", None)
        # of torch.ao's quantized layers it is a method
        if callable(weight) and not isinstance(weight, torch.nn.Module):
            found.append(path or "(root)")
        for name, value in module.named_parameters(recurse=False):
            if name not in theirs and id(value) not in known and sum(size > 1 for size in value.shape) > 1:
                found.append(f"{path}.{name}".removeprefix("."))
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


_LOOKED_UP = (torch.nn.Embedding, torch.nn.EmbeddingBag, torch.nn.LayerNorm, torch.nn.RMSNorm)
_CONVOLUTIONS = [getattr(torch.nn, f"Conv{kind}{n}d") for kind in ("", "Transpose") for n in (1, 2, 3)]
_LAYERS = (torch.nn.Linear, torch.nn.Bilinear, *_CONVOLUTIONS)


def _forged(name: str, site: SiteStats, record: Forging, buffers: tuple[Tensor, ...], cost: Cost | None) -> Row:
    kind, values = record.choice[name], numbers(buffers)
    named = {name: float(np.mean(value)) for name, value in zip(kind.buffers, values, strict=True)}
    named = {name: value for name, value in named.items() if value < np.inf}  # a limit at infinity is none
    return Row(
        name,
        site.kind,
        site.shape,
        site.c_max,
        threshold=named.get("threshold"),
        share_zeroed=kind.share_zeroed(site, values),
        left_out=None,
        reached=record.reached[name],
        cost=cost,
        forging=kind.name,
        limit=named.get("limit"),
        width=named.get("width"),
        share_limited=kind.share_limited(site, values),
        net_zeroed=kind.net_zeroed(site, values),
        ratio=_ratio(site, values, record.choice.statistic),
    )


def _ratio(site: SiteStats, values: tuple[Any, ...], statistic: str) -> float | None:
    """The ratio that gives this value, up to float32's rounding: a power of two, or a number of few digits."""
    if len(values) > 1 or not np.isfinite(values[0]):
        return None
    size = site.statistic(statistic)
    if not size:
        return None
    ratio = values[0] / size
    power = 2.0 ** round(math.log2(ratio)) if 0 < ratio < math.inf else 0.0
    return power if math.isclose(ratio, power, rel_tol=1e-6) else float(f"{ratio:.6g}")


def _cells(row: Row) -> tuple[str, ...]:
    shape = "varies" if row.shape is None else "x".join("*" if size < 0 else str(size) for size in row.shape)
    start = (row.site, row.kind, shape, f"{row.c_max:.4g}")
    if row.left_out is not None:
        return (*start, "-", f"left out: {row.left_out}")
    placed = row.reached if row.cost is None else str(row.cost)
    zeroed = f"{row.net_zeroed:6.1%}" if row.net_zeroed is not None else "     ?"
    limited = f", {row.share_limited:.1%} limited" if row.share_limited is not None else ""
    forging = "" if row.forging == "hard" else f"{row.forging}, "
    return (*start, row.ends() or "off", f"{zeroed}{limited}  {forging}{placed}")
