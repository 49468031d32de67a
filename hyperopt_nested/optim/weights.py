"""Whether others have changed tensors since the last step, which then does not explain what they are."""

from __future__ import annotations

from collections.abc import Mapping, Set
from operator import attrgetter

import torch
from torch import Tensor

_VERSION = attrgetter("_version")


class Weights:
    """Notes of what tensors are after a step: where each is, and how often it was written to.

    Changes through `.data` do not count as writing, and so are not seen unless they put other memory in the tensor's place.

    Args:
        params: the tensors, by name.
        before: notes that were made of some of them.
    """

    def __init__(self, params: Mapping[str, Tensor], before: Weights | None = None) -> None:
        self._params = params
        self._kinds = [(param.dtype, param.device) for param in params.values()]
        self._addresses, self._versions = [0] * len(params), list[int | None]([None] * len(params))
        places = {id(param): i for i, param in enumerate(before._params.values())} if before else {}
        for i, param in enumerate(params.values()):
            if before and (old := places.get(id(param))) is not None:
                self._kinds[i], self._addresses[i], self._versions[i] = before._kinds[old], before._addresses[old], before._versions[old]

    def note(self, names: Set[str]) -> None:
        """Note what these tensors are now."""
        if not self._params or torch.compiler.is_compiling():
            return
        addresses, versions = self._now()
        if names >= self._params.keys():
            self._addresses, self._versions = addresses, versions
        else:
            for i, name in enumerate(self._params):
                if name in names:
                    self._addresses[i], self._versions[i] = addresses[i], versions[i]

    def changed(self, names: Set[str]) -> list[str]:
        """Which of these tensors have been changed since they were noted, and not only moved, or converted to another dtype."""
        if not self._params or torch.compiler.is_compiling():
            return []
        addresses, versions = self._now()
        if versions == self._versions and addresses == self._addresses:
            return []
        names_changed = []
        for i, (name, param) in enumerate(self._params.items()):
            if name in names:
                kind, self._kinds[i] = self._kinds[i], (param.dtype, param.device)
                moved = addresses[i] != self._addresses[i] and kind == self._kinds[i]
                if self._versions[i] is not None and (versions[i] != self._versions[i] or moved):
                    names_changed.append(name)
        return names_changed

    def _now(self) -> tuple[list[int], list[int | None]]:
        try:
            addresses = [*map(Tensor.data_ptr, self._params.values())]
        except RuntimeError:  # there are tensors without memory of their own
            addresses = [0] * len(self._params)
        return addresses, [*map(_VERSION, self._params.values())]
