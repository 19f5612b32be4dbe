"""What was done to a model, site by site, and what was left out, and why."""

from dataclasses import dataclass

import torch

from forged_fx.checked import visible
from forged_fx.cost import Cost
from forged_fx.cost import cost as site_costs
from forged_fx.thresholds import thresholds_of
from forged_fx.transform import forging_of


@dataclass(frozen=True)
class Row:
    """One site. threshold, share_zeroed (in [0, 1]) and reached are None where it was left out; cost also where it was
    not asked for."""

    site: str
    kind: str
    shape: tuple[int, ...] | None
    c_max: float
    threshold: float | None
    share_zeroed: float | None
    left_out: str | None
    reached: str | None
    cost: Cost | None = None


class Description(list[Row]):
    """The rows; printed, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []  # how each forged model was captured

    def __str__(self) -> str:
        table = [("site", "kind", "input seen", "c_max", "threshold", "zeroed, placed")]
        table += [_cells(row) for row in self]
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[5]]) for line in table]
        lines.insert(1, "-" * max(map(len, lines)))
        forged = sum(row.left_out is None for row in self)
        lines.append(f"{forged} of {len(self)} sites forged, as {'; '.join(self.notes)}")
        return visible("\n".join(line.rstrip() for line in lines))


def describe(model: torch.nn.Module, *, cost: bool = False, example: tuple[tuple, dict] | None = None) -> Description:
    """Every site of a forged model, in the order in which they run.

    A row holds the site's name, its kind, the shape of its input as seen in calibration (-1, printed `*`: it varied),
    c_max, the threshold in force now, the share of its inputs that this threshold would have zeroed in calibration,
    or why it was left out. With `cost`, also what the threshold costs in compiled code (see `forged_fx.cost`), for
    `example` = (args, kwargs) or the first calibration batch, where it is at hand.

    Raises ValueError for a model that is not forged, or where `cost` has no example.
    """
    found = [(module, record) for module in model.modules() if (record := forging_of(module))]
    if not found:
        raise ValueError(f"this {type(model).__name__} is not forged: describe what forged_fx.transform returned")
    rows = Description()
    for owner, record in found:
        thresholds = thresholds_of(owner)
        input = example or record.stats.example
        if cost and input is None:
            raise ValueError("describe(cost=True) looks at a forward pass: pass example=(args, kwargs)")
        costs = site_costs(owner, *input) if cost else {}
        for name, site in record.stats.sites.items():
            t = float(thresholds[name]) if name in record.reached else None
            share = None if t is None else site.share_zeroed(t)
            reached, left_out = record.reached.get(name), record.left_out.get(name)
            rows.append(Row(name, site.kind, site.shape, site.c_max, t, share, left_out, reached, costs.get(name)))
        whole = "one graph" if record.not_whole is None else f"module by module ({record.not_whole})"
        if record.fused is not None:
            why = f" ({record.not_fused})" if record.not_fused else ""
            whole += f"; {record.fused or 'no'} thresholds fused with what produces their inputs{why}"
        rows.notes.append(whole + ("" if record.audited else "; not audited: pass transform an example"))
    return rows


def _cells(row: Row) -> tuple[str, ...]:
    shape = "varies" if row.shape is None else "x".join("*" if size < 0 else str(size) for size in row.shape)
    start = (row.site, row.kind, shape, f"{row.c_max:.4g}")
    if row.threshold is None:
        return (*start, "-", f"left out: {row.left_out}")
    placed = row.reached if row.cost is None else str(row.cost)
    return (*start, f"{row.threshold:.4g}", f"{row.share_zeroed:6.1%}  {placed}")
