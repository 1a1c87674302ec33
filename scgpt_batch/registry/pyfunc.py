"""The MLflow model, which converts a DataFrame of rows into a DataFrame of results.

The embeddings are computed by `inference.engine`, which keeps the loaded weights for the whole process.
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
    """scGPT embeddings for rows of serialized AnnData, with the schema of `signature()`.

    The output has one row for each input row, in the same order.
    """

    embedder: Embedder
    # MLflow's own switch; without it, each load warns about missing type hints (see `predict`)
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Open the checkpoint, once per process. `model_config` has its digest and the `input_roots`."""
        config = context.model_config or {}
        self.embedder = load_embedder(
            context.artifacts["checkpoint"], digest=config.get("checkpoint_digest"), roots=config.get("input_roots", ())
        )

    # No type hints: with them, MLflow's server accepts only `inputs`, not dataframe_split or dataframe_records.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return the embeddings of each row, or of the whole vocabulary if there is no DataFrame.

        Parameters
        ----------
        context
            Not used; MLflow passes it.
        model_input
            DataFrame of rows, or None.
        params
            Parameters of all rows; a column of the same name overrides them for its row.

        Raises
        ------
        RowError
            With `on_error` "raise": the first row that failed, named by its position.
        ConfigError
            A parameter is invalid, no column of the DataFrame is an input of the model, or a column name is misspelt.
        """
        request = RequestParameters(params)
        if model_input is None:
            parameters = request.of_row({})
            result = self.embedder.whole_vocabulary(parameters)
            return answers_frame([answer_columns(result, parameters, self.embedder.config.embsize)])
        if not isinstance(model_input, pd.DataFrame):
            raise ConfigError(f"model_input must be a DataFrame of rows, or None, not {type(model_input).__name__}")
        check_columns(model_input.columns)
        rows = model_input.to_dict("records")
        return answers_frame([self._embed(i, row, request) for i, row in enumerate(rows)])

    def _embed(self, position: int, row: Mapping[str, Any], request: RequestParameters) -> dict[str, Any]:
        try:
            parameters = request.of_row(row)
            result = self.embedder.embed(row, parameters)
        except ConfigError as exc:
            parameters, error = request.error_of_row(exc, position)
            result = RowResult(error=error)
        if result.error is not None and parameters.on_error == "raise":
            raise type(result.error)(f"row {position}: {result.error}")
        return answer_columns(result, parameters, self.embedder.config.embsize)
