"""What attacks that tell another attack's numbers in their own way share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from shoal.base.errors import UsageError
from shoal.parts import find
from shoal.rounds.attack import Aim, Attack, Knowledge, View
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack

Setting = int | float | str | bool | None
Settings = tuple[tuple[str, Setting], ...]
"""Settings of another attack in hashable form."""


class Wrapped:
    """Made of another attack in this folder.

    A subclass is a frozen dataclass with a field `settings`, the other attack's own (a mapping, or
    pairs), and one that names it, whose name is `names`.
    """

    names: ClassVar[str]
    settings: Settings

    def __post_init__(self) -> None:
        given: Any = self.settings
        pairs = given.items() if isinstance(given, Mapping) else given
        object.__setattr__(self, "settings", tuple(sorted((str(k), v) for k, v in pairs)))
        if getattr(self.attack, "per_receiver", False) or isinstance(self.attack, type(self)):
            raise UsageError(
                f"{self._part}: {self.names}={self._name!r} does not make one vector for everybody "
                "by itself (use it alone, or name another attack)"
            )

    @property
    def attack(self) -> Attack:
        """The attack that this one is made of."""
        try:
            return find("attack", self._name)(**dict(self.settings))
        except TypeError as error:
            raise UsageError(
                f"{self._part}: {self._name} with {dict(self.settings)}: {error} (mend the "
                "settings)"
            ) from None

    def aim(self) -> Aim:
        """What counts as success: what the other attack wants."""
        aim = getattr(self.attack, "aim", None)
        if aim is None:
            raise UsageError(
                f"{self._part}: {self.names}={self._name!r} has no target class to succeed with "
                "(use class_flip or backdoor)"
            )
        return aim()

    @property
    def _part(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def _name(self) -> str:
        return getattr(self, self.names)

    def _made(self, view: View, key: Key) -> Stack:
        """What the other attack has each Byzantine peer send, [..., byzantine, dim]."""
        attack = self.attack
        if attack.knowledge is Knowledge.ALL:
            return attack(view, key)
        # As engines do it: each attacker sees itself alone.
        own = view.own.unsqueeze(-2)
        return attack(View(own, own, view.round), keyed.grid(key, own.shape[-3])).squeeze(-2)
