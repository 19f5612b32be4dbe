"""What test_properties.py draws: tensors with everything that makes a tensor awkward, and models of random layers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from forged_fx.audit import same

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SEEDS = st.integers(0, 2**31 - 1)

# ---- tensors

AWKWARD = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    torch.inf,
    -torch.inf,
    torch.nan,
    5e-324,
    1e-45,
    -1e-45,
    6e-8,
    1e-38,
    3e38,
    -6e4,
    1e300,
)
LAYOUTS = ("contiguous", "transposed", "gaps", "expanded", "offset", "channels_last", "backwards")


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern, of any magnitude; a part is awkward."""
    chance = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(-40, 40, shape, generator=chance) * torch.rand(shape, generator=chance).round()
    x = torch.randn(shape, generator=chance, dtype=torch.float64) * torch.pow(2.0, magnitude.double())
    odd = torch.tensor(AWKWARD, dtype=torch.float64)[torch.randint(len(AWKWARD), shape, generator=chance)]
    return torch.where(torch.rand(shape, generator=chance) < 0.3, odd, x).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, or (expanded) some of them, in another layout."""
    match layout:
        case "transposed" if x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        case "gaps" if x.dim():
            return torch.stack([x, x], -1).flatten(-2)[..., ::2]
        case "expanded" if x.dim() and x.shape[0]:
            return x[:1].expand_as(x)
        case "offset":
            return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
        case "channels_last" if x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        case "backwards" if x.dim() > 2:
            return x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    return x


@dataclass(frozen=True)
class Drawn:
    """x, a gradient of its shape, and scalars to compare it with, as a float32 or float64 tensor each."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layouts: tuple[str, str]
    seed: int
    scalars: tuple[float, ...]
    wide: bool

    @property
    def x(self) -> Tensor:
        return laid_out(values(self.shape, self.dtype, self.seed), self.layouts[0])

    @property
    def grad(self) -> Tensor:
        return laid_out(values(self.shape, self.dtype, self.seed + 1), self.layouts[1])

    def parameters(self, count: int, channel: int | None = None) -> list[Tensor]:
        """Scalars; a part of them values of x or their neighbours, where a comparison decides."""
        dtype = torch.float64 if self.wide else torch.float32
        near = values(self.shape, self.dtype, self.seed).flatten()[:count].to(dtype)
        found = []
        for i, scalar in enumerate(self.scalars[:count]):
            value = torch.tensor(scalar, dtype=dtype)
            if self.seed % 3 and i < len(near):
                ends = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
                value = (near[i], torch.nextafter(near[i], ends[0]), torch.nextafter(near[i], ends[1]))[
                    self.seed % 4 % 3
                ]
                value = value.abs() if self.seed % 5 else value
            found.append(value if channel is None else value + torch.arange(self.shape[channel]).to(dtype) * 0.25)
        return found


def tensors(most: int = 6, dtypes: tuple[torch.dtype, ...] = DTYPES) -> st.SearchStrategy[Drawn]:
    shape = st.lists(st.integers(0, most), max_size=4).map(tuple)
    scalar = st.sampled_from([*AWKWARD, 0.5, 2.0**-6]) | st.floats(0, 8, width=32)
    layout = st.sampled_from(LAYOUTS)
    return st.builds(
        Drawn,
        st.sampled_from(dtypes),
        shape,
        st.tuples(layout, layout),
        SEEDS,
        st.tuples(scalar, scalar),
        st.booleans(),
    )


# ---- models: values are (n, WIDTH), kept in a list; each step reads the last or an earlier one, and adds one

WIDTH = 6


class Block(nn.Module):
    """A module with two layers and a residual of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Own(nn.Module):
    """A module whose own code makes the calls, on weights as they are, derived, packed and fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3), nn.Parameter(torch.randn(WIDTH))
        self.packed = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 3)
        self.register_buffer("fixed", torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.packed).chunk(2, dim=1)
        y = torch.addmm(self.bias, a.tanh(), self.weight * 0.5) + b @ self.weight.t()
        return y @ self.fixed + torch.einsum("ni,oi->no", x, self.weight)


class Image(nn.Module):
    """Convolutions, with a split and a concatenation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv1d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x.view(-1, 2, 3))
        y = torch.cat([y[:, 2:], y[:, :2].relu()], 1).unsqueeze(-1)
        return self.point(self.norm(y)).flatten(1)


class Branches(nn.Module):
    """Control flow that depends on the shape, and on nothing that a batch could change."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.many(x) if x.shape[0] > 1000 else self.few(x)


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, ::2] = 0.25
    return y.mul_(1.5).add_(x).relu_()


