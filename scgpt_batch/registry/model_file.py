"""The file that MLflow runs to load a registered version ("models from code": nothing is pickled).

A copy of it is stored with each version, so it imports one name alone, which must keep working.
"""

from mlflow.models import set_model

from scgpt_batch.registry.pyfunc import ScgptModel

set_model(ScgptModel())
