"""The script that MLflow runs to load a registered version ("models from code", without pickle).

A copy is stored with each version, so the name that it imports must keep working.
"""

from mlflow.models import set_model

from scgpt_batch.registry.pyfunc import ScgptModel

set_model(ScgptModel())