MODULES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "branch": lambda: nn.Linear(WIDTH, WIDTH),  # of an earlier value, which another layer may read too
    "block": Block,
    "own": Own,
    "image": Image,
    "branches": Branches,
    "norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.5),
}
CALLS = {
    "relu": F.relu,
    "silu": F.silu,
    "in place": _in_place,
    "overwrite": lambda x: x.relu_(),
    "halves": lambda x: torch.cat(x.split(WIDTH // 2, dim=1)[::-1], 1),
    "detour": lambda x: x.t().contiguous().t(),
    "rolled": lambda x: F.pad(torch.roll(x, 2, 1).view(x.shape[0], 2, WIDTH // 2), (0, 0)).flatten(1),
}
JOINS = {
    "add": torch.add,
    "add in place": lambda x, y: x.add_(y),
    "times": torch.mul,
    "halve earlier": lambda x, y: x + y.mul_(0.5),
}
STEPS = (*MODULES, *MODULES, *CALLS, *JOINS, "shared", "shared", "aside")
# What a threshold is fused with, and what may be between it and the layer that it belongs to.
PRODUCERS, BETWEEN = ("relu", "norm", "add"), ("dropout", "rolled", "aside", "add in place")

Step = tuple[str, int]


class Generated(nn.Module):
    """program: (name of a step, which earlier value or module it goes back to)."""

    def __init__(self, program: tuple[Step, ...], seed: int) -> None:
        super().__init__()
        self.program = program
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.parts = nn.ModuleDict(
                {str(i): MODULES[name]() for i, (name, _) in enumerate(program) if name in MODULES}
            )
            self.head = nn.Linear(WIDTH, 3)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        kept = [x * 1.0]
        for i, (name, back) in enumerate(self.program):
            last, earlier = kept[-1], kept[back % len(kept)]
            if name == "aside":  # read here, and needed later, if at all
                kept.insert(-1, last.sin())
                continue
            if name in MODULES:
                value = self.parts[str(i)](earlier) + last if name == "branch" else self.parts[str(i)](last)
            elif name in CALLS:
                value = CALLS[name](last)
            elif name in JOINS:
                value = JOINS[name](last, earlier)
            else:
                used = [k for k in self.parts if int(k) < i]
                value = self.parts[used[back % len(used)]](last) if used else last
            kept.append(value)
        return self.head(kept[-1] / (1 + kept[-1].abs().amax(1, keepdim=True)))


@dataclass(frozen=True)
class Case:
    """A model, two batches for calibration, and an input that it was not calibrated on."""

    program: tuple[Step, ...]
    seed: int
    ratio: float
    training: bool

    @property
    def model(self) -> Generated:
        return Generated(self.program, self.seed).train(self.training)

    @property
    def batches(self) -> list[Tensor]:
        chance = torch.Generator().manual_seed(self.seed)
        return [torch.randn(n, WIDTH, generator=chance) for n in (4, 3)]

    @property
    def x(self) -> Tensor:
        return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(self.seed + 1))


def models(program: st.SearchStrategy[tuple[Step, ...]] | None = None) -> st.SearchStrategy[Case]:
    if program is None:
        program = st.lists(_step(*STEPS), min_size=1, max_size=7).map(tuple)
    ratio = st.sampled_from([2**-6, 2**-3, 0.5, 1.0]) | st.floats(0, 1)
    return st.builds(Case, program, SEEDS, ratio, st.booleans())


def fusible() -> st.SearchStrategy[Case]:
    """Models of layers behind producers, near or not."""
    between = st.lists(_step(*BETWEEN), max_size=3).map(tuple)
    layer = st.builds(lambda first, then, last: (first, *then, last), _step(*PRODUCERS), between, _step("linear"))
    return models(st.lists(layer, min_size=1, max_size=4).map(lambda layers: sum(layers, ())))


def _step(*names: str) -> st.SearchStrategy[Step]:
    return st.tuples(st.sampled_from(names), st.integers(0, 7))


# ---- statistics


def scans() -> st.SearchStrategy[list[tuple[int, int]]]:
    """Batches, as (seed, number of inputs)."""
    return st.lists(st.tuples(SEEDS, st.integers(0, 5)), min_size=1, max_size=5)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a caller could find changed in a model, and in torch."""
    return {
        "tensors": {k: (v.dtype, v.stride(), v.detach().clone()) for k, v in model.state_dict().items()},
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "asked": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [[len(v) for k, v in vars(m).items() if "hooks" in k and v is not None] for m in model.modules()],
        "chance": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "attention": torch.backends.mha.get_fastpath_enabled(),
    }


def same_state(a: Any, b: Any) -> bool:
    """Whether two such states are one, tensors by their bits."""
    if isinstance(a, Tensor):
        return same(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b
