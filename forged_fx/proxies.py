"""What stands for a value while a forward is traced."""

from typing import Any

import torch
import torch.fx as fx

from forged_fx.graph_calls import AUGMENTED


class Value(fx.Proxy):
    """Stands for what only a run knows. Code that asks for more is no graph, also where torch.fx has an answer (another
    hash, other words than the value's) and where the code catches the error."""

    def __getattr__(self, name: str) -> "Attribute":
        if not isinstance(self, Attribute) and self.node.op == "placeholder":
            self.tracer.fields[self.node.target].add(name)
        return Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:
            self.tracer.asked = f"sets {name!r} of a value"  # of the proxy it would be, and nobody's in a run
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        return self._refuse("looks up, in a set or a dictionary, a value")

    def __len__(self) -> int:
        return self._refuse("asks for the length of a value")

    def __index__(self) -> int:
        return self._refuse("takes a number from a value")

    def __str__(self) -> str:
        self.tracer.asked = "puts into words a value"
        return repr(self)

    def __format__(self, _: str) -> str:  # for a message, in all likelihood: an assertion makes it in every run
        return repr(self)

    def __deepcopy__(self, _: dict) -> fx.Proxy:
        return self._refuse("makes a deep copy of a value")

    def _refuse(self, what: str) -> Any:
        self.tracer.asked = what
        raise TypeError(f"the forward {what} that only a run knows")

    __int__ = __float__ = __complex__ = __round__ = __divmod__ = lambda self, *_: self.__index__()


for _name, _function in AUGMENTED.items():  # (a function that is set on a class is a method)
    setattr(Value, f"__{_name}__", _function)

_OF_PROXIES = ("__dict__", "tracer", "node", "_node", "root", "attr", "value")


class Attribute(fx.proxy.Attribute, Value):
    """Stands for an attribute of such a value: its shape, its dtype."""

    def __repr__(self) -> str:
        self.tracer.asked = "puts into words a value"
        return super().__repr__()

    def __format__(self, _: str) -> str:
        return fx.Proxy.__repr__(self)


class Buffer(Value):
    """Stands for a buffer of the model's. How large it is is the model's own, and no run's."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.value = value

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def size(self, *dim: Any) -> Any:
        return self.value.size(*dim)

    def numel(self) -> int:
        return self.value.numel()

    def dim(self) -> int:
        return self.value.dim()

    def __len__(self) -> int:
        return len(self.value)
