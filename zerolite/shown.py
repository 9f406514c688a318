"""`optimizer.state`: what the optimizer holds, in dicts that say that nobody reads what is put into them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node


class Shown(dict[Any, Any]):
    """States by parameter, or one parameter's by name. Only what is there already can be put in, as loops do that move states
    to their device. Parameters without states have {}."""

    @staticmethod
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "optimizer.state: it shows what the optimizer holds, and writing to it would change nothing. Load states with "
            "optimizer.load_state_dict(...), to begin anew one with 'state': {}; fp32 moments can be changed in place."
        )

    __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = refuse

    def __setitem__(self, key: Any, value: Any) -> None:
        known = self.get(key)
        if isinstance(known, dict) and isinstance(value, dict) and known.keys() == value.keys():
            for name, item in value.items():
                known[name] = item
        elif not (known is value or (isinstance(known, Tensor) and isinstance(value, Tensor) and torch.equal(known, value))):
            self.refuse()

    def __missing__(self, _: Any) -> dict[Any, Any]:
        return Shown()

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())  # which torch.load takes


register_pytree_node(
    Shown, lambda shown: ([*shown.values()], [*shown]), lambda values, keys: dict(zip(keys, values, strict=True))
)
