"""The gene vocabulary, which maps gene names to token ids; read from `vocab.json` of a checkpoint."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from scgpt_batch.errors import CheckpointError

PAD, CLS, EOC = SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    CheckpointError
        The file is not a JSON object, or a key is repeated.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError, OSError) as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}") from exc
    except _RepeatedKey as exc:
        raise CheckpointError(f"{path} has the key {exc.args[0]!r} twice; remove one of them") from exc
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must be a JSON object")
    return found


class _RepeatedKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKey(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


class Vocabulary:
    """Token names and ids.

    Attributes
    ----------
    tokens
        All token names, including special tokens, ordered by id.
    pad_id, cls_id
        Ids of `<pad>` and `<cls>`.
    """

    def __init__(self, ids: Mapping[str, int], *, source: str = "the vocabulary") -> None:
        """Create a vocabulary from a mapping of names to ids.

        Missing special tokens are appended in the order `<pad>`, `<cls>`, `<eoc>`, as in upstream's `embed_data`.

        Parameters
        ----------
        ids
            Id of each token name: 0 to n - 1, each once.
        source
            Where the mapping comes from, for messages.

        Raises
        ------
        CheckpointError
            The ids are not 0 to n - 1, each once.
        """
        for name, token_id in ids.items():
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise CheckpointError(f"{source}: the id of {name!r} is {token_id!r}, not a whole number")
        by_id = sorted(ids.items(), key=lambda item: item[1])
        for position, (name, token_id) in enumerate(by_id):
            if token_id != position:
                raise CheckpointError(
                    f"{source}: ids must be 0 to {len(ids) - 1}, each once; {name!r} has id {token_id} instead of "
                    f"{position}"
                )
        names = [name for name, _ in by_id]
        self.tokens: tuple[str, ...] = (*names, *(t for t in SPECIAL_TOKENS if t not in ids))
        self._ids = {name: i for i, name in enumerate(self.tokens)}
        self.pad_id = self._ids[PAD]
        self.cls_id = self._ids[CLS]
        self._cached_ids = lru_cache(maxsize=4)(self._look_up)  # all rows of a file have the same genes

    @classmethod
    def from_file(cls, path: Path) -> "Vocabulary":
        """Return the vocabulary of a `vocab.json`, a JSON object of token names and ids."""
        ids = read_json_object(path)
        if not ids:
            raise CheckpointError(f"{path} must be a JSON object of token names and ids, but is empty")
        return cls(ids, source=str(path))

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def ids(self, names: Iterable[str]) -> np.ndarray:
        """Return the id of each gene name, -1 if it is unknown: int64, shape (len(names),).

        Matching is exact and case-sensitive, as in upstream. Special tokens are not genes.

        >>> Vocabulary({"CD3D": 0, "LYZ": 1}).ids(["LYZ", "lyz", "<cls>"])
        array([ 1, -1, -1])
        """
        return self._cached_ids(tuple(names)).copy()

    def _look_up(self, names: tuple[str, ...]) -> np.ndarray:
        found = np.fromiter(map(self._ids.get, names, repeat(-1)), dtype=np.int64)
        found[np.isin(found, [self._ids[token] for token in SPECIAL_TOKENS])] = -1
        return found
