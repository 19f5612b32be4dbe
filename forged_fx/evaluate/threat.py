"""What an attacker may do: move an input within a ball of radius eps, and not out of the box [0, 1]."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# norm -> (length of each row of a (n, d) tensor, length of a (d,) vector of ones)
_NORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], float]]] = {
    "Linf": (lambda delta: delta.abs().amax(1), lambda d: 1.0),
    "L2": (lambda delta: delta.square().sum(1).sqrt(), math.sqrt),
    "L1": (lambda delta: delta.abs().sum(1), float),
}
NORMS = tuple(_NORMS)


@dataclass(frozen=True)
class Threat:
    """A ball of radius `eps` in `norm` ("Linf", "L2" or "L1") around the input, cut by the box [0, 1]."""

    eps: float
    norm: str

    def distance(self, x: Tensor, adv: Tensor) -> Tensor:
        """Distance of each example from its input, (n,) float64; measured in float64 to add no error of its own."""
        return _NORMS[self.norm][0]((adv.double() - x.double()).flatten(1))

    def diameter(self, elements: int) -> float:
        """Of the box [0, 1] with so many dimensions: a ball of that radius around any input holds the box."""
        return _NORMS[self.norm][1](elements)

    def tolerance(self, elements: int) -> float:
        """How far outside the ball an example of so many elements may lie through rounding alone.

        Attacks compute in float32: 1e-5 of the radius for the projection, and per element one spacing of the
        numbers just below 1, 2**-24. At Linf 8/255 that is 3.7e-7, a ten-thousandth of a grey level.
        """
        return 1e-5 * self.eps + 2**-24 * _NORMS[self.norm][1](elements)

    def step(self, x: Tensor, direction: Tensor) -> Tensor:
        """x moved to the edge of its ball, as far as the box reaches: along the direction's signs (Linf), or itself."""
        flat = (direction.sign() if self.norm == "Linf" else direction).flatten(1)
        length = _NORMS[self.norm][0](flat).clamp_min(1e-30)
        return (x + self.eps * (flat / length[:, None]).view_as(x)).clamp(0, 1)

    def steps(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """`step` along the direction, and against it."""
        return self.step(x, direction), self.step(x, -direction)

    def allows(self, x: Tensor, adv: Tensor) -> Tensor:
        """(n,) bool: inside the ball (to `tolerance`) and inside the box (exactly). NaN is inside neither."""
        flat = adv.flatten(1)
        inside = self.distance(x, adv) <= self.eps + self.tolerance(flat.shape[1])
        return inside & (flat >= 0).all(1) & (flat <= 1).all(1)
