"""How many inputs a forged model really zeroes, site by site, on data: measured, beside what calibration predicted."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from forged_fx import checked, ops
from forged_fx.calibrate import check_batches, model_inputs
from forged_fx.evaluate import checks, fingerprint, scale
from forged_fx.modes import as_found
from forged_fx.progress import track
from forged_fx.randomness import seeded
from forged_fx.rows import Rows, share, text
from forged_fx.sites import is_activation, module_of
from forged_fx.stats import SiteStats
from forged_fx.thresholds import not_forged, numbers
from forged_fx.torch_internals import TorchDispatchMode
from forged_fx.transform import forging_of
from forged_fx.within import sites_within, thresholds_within

STEM = "stem"

# The place of a site in its network, by the end of its module's name; the first row that fits. Names as timm,
# torchvision and Hugging Face give them.
PLACES = [
    (re.compile(pattern), place)
    for place, pattern in {
        "attention: q, k, v": r"(^|[._])(qkv|in_proj|c_attn|[qkv]|to_[qkv]|to_qkv|[qkv]_proj|query|key|value|kv)$",
        "attention: projection": r"(attn|attention|self_attention)\.(proj|c_proj|dense|output\.dense|to_out\.0)$"
        r"|(^|[._])(out_proj|o_proj|to_out\.0)$",
        "MLP, first layer": r"(^|[._])(fc1|fc_1|linear1|lin1|c_fc|up_proj|gate_proj|w1|wi|wi_0|wi_1|pwconv1)$"
        r"|intermediate\.dense$|(mlp|ffn|feed_forward)\.(0|net\.0|layers\.0)$",
        "MLP, second layer": r"(^|[._])(fc2|fc_2|linear2|lin2|down_proj|w2|wo|pwconv2)$"
        r"|(mlp|ffn|feed_forward)\.(2|3|net\.2|layers\.2|c_proj)$|layer\.[0-9]+\.output\.dense$",
        "shortcut": r"(^|[._])(downsample|shortcut|skip|skip_connection|convshortcut|proj_conv)(\.[0-9]+|\.conv)?$",
        "head": r"(^|[._])(fc|head|heads\.head|classifier|classifier\.[0-9]+|head\.fc|lm_head|score)$",
    }.items()
]


@dataclass(frozen=True)
class SiteSparsity:
    """One site, or several together; shares of the elements that entered it, in [0, 1].

    site: its name; where several forged models are within one, the path to its own comes ahead of it.
    before: zero already. after: zero behind the forged function. net: what it zeroed, after - before. predicted: net,
    as the calibration histogram has it; None where |x| alone does not tell. changed: what is not what it was, in
    whatever way: zeroed, shrunk, limited or replaced by a mean.
    """

    site: str
    place: str
    kind: str
    elements: int
    before: float
    after: float
    net: float
    changed: float
    predicted: float | None


class Sparsity(Rows[SiteSparsity]):
    """A row for each site, in the order in which they are listed in the statistics."""

    row = SiteSparsity

    @property
    def overall(self) -> SiteSparsity:
        """All sites together, each element counted once."""
        return _together(self, "overall")

    @property
    def by_place(self) -> list[SiteSparsity]:
        """The sites of each place in the network together, in the order in which the places first come up."""
        places = dict.fromkeys(row.place for row in self)
        return [_together([row for row in self if row.place == place], place) for place in places]

    @property
    def bars(self) -> list[tuple[str, float, float, float | None]]:
        """As `pictures.zeroed_by_site` takes them: site, zero before, zero after, and what was predicted of that."""
        return [
            (row.site or "(root)", row.before, row.after, None if row.predicted is None else row.before + row.predicted)
            for row in self
        ]

    def more(self) -> dict[str, Any]:
        return super().more() | {"overall": vars(self.overall), "by_place": [vars(row) for row in self.by_place]}

    def __str__(self) -> str:
        headings = ["site", "place", "kind", "elements", "zero before", "after", "net", "predicted", "changed"]
        ends = [self.overall, *self.by_place]
        tables = (
            text(headings, map(_cells, self)),
            text(["", *headings[3:]], ([row.site, *_cells(row)[3:]] for row in ends)),
        )
        return "\n\n".join(tables)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A bar for each site: zero before, zeroed by forging, and a mark for what was predicted."""
        from forged_fx import pictures

        pictures.zeroed_by_site(self.bars, "\n(grey: before; blue: predicted)").save(path)


