"""What Databricks Connect and serverless compute change, played by stand-ins for the session and its errors."""

import databricks
import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

from scgpt_batch.errors import ConfigError
from scgpt_batch.spark import persistence, session, tables

PERSIST = "[NOT_SUPPORTED_WITH_SERVERLESS] PERSIST TABLE is not supported on serverless compute. SQLSTATE: 0A000"
CONF = "[CONFIG_NOT_AVAILABLE] Configuration spark.sql.catalogImplementation is not available. SQLSTATE: 42K0I"
STANDIN = """
class DatabricksSession:
    class builder:
        @staticmethod
        def getOrCreate():
            {body}
"""


class Serverless:
    """A session and a DataFrame of serverless compute: no persist, no settings."""

    conf = property(lambda self: self)

    def persist(self, level):
        raise AnalysisException(PERSIST)

    def range(self, end):
        return self

    def get(self, name, default=None):
        raise AnalysisException(CONF)


@pytest.fixture
def databricks_connect(monkeypatch, tmp_path):
    """Install a stand-in for databricks-connect whose builder runs some code."""
    for name in ("PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION", "SPARK_REMOTE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(SparkSession, "getActiveSession", lambda: None)

    def install(body):
        (tmp_path / "connect").mkdir()
        (tmp_path / "connect" / "__init__.py").write_text(STANDIN.format(body=body))
        monkeypatch.setattr(databricks, "__path__", [*databricks.__path__, str(tmp_path)])

    yield install
    session.sys.modules.pop("databricks.connect", None)


def test_databricks_connect_gives_its_session(databricks_connect):
    databricks_connect("return 'a session in the workspace'")
    assert session.get_spark() == "a session in the workspace"


def test_databricks_connect_without_a_cluster_says_what_to_set(databricks_connect):
    databricks_connect("raise Exception('Cluster id or serverless are required but were not specified.')")
    with pytest.raises(ConfigError, match=r"Cluster id or serverless are required.*set DATABRICKS_CLUSTER_ID"):
        session.get_spark()


def test_frames_are_computed_again_where_persist_is_missing(caplog):
    frame = Serverless()
    with caplog.at_level("INFO"), persistence.persisted(frame) as kept:
        assert kept is frame
    assert "computed more than once" in caplog.text


def test_other_errors_of_persist_are_raised():
    class Broken:
        def persist(self, level):
            raise AnalysisException("[TABLE_OR_VIEW_NOT_FOUND] no such table")

    with pytest.raises(AnalysisException, match="TABLE_OR_VIEW_NOT_FOUND"), persistence.persisted(Broken()):
        pass


def test_embed_on_serverless_names_the_cluster_it_needs(monkeypatch):
    monkeypatch.setattr(persistence, "is_remote", lambda: True)
    with pytest.raises(ConfigError, match=r"needs a classic dedicated cluster.*PERSIST TABLE.*SINGLE_USER"):
        persistence.require_persist(Serverless())


class WithoutTables(Serverless):
    """Serverless compute with a catalog that has no tables."""

    catalog = property(lambda self: self)

    def tableExists(self, name):
        return False

    def sql(self, statement):
        raise AnalysisException("[TABLE_OR_VIEW_NOT_FOUND] no such table")


def test_hidden_static_settings_mean_a_persistent_catalog():
    assert tables.exists(WithoutTables(), "main.lab.cells") is False


def test_vacuum_below_a_week_on_serverless_is_rejected():
    with pytest.raises(ConfigError, match=r"needs a classic dedicated cluster.*--vacuum-hours 168"):
        tables.vacuum(Serverless(), "main.lab.cells", 0, unsafe=True)
