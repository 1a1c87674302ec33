"""The tables: what others wrote is read, ours grow by columns, vectors have one length, files are kept few."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Timer

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from scgpt_batch.errors import ConfigError, ScgptBatchError
from scgpt_batch.settings import MaintainSettings
from scgpt_batch.spark import tables
from scgpt_batch.spark.local_frame import local_frame
from scgpt_batch.spark.maintain import maintain, prune
from tests.helpers import append

GENES = [f"GENE{i:03}" for i in range(200)]
FIRST_VERSION = """
    adata_id STRING, x_data ARRAY<FLOAT>, x_indices ARRAY<INT>, x_indptr ARRAY<BIGINT>, adata_obs STRING,
    adata_var STRING
"""


@pytest.fixture
def table(tmp_path):
    return f"delta.`{tmp_path}/table`"


def vectors(spark, *, length=4, model="scgpt", version="1", genes=GENES, at="2026-01-01"):
    """One line a gene, as the job writes them."""
    stamps = {"mode": "static", "model_name": model, "model_version": version, "params_hash": "p"}
    stamps |= {"content_hash": "c", "run_id": "r"}
    embedding = f"transform(sequence(1, {length}), i -> cast(rand() AS float)) AS embedding"
    return (
        spark.createDataFrame([(gene,) for gene in genes], "gene STRING")
        .selectExpr("'row' AS adata_id", "cast(null AS string) AS `group`", "gene", embedding, "1 AS n_cells")
        .withColumns({name: F.lit(value) for name, value in stamps.items()})
        .withColumn("embedded_at", F.lit(at).cast("timestamp"))
    )


@pytest.mark.parametrize("escaped", ["false", "true"])
@pytest.mark.parametrize("value", ["plain", "it's", "a\\b\\n", "${env:HOME} ${spark.app.name}", "a\nb", 'ü`"', ""])
def test_literals_do_not_depend_on_settings(spark, value, escaped):
    spark.conf.set("spark.sql.parser.escapedStringLiterals", escaped)
    try:
        assert spark.sql(f"SELECT {tables.literal(value)}").first()[0] == value
    finally:
        spark.conf.unset("spark.sql.parser.escapedStringLiterals")


def test_names_that_spark_would_replace_are_rejected():
    with pytest.raises(ConfigError, match="Spark replaces"):
        tables.table_name("delta.`/data/${env:HOME}`")
    with pytest.raises(ConfigError, match="Spark replaces"):
        tables.identifier("${env:HOME}")


def test_delete_older_accepts_any_column_name(spark, table, tmp_path):
    name = "o'day \\ `quoted`"
    days = F.expr("date_sub(current_date(), cast(id * 100 AS int)) AS day")
    spark.range(1, 3).select(days).toDF(name).write.format("delta").option(
        "delta.columnMapping.mode", "name"
    ).saveAsTable(table)
    assert tables.delete_older(spark, table, name, 150) == 1


def test_views_and_zoneless_times_are_read(spark, table):
    spark.sql(f"CREATE TABLE {table} (adata_id STRING, ingested_at TIMESTAMP_NTZ, day DATE) USING delta")
    spark.sql(f"INSERT INTO {table} VALUES ('a', TIMESTAMP_NTZ '2026-11-01 01:40:00', DATE '2026-11-01')")
    spark.sql(f"CREATE OR REPLACE VIEW of_others AS SELECT adata_id, day AS ingested_at FROM {table}")
    for name in (table, "of_others"):
        rows = tables.read(
            spark, name, tables.ADATA_ROWS, version=tables.version(spark, name) if name == table else None
        )
        assert dict(rows.dtypes)["ingested_at"] == "timestamp" and rows.count() == 1
    assert tables.snapshot(spark, "of_others") is None
    spark.sql("DROP VIEW of_others")


# columns, table properties, values of a last column
OTHERS = {
    "more columns": (f"{FIRST_VERSION}, note STRING", "", ", 'mine'"),
    "wider numbers": (FIRST_VERSION.replace("FLOAT", "DOUBLE").replace("ARRAY<INT>", "ARRAY<BIGINT>"), "", ""),
    "upper case": (FIRST_VERSION.upper(), "", ""),
    "a number as key": (FIRST_VERSION.replace("adata_id STRING", "adata_id BIGINT"), "", ""),
    "column mapping": (FIRST_VERSION, "TBLPROPERTIES ('delta.columnMapping.mode' = 'name')", ""),
    "deletion vectors": (FIRST_VERSION, "TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')", ""),
}


def test_snapshot_of_a_table_made_anew_is_another(spark, table, tmp_path):
    tables.create(spark, table, tables.LEDGER)
    first = tables.snapshot(spark, table)
    assert tables.snapshot(spark, table) == first and first.version == 0
    shutil.rmtree(tmp_path / "table")
    tables.create(spark, table, tables.LEDGER)
    again = tables.snapshot(spark, table)
    assert again.version == 0 and again != first


@pytest.mark.parametrize("kind", OTHERS)
def test_foreign_table_is_read_with_our_columns(spark, table, kind):
    columns, properties, more = OTHERS[kind]
    spark.sql(f"CREATE TABLE {table} ({columns}) USING delta {properties}")
    spark.sql(f"""INSERT INTO {table} SELECT id, array(1.5d, 2d), array(0, 2), array(0L, 2L), null, 'var'
                  {more} FROM range(0, 3, 1, 1)""")
    spark.sql(f"DELETE FROM {table} WHERE adata_id = '1'")
    rows = tables.read(spark, table, tables.ADATA_ROWS)
    names = spark.createDataFrame([], tables.ADATA_ROWS).columns
    assert set(rows.columns) == {*names, *(["note"] if more else [])} and len(set(rows.columns)) == len(rows.columns)
    found = rows.select("adata_id", "x_data", "x_indices", "adata_obs", "sample_id", "x_dtype").orderBy("adata_id")
    assert [tuple(line) for line in found.collect()] == [
        (key, [1.5, 2.0], [0, 2], None, None, None) for key in ("0", "2")
    ]


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ("id STRING, adata_var STRING", "adata_id"),
        ("adata_id STRING, x_data STRING", "x_data has type string, array<float> is needed"),
        ("adata_id STRING, adata_sparsematrix ARRAY<DOUBLE>", "adata_sparsematrix"),
        ("adata_id STRING, adata_obs BINARY", "adata_obs"),
    ],
)
def test_unreadable_input_table_is_rejected(spark, table, columns, wanted):
    spark.sql(f"CREATE TABLE {table} ({columns}) USING delta")
    with pytest.raises(ConfigError, match=wanted):
        tables.read(spark, table, tables.ADATA_ROWS)


def test_older_table_gets_new_columns(spark, table):
    older = tables.GENE_EMBEDDINGS.replace(", n_cells INT", "")
    spark.sql(f"CREATE TABLE {table} ({older}) USING delta")
    append(vectors(spark).drop("n_cells"), table)
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    append(vectors(spark, version="2"), table)
    assert [tuple(row) for row in spark.table(table).groupBy("n_cells").count().orderBy("n_cells").collect()] == [
        (None, len(GENES)),
        (1, len(GENES)),
    ]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [(("params_hash STRING, ", ""), "params_hash string"), (("n_cells INT", "n_cells STRING"), "n_cells int")],
    ids=["lacks a key", "another type"],
)
def test_foreign_output_table_is_rejected_unchanged(spark, table, change, wanted):
    spark.sql(f"CREATE TABLE {table} ({tables.GENE_EMBEDDINGS.replace(*change)}) USING delta")
    before = spark.table(table).schema
    with pytest.raises(ConfigError, match=wanted):
        tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    assert spark.table(table).schema == before


def test_concurrent_runs_can_create_one_table(spark, table):
    def make(_):
        return tables.create(spark, table, tables.LEDGER)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(4)))
    assert spark.table(table).count() == 0


@pytest.mark.parametrize("named", [False, True])
def test_table_being_created_is_waited_for(spark, table, tmp_path, named):
    """Between its folder and its first commit Delta says that the place is taken, or that the table is made."""
    folder, name = _place(spark, table, tmp_path, "committed_late", named=named)
    tables.create(spark, f"delta.`{tmp_path}/other`", tables.LEDGER)
    (folder / "_delta_log").mkdir(parents=True)

    def commit():
        shutil.copy(tmp_path / "other/_delta_log/00000000000000000000.json", folder / "_delta_log")

    late = Timer(2, commit)
    late.start()
    tables.create(spark, name, tables.LEDGER)
    late.join()
    assert spark.table(name).count() == 0


@pytest.mark.parametrize("named", [False, True])
def test_half_created_table_is_reported_and_removable(spark, table, tmp_path, monkeypatch, named):
    monkeypatch.setattr(tables, "CREATE_TRIES", 2)  # nobody is going to commit it
    folder, name = _place(spark, table, tmp_path, "half_made", named=named)
    (folder / "_delta_log").mkdir(parents=True)
    (folder / "_delta_log" / ".00000000000000000000.json.tmp").write_text("{")
    with pytest.raises(ConfigError, match=r"table .*: its folder holds files .* remove the folder"):
        tables.create(spark, name, tables.LEDGER)
    shutil.rmtree(folder)
    tables.create(spark, name, tables.LEDGER)
    assert spark.table(name).count() == 0


def _place(spark, table, tmp_path, name, *, named):
    """The folder of a table, and what it is called: by its path, or by a name in the warehouse."""
    if not named:
        return tmp_path / "table", table
    return Path(spark.conf.get("spark.sql.warehouse.dir").removeprefix("file:")) / name, name


def test_folder_with_other_files_is_rejected(spark, table, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CREATE_TRIES", 2)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"table delta.*: its folder holds files that are not a Delta table"):
        tables.create(spark, table, tables.LEDGER)
    assert [file.name for file in (tmp_path / "table").iterdir()] == ["notes.txt"]


def test_unwritable_folder_is_named_with_possible_causes(spark, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ScgptBatchError, match=r"cannot create the folder of delta.*/file/table.*Read-only file system"):
        tables.create(spark, f"delta.`{tmp_path}/file/table`", tables.LEDGER)


@pytest.mark.parametrize("theirs", [None, "true"])
def test_replace_where_check_is_off_while_writing(spark, table, theirs):
    """Delta would refuse lines that do not meet the condition; what it costs to ask grows with lines times keys."""
    check = "spark.databricks.delta.replaceWhere.constraintCheck.enabled"
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    try:
        if theirs:
            spark.conf.set(check, theirs)
        tables.replace(vectors(spark), table, lambda: "adata_id IN ('another')")
        assert spark.conf.get(check, None) == theirs
        with pytest.raises(Exception, match="cannot be resolved"):
            tables.replace(vectors(spark), table, lambda: "no_such_column = 1")
        assert spark.conf.get(check, None) == theirs
    finally:
        spark.conf.unset(check)
    assert spark.table(table).count() == len(GENES)


def test_threads_restore_the_replace_where_check(spark, table):
    """The second begins while the first writes, and ends after it."""
    check = "spark.databricks.delta.replaceWhere.constraintCheck.enabled"
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    first_ended, others = Event(), []

    def after_the_first() -> str:
        assert first_ended.wait(60)
        return "adata_id = 'another'"

    with ThreadPoolExecutor(1) as pool:

        def while_the_other_begins() -> str:
            others.append(pool.submit(tables.replace, vectors(spark), table, after_the_first))
            time.sleep(0.5)
            return "adata_id = 'one'"

        tables.replace(vectors(spark), table, while_the_other_begins)
        first_ended.set()
        for other in others:
            other.result()
    assert len(others) == 1
    assert spark.conf.get(check, None) is None


def test_vector_length_constraint_and_change_feed(spark, table, tmp_path):
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    append(vectors(spark), table)
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    with pytest.raises(ConfigError, match="has vectors of 4 numbers, but this model's have 5: use another table"):
        tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=5)
    with pytest.raises(Exception, match="size\\(embedding\\) = 4"):
        append(vectors(spark, length=5), table)
    changes = spark.sql(f"SELECT * FROM table_changes_by_path('{tmp_path}/table', 1)")
    assert changes.where("_change_type = 'insert'").count() == len(GENES) == spark.table(table).count()
    # what follows the table outside Spark, such as a search index, reads it with delta-rs
    assert DeltaTable(str(tmp_path / "table")).to_pyarrow_table().num_rows == len(GENES)


def test_older_table_rejects_other_vector_lengths(spark, table):
    tables.create(spark, table, tables.GENE_EMBEDDINGS)
    append(vectors(spark), table)
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    with pytest.raises(ConfigError, match="has vectors of 4 numbers, but this model's have 5: use another table"):
        tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=5)


def test_clustering_by_gene_reads_few_files(spark, table, tmp_path):
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=64)
    tables.create(spark, f"delta.`{tmp_path}/table_runs`", tables.RUNS)
    for version in "123":
        append(vectors(spark, length=64, version=version).repartition(4), table)
    one = spark.table(table).where("gene = 'GENE007'")
    assert len(one.inputFiles()) > 8  # of 12; a gene at the edge is outside some files' range
    spark.conf.set("spark.databricks.delta.optimize.maxFileSize", str(30_000))  # else 200 KB are one file
    try:
        result = maintain(spark, MaintainSettings(table=table, cluster_by="gene"))
    finally:
        spark.conf.unset("spark.databricks.delta.optimize.maxFileSize")
    assert result.tables == [table, f"delta.`{tmp_path}/table_runs`"] and result.files_compacted == 12
    one, every = spark.table(table).where("gene = 'GENE007'"), spark.table(table)
    assert one.count() == 3 and len(every.inputFiles()) >= 5 and len(one.inputFiles()) <= 2
    # the next night touches new files only, and delta-rs still reads the table
    again = maintain(spark, MaintainSettings(table=table, cluster_by="gene"))
    assert again.files_compacted == 0
    assert DeltaTable(str(tmp_path / "table")).to_pyarrow_table().num_rows == 3 * len(GENES)


def test_clustering_by_any_column_name_is_idempotent(spark, tmp_path):
    name, table = 'o\'day \\ `quoted`; "x"', f'delta.`{tmp_path}/o\'dd "x" y\\z $w ;-- é`'
    lines = spark.range(3).select(F.col("id").cast("string").alias(name))
    lines.write.format("delta").option("delta.columnMapping.mode", "name").saveAsTable(table)
    maintain(spark, MaintainSettings(table=table, cluster_by=name))
    newest = tables.version(spark, table)
    tables.cluster(spark, table, name)
    assert tables.version(spark, table) == newest and spark.table(table).count() == 3


def test_clustering_by_missing_column_is_rejected(spark, table):
    tables.create(spark, table, tables.LEDGER)
    with pytest.raises(ConfigError, match="'gene'"):
        maintain(spark, MaintainSettings(table=table, cluster_by="gene"))


@pytest.mark.parametrize(
    ("versions", "kept"),
    [
        ({"2": "2026-01-03", "9": "2026-01-02", "10": "2026-01-01"}, {"9", "10"}),
        ({"2": "2026-01-03", "b": "2026-01-02", "a": "2026-01-01"}, {"2", "b"}),
    ],
    ids=["as numbers", "by time"],
)
def test_prune_keeps_the_newest_versions(spark, table, tmp_path, versions, kept):
    ledger = f"delta.`{tmp_path}/table_ledger`"
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    tables.create(spark, ledger, tables.LEDGER)
    for version, at in versions.items():
        lines = vectors(spark, version=version, at=at, genes=GENES[:3])
        append(lines, table)
        names = [name for name in lines.columns if name in spark.table(ledger).columns]
        append(lines.select(*names).limit(1), ledger)
    append(vectors(spark, model="other", version="1", genes=GENES[:3]), table)
    assert prune(spark, table, ledger, 2) == 1
    for name in (table, ledger):
        left = spark.table(name).where("model_name = 'scgpt'").select("model_version").distinct().collect()
        assert {row[0] for row in left} == kept
    assert spark.table(table).where("model_name = 'other'").count() == 3
    assert prune(spark, table, ledger, 2) == 0


def test_prune_keeps_the_version_of_the_run(spark, table, tmp_path):
    ledger = f"delta.`{tmp_path}/table_ledger`"
    tables.create(spark, table, tables.GENE_EMBEDDINGS, vector_length=4)
    tables.create(spark, ledger, tables.LEDGER)
    for version in ("2", "3", "4"):
        append(vectors(spark, version=version, genes=GENES[:3]), table)
    assert prune(spark, table, ledger, 1, current=("scgpt", "2")) == 1  # the alias was moved back to 2
    assert {row[0] for row in spark.table(table).select("model_version").distinct().collect()} == {"2", "4"}


class WithoutCreateSchema:
    """The session of a principal without the right: Unity Catalog refuses the statement also where it does nothing."""

    def __init__(self, spark):
        self._spark = spark

    def __getattr__(self, name):
        return getattr(self._spark, name)

    def sql(self, statement, *args, **kwargs):
        if statement.startswith("CREATE SCHEMA"):
            raise PermissionError("User does not have CREATE SCHEMA on Catalog 'main'")
        return self._spark.sql(statement, *args, **kwargs)


def test_existing_schema_needs_no_create_permission(spark):
    tables.create(WithoutCreateSchema(spark), "default.without_create_schema", tables.ADATA_ROWS)
    assert tables.exists(spark, "default.without_create_schema")


def test_missing_schema_is_created(spark):
    tables.create(spark, "made_by_create.rows", tables.ADATA_ROWS)
    assert spark.catalog.databaseExists("made_by_create")


def test_missing_table_at_a_path_gets_a_suggestion(spark, table, tmp_path):
    tables.create(spark, table, tables.LEDGER)
    with pytest.raises(
        ConfigError, match=rf"no Delta table delta.`{tmp_path}/tabel`: did you mean {re.escape(table)}\?"
    ):
        tables.read(spark, f"delta.`{tmp_path}/tabel`", tables.LEDGER)
    with pytest.raises(ConfigError, match=rf"no Delta table delta.`{tmp_path}/other`: check its name"):
        tables.read(spark, f"delta.`{tmp_path}/other`", tables.LEDGER)


def test_missing_table_in_a_schema_gets_a_suggestion(spark):
    spark.sql("CREATE TABLE suggested_rows (adata_id STRING) USING delta")
    with pytest.raises(ConfigError, match=r"no Delta table suggestd_rows: did you mean suggested_rows\?"):
        tables.read(spark, "suggestd_rows", tables.LEDGER)
    with pytest.raises(ConfigError, match=r"no Delta table nowhere\.suggested_rows: check its name"):
        tables.read(spark, "nowhere.suggested_rows", tables.LEDGER)


LINES = "name STRING, n INT, ratio DOUBLE, at TIMESTAMP, payload BINARY, parts ARRAY<FLOAT>, seen MAP<STRING, INT>"


def test_local_frame_has_the_values_of_its_lines(spark):
    at = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)
    lines = [
        ["Größe", 3, float("inf"), at, b"\x00\xff", [0.5, -1.0], {"a": 1}],
        [None] * 7,
        ["", -(2**31), 0.1, at, b"", [], {}],
    ]
    schema = StructType.fromDDL(LINES)
    frame = local_frame(spark, lines, schema)
    assert frame.schema == schema
    found = [list(row) for row in frame.withColumn("at", F.unix_micros("at")).collect()]
    micros = [None if line[3] is None else 1774747800123456 for line in lines]
    assert found == [[*line[:3], m, *line[4:]] for line, m in zip(lines, micros, strict=True)]
    assert local_frame(spark, [], schema).collect() == [] and local_frame(spark, [], schema).schema == schema


def test_local_frame_starts_no_python_worker(spark):
    frame = local_frame(spark, [["a", 1], ["b", 2]], StructType.fromDDL("name STRING, n INT"))
    plan = frame._jdf.queryExecution().executedPlan().toString()
    assert plan.startswith("LocalTableScan")


def test_local_frame_rejects_lines_of_another_length_and_values_of_another_type(spark):
    schema = StructType.fromDDL("name STRING, n INT")
    for lines in ([["a", 1], ["b"]], [["a"]], [["a", "one"]], [["a", 2**31]]):
        with pytest.raises((ValueError, pa.ArrowInvalid)):
            local_frame(spark, lines, schema)
