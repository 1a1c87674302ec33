"""What a command returns: the values of its JSON line, its exit code and a few lines for people."""

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

OK, FAILED, WRONG_USAGE, TOO_MANY_FAILED_ROWS, ALERTS = 0, 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class CommandResult(ABC):
    """Base of the commands' results. The fields of a subclass are the keys of its JSON line, in this order."""

    exit_code: int = OK

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the JSON line."""
        values = asdict(self)
        del values["exit_code"]
        return values

    def to_json(self) -> str:
        """Return the JSON line."""
        return json.dumps(self.to_dict())

    @abstractmethod
    def lines(self) -> list[str]:
        """Return a short summary for people, line by line."""


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: `1 row`, `2,700 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