def sparsity(forged: torch.nn.Module, batches: Iterable[Any], *, max_batches: int | None = None) -> Sparsity:
    """Measure which share of each site's inputs a forged model zeroes, net of those that were zero already.

    The model runs as it is, in eval mode and without gradients, and is left as it was. Every element is counted. The
    prediction is that of the histogram which calibration took: on the calibration data the two agree to within one
    percentage point at small ratios, as what is predicted is of each site alone.

    Args:
        forged: what `transform` returned, its thresholds where they are now.
        batches: as for `calibrate`. max_batches: stop after this many.

    Raises:
        TypeError: what was given is no model, or are no batches.
        ValueError: the model is not forged, there was no batch, or an input of a site holds NaN or infinity.

    A warning says so where the inputs are scaled otherwise than those of calibration, as far as their size tells.
    """
    checks.module(forged, "model", "sparsity takes")
    check_batches(batches)
    if max_batches is not None:
        max_batches = checked.whole_number(max_batches, "max_batches", 1)
    if not any(forging_of(module) for module in forged.modules()):
        raise ValueError(not_forged(forged, "sparsity"))
    sites, counts, ran = sites_within(forged), _Count(thresholds_within(forged)), 0
    with as_found(forged), torch.no_grad():
        for batch in track(batches, "counting zeros", max_batches):
            args, kwargs = model_inputs(batch, forged)
            with seeded(ran), counts:  # as in calibration
                forged(*args, **kwargs)
            if sick := counts.sick():
                raise ValueError(
                    f"the input of site {sick!r} holds NaN or infinity in batch {ran} (counted from 0), and shares of "
                    "those mean nothing: measure on data, and with weights, that give finite activations"
                )
            ran += 1
    if not ran:
        raise ValueError("sparsity got no batch: an iterator that was already used up gives none a second time")
    if counts.first is not None:
        of_first = sites[counts.first]
        c_max = of_first.record.stats.sites[of_first.site].c_max
        scale.warn((float(counts.largest), c_max), "sparsity", 3)
    found = Sparsity()
    found.forging = fingerprint.of_forging(forged)
    for name, within in sites.items():
        site, of_site = within.site, within.record.stats.sites
        place = STEM if site == next(iter(of_site)) else place_of(site, of_site[site])
        elements, before, after, changed = (int(number) for number in counts.seen.get(name, (0, 0, 0, 0)))
        shares = [number / max(elements, 1) for number in (before, after, after - before, changed)]
        kind, values = within.record.choice[site], numbers(within.buffers)
        found.append(SiteSparsity(name, place, kind.name, elements, *shares, kind.net_zeroed(of_site[site], values)))
    return found


def place_of(site: str, stats: SiteStats) -> str:
    """Where in the network a site sits: by its module's name, by its weight's, else by its kind of call."""
    if is_activation(site):
        return f"activation: {stats.kind}"
    names = module_of(site), re.sub(r"[._]weight$", "", stats.weight or "")
    found = (place for name in names for pattern, place in PLACES if pattern.search(name))
    return next(found, f"other {stats.kind}")


class _Count(TorchDispatchMode):
    """Counts what enters and leaves each forged function: elements, zeros before and after, values that changed.

    On the device: nothing waits for a number before they are asked for. first: the site that ran first, and largest:
    the largest magnitude that entered it.
    """

    def __init__(self, sites: dict[int, str]) -> None:
        super().__init__()
        self.sites = sites
        self.seen: dict[str, list[Any]] = {}
        self.first: str | None = None
        self.largest: Any = 0.0
        self._not_finite: dict[str, Any] = {}

    def sick(self) -> str | None:
        """The first site that was given NaN or infinity, if any was."""
        return next((site for site, count in self._not_finite.items() if count), None)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in ops.DECOMPOSITIONS:  # a producer and its threshold: their chain, which comes here again
            with self:
                return ops.DECOMPOSITIONS[function](*args, **kwargs)
        y = function(*args, **kwargs)
        if function in ops.THRESHOLD_OPS and (site := self.sites.get(id(args[1]))) is not None:
            x = args[0]
            both = (x == y) | (x.isnan() & y.isnan())
            numbers = [x.numel(), (x == 0).sum(), (y == 0).sum(), (~both).sum()]
            self._not_finite[site] = self._not_finite.get(site, 0) + (~x.isfinite()).sum()
            self.first = self.first or site
            if site == self.first and x.numel():
                self.largest = x.abs().max().clamp_min(self.largest)
            before = self.seen.get(site, [0] * len(numbers))
            self.seen[site] = [a + b for a, b in zip(before, numbers, strict=True)]
        return y


def _together(rows: list[SiteSparsity], name: str) -> SiteSparsity:
    total = sum(row.elements for row in rows)

    def mean(field: str) -> float:
        return sum(row.elements * getattr(row, field) for row in rows) / max(total, 1)

    known = all(row.predicted is not None for row in rows)
    kinds = ", ".join(dict.fromkeys(row.kind for row in rows))
    shares = [mean(key) for key in ("before", "after", "net", "changed")]
    return SiteSparsity(name, name, kinds, total, *shares, mean("predicted") if known else None)


def _cells(row: SiteSparsity) -> list[str]:
    shares = (row.before, row.after, row.net, row.predicted, row.changed)
    return [row.site or "(root)", row.place, row.kind, f"{row.elements:,}", *map(share, shares)]
