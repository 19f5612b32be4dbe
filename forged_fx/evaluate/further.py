"""What `attacks="thorough"` adds: other starting points, more of what there was, and no cleverness at all.

`"adaptive"` and `"relentless"` go on in rounds, each with new random starts and more steps than the one before,
along every gradient that there is, until the figure stops moving.
"""

import re
from typing import Any

import torch
from torch import Tensor

QUERIES = 20_000
DRAWS = 100
LONGER = 5  # times as many steps or queries
QUIET = 2  # rounds in a row that break nothing, and the figure has stopped moving
ROUNDS = 12  # at most


def restart(tools: Any, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
    """APGD on both of its losses (one, with two classes), from the other side's adversarial examples or at random."""
    apgd = tools.apgd
    apgd.seed = tools.get_seed()
    torch.manual_seed(apgd.seed)
    apgd.init_hyperparam(x)
    adv, todo = x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
    for apgd.loss in ("ce", "dlr"):
        if not todo.any() or (apgd.loss == "dlr" and tools.model(x[:1]).shape[1] < 3):
            break
        _, right, _, found = apgd.attack_single_run(x[todo], y[todo], x_init=None if start is None else start[todo])
        fooled = todo.nonzero().flatten()[~right.bool()]
        adv[fooled] = found[~right.bool()]
        todo[fooled] = False
    return adv


def queries(tools: Any) -> None:
    """AutoAttack's Square has 5,000."""
    tools.square.n_queries = QUERIES


def noise(tools: Any, x: Tensor, y: Tensor) -> Tensor:
    """The best of `DRAWS` random points: uniform in the ball (Linf), or on its surface (L2, L1)."""
    generator = torch.Generator().manual_seed(tools.get_seed())
    adv, right = x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(DRAWS):
        delta = _draw(x.shape, tools.norm, generator).to(x.device)
        point = (x + tools.epsilon * delta).clamp(0, 1)
        fooled = right & (tools.model(point).max(1)[1] != y)
        adv[fooled] = point[fooled]
        right &= ~fooled
    return adv


def _draw(shape: tuple[int, ...], norm: str, generator: torch.Generator) -> Tensor:
    if norm == "Linf":
        return torch.rand(shape, generator=generator) * 2 - 1
    normal = torch.randn(shape, generator=generator)
    if norm == "L1":  # a Laplace draw, scaled, is uniform on that surface
        normal = normal.sign() * torch.empty(shape).exponential_(generator=generator)
    length = normal.flatten(1).norm(int(norm[1:]), dim=1)
    return normal / length.view(-1, *[1] * (len(shape) - 1))


def lengthen(tools: Any) -> None:
    """`LONGER` times as many steps or queries for every attack in the toolbox."""
    more_steps(tools, LONGER)
    tools.fab.n_iter *= LONGER
    tools.square.n_queries *= LONGER


def more_steps(tools: Any, times: int) -> None:
    """So many times as many steps of APGD."""
    for apgd in (tools.apgd, tools.apgd_targeted):
        set_steps(apgd, times * apgd.n_iter)


def in_round(attack: str, number: int) -> str:
    """What an attack is called in a round; the first is 1."""
    return f"{attack}, round {number}"


def round_of(attack: str) -> int:
    """The round that an attack is called after; 0: none."""
    found = re.search(r", round (\d+)$", attack)
    return int(found[1]) if found else 0


def set_steps(apgd: Any, steps: int) -> None:
    """As APGD's constructor does, with its checkpoints in shares of the steps."""
    apgd.n_iter = apgd.n_iter_orig = steps
    apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
