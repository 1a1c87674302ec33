"""Warm child processes that prepare rows for which native code runs on untrusted data.

scikit-misc's LOESS fit (`hvg_flavor` seurat_v3) and HDF5 can crash on crafted input. In a child process only that row
fails; in the endpoint's own process every request in flight would be lost.
"""

from collections.abc import Callable, Sequence
from functools import partial
from queue import LifoQueue
from typing import Any

from scgpt_batch.child_process import ChildProcess
from scgpt_batch.errors import Timeout, WorkerCrash
from scgpt_batch.inference.row_reader import PreparedRow, RowReader
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.tokens import ScgptTokenizer


class IsolatedReader(RowReader):
    """A RowReader that prepares such rows in child processes; thread-safe."""

    def __init__(self, reader: RowReader, *, seconds: float, processes: int) -> None:
        """Prepare rows as `reader` does; a child process without a result after `seconds` is killed."""
        super().__init__(reader.tokenizer, reader.roots)
        self._start = partial(_reader, reader.vocabulary.tokens, reader.tokenizer.pad_value, reader.roots)
        self._seconds = seconds
        # last in, first out: a running process is reused before another one is started
        self._places: LifoQueue[ChildProcess | None] = LifoQueue()
        for _ in range(processes):
            self._places.put(None)

    def prepare(self, row: Any, parameters: Parameters, *args: Any, **kwargs: Any) -> PreparedRow:
        """Prepare a row, in a child process if it needs one.

        Raises
        ------
        RowError
            As `RowReader.prepare`; also WorkerCrash or Timeout of the child process.
        """
        if not runs_native_code(parameters):
            return super().prepare(row, parameters, *args, **kwargs)
        process = self._places.get()
        try:
            process = process or ChildProcess(self._start)
            return process.run((row, parameters, args, kwargs), self._seconds)
        except (WorkerCrash, Timeout):
            process = None
            raise
        finally:
            self._places.put(process)


def runs_native_code(parameters: Parameters) -> bool:
    """Return whether preparing a row with these parameters runs native code that crafted data can crash."""
    fits = parameters.need_preprocess and parameters.subset_hvg > 0 and parameters.hvg_flavor.startswith("seurat_v3")
    return fits or bool(parameters.input_data_path)


def _reader(tokens: Sequence[str], pad_value: float, roots: Sequence[str]) -> Callable[[Any], PreparedRow]:
    vocabulary = Vocabulary({token: i for i, token in enumerate(tokens)})
    reader = RowReader(ScgptTokenizer(vocabulary, pad_value), roots)

    def prepare(task: tuple[Any, Parameters, tuple[Any, ...], dict[str, Any]]) -> PreparedRow:
        row, parameters, args, kwargs = task
        return reader.prepare(row, parameters, *args, **kwargs)

    return prepare
