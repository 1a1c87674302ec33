"""The MLflow model: a thin shell that turns a DataFrame of rows into a DataFrame of results.

The work is done by `inference.engine`, which keeps loaded weights for the whole process.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from mlflow.pyfunc import PythonModel

from scgpt_batch.errors import ConfigError
from scgpt_batch.inference.engine import Embedder, RowResult, load_embedder
from scgpt_batch.parameters import RequestParameters
from scgpt_batch.registry.signature import answer_columns, answers_frame, check_columns


class ScgptModel(PythonModel):
    """scGPT embeddings for rows of serialized AnnData.

    Input columns, parameters and output columns are those of `signature()`; each row is answered, in order.
    """

    embedder: Embedder
    # MLflow's switch for classes like ours: without it, each load advises type hints (see `predict`)
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Load the checkpoint, once per process; `model_config` carries its digest and the roots for files."""
        config = context.model_config or {}
        self.embedder = load_embedder(
            context.artifacts["checkpoint"], digest=config.get("checkpoint_digest"), roots=config.get("input_roots", ())
        )

    # No type hints: with them MLflow's server takes the `inputs` key alone, not dataframe_split or _records.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Answer each row of a DataFrame; without one (None), the whole vocabulary.

        Raises
        ------
        RowError, ConfigError
            With `on_error` "raise": the first bad row, named by its position. In any case: no column of the DataFrame
            is an input of the model, or a column's name looks like a misspelt one.
        """
        request = RequestParameters(params)
        if model_input is None:
            parameters = request.of_row({})
            answer = self.embedder.whole_vocabulary(parameters)
            return answers_frame([answer_columns(answer, parameters, self.embedder.config.embsize)])
        if not isinstance(model_input, pd.DataFrame):
            raise ConfigError(f"predict takes a DataFrame of rows, or None, not {type(model_input).__name__}")
        check_columns(model_input.columns)
        rows = model_input.to_dict("records")
        return answers_frame([self._answer(i, row, request) for i, row in enumerate(rows)])

    def _answer(self, position: int, row: Mapping[str, Any], request: RequestParameters) -> dict[str, Any]:
        try:
            parameters = request.of_row(row)
            answer = self.embedder.embed(row, parameters)
        except ConfigError as exc:
            parameters, error = request.error_of_row(exc, position)
            answer = RowResult(error=error)
        if answer.error is not None and parameters.on_error == "raise":
            raise type(answer.error)(f"row {position}: {answer.error}")
        return answer_columns(answer, parameters, self.embedder.config.embsize)
