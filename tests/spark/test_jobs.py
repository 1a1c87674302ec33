"""The commands on real Spark, Delta and MLflow: files in, tables out."""

import json
import subprocess
import sys
from functools import cache

import anndata as ad
import h5py
import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.sparse as sp
from pyspark.sql import functions as F

from scgpt_batch.cli.main import OK, TOO_MANY_FAILED_ROWS, WRONG_USAGE, main
from scgpt_batch.inference.engine import load_embedder
from scgpt_batch.io.rows import from_row, to_row
from scgpt_batch.parameters import Parameters
from scgpt_batch.spark import tables
from scgpt_batch.spark.worker import ModelRef
from tests.helpers import assert_close, random_adata, small_rows, summary_of, write_rows

BINS_ONLY = ["--need-preprocess", "false", "--data-is-raw", "true"]


@pytest.fixture(scope="module")
def cells(home, pbmc3k):
    """60 real cells of three types in an .h5ad."""
    types = pbmc3k.obs["cell_type"]
    picked = np.concatenate([np.flatnonzero(types == name)[:20] for name in ("B", "NK", "CD14+ Mono")])
    path = home / "cells.h5ad"
    pbmc3k[np.sort(picked)].write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def rows_table(spark, home, cells):
    """The 60 cells as four rows."""
    table = f"delta.`{home}/adata_rows`"
    assert (
        main(["ingest", "--input", str(cells), "--table", table, "--cells-per-row", "16", "--sample-id", "none"]) == OK
    )
    return table


def embeddings(spark, table, key):
    lines = spark.table(table).orderBy("adata_id", key).toArrow().to_pandas()
    return lines, np.stack(lines["embedding"].to_list())


@pytest.fixture(scope="module")
def embedded(home, model, rows_table):
    """A function that embeds the 60 cells in a mode, once: summary and output table."""

    @cache
    def embed(mode):
        words = ["--model-uri", model, "--input-table", rows_table, "--output-table", f"delta.`{home}/{mode}`"]
        return summary_of("embed", *words, "--mode", mode, *BINS_ONLY), f"delta.`{home}/{mode}`"

    return embed


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
def test_tables_match_the_model(spark, embedded, rows_table, golden, mode):
    summary, out = embedded(mode)
    assert (summary["rows_ok"], summary["rows_failed"], summary["cells"]) == (4, 0, 60)

    embedder = load_embedder(golden / "checkpoint_flash")
    parameters = Parameters(mode=mode, need_preprocess=False, data_is_raw=True)
    key = "cell_id" if mode == "cell" else "gene"
    lines, vectors = embeddings(spark, out, key)
    assert len(lines) == summary["embeddings"]
    for row in spark.table(rows_table).toArrow().to_pylist():
        answer = embedder.embed(row, parameters)
        names = np.array(answer.cell_ids if mode == "cell" else answer.genes)
        mine = lines["adata_id"] == row["adata_id"]
        assert lines.loc[mine, key].tolist() == sorted(names)
        assert_close(vectors[mine], answer.embeddings[np.argsort(names)], atol=1e-5)


def test_lines_are_stamped_and_rows_are_in_the_ledger(spark, embedded):
    summary, out = embedded("static")
    stamps = spark.table(out).select("mode", "model_name", "model_version", "run_id").distinct().collect()
    assert [tuple(s) for s in stamps] == [("static", "scgpt", summary["model_version"], summary["run_id"])]
    ledger = spark.table(tables.beside(out, "_ledger")).toArrow().to_pandas()
    assert (ledger["status"] == "ok").all() and len(ledger) == 4
    assert (ledger["genes_in"] == 32738).all() and (ledger["genes_matched"] == 2200).all()
    assert ledger["coverage"].between(0.5, 1).all()
    (a_run,) = spark.table(tables.beside(out, "_runs")).collect()
    assert (a_run["run_id"], a_run["status"], a_run["rows_ok"]) == (summary["run_id"], "finished", 4)
    assert mlflow.get_run(summary["run_id"]).data.metrics["rows_ok"] == 4


def test_rerun_skips_embedded_rows(spark, run, home, model, golden):
    table, out = f"delta.`{home}/again`", f"delta.`{home}/again_out`"
    write_rows(spark, small_rows(3, golden), table)
    embed = ["embed", "--model-uri", model, "--input-table", table, "--output-table", out, *BINS_ONLY]
    assert run(*embed)[1]["rows_ok"] == 3
    again = run(*embed, "--plan")[1]
    assert (again["rows_in"], again["rows"], again["rows_skipped"]) == (3, 0, 3)

    other = next(small_rows(1, golden, seed=9))
    spark.sql(f"DELETE FROM {table} WHERE adata_id = 'good-000'")
    write_rows(spark, [other], table)
    assert run(*embed)[1]["rows_ok"] == 1
    assert spark.table(out).groupBy("adata_id", "gene").count().where("count > 1").count() == 0
    assert spark.table(out).where("adata_id = 'good-000'").select("content_hash").distinct().count() == 1

    assert run(*embed, "--plan", "--seed", "1")[1]["rows"] == 0  # static mode draws no random numbers
    assert run(*embed, "--plan", "--mode", "contextual")[1]["rows"] == 3


def damaged_rows(golden):
    """One row of each kind of damage, with the words that its error must hold."""
    good = next(small_rows(1, golden))
    obs, var = json.loads(good["adata_obs"]), json.loads(good["adata_var"])
    x, indices, indptr = good["x_data"], good["x_indices"], good["x_indptr"]

    def at(values, position, value):
        changed = values.copy()
        changed[position] = value
        return changed

    return {
        "index out of bounds": ({"x_indices": at(indices, 0, 40)}, "x_indices"),
        "negative index": ({"x_indices": at(indices, 0, -1)}, "x_indices"),
        "falling indptr": ({"x_indptr": at(indptr, 1, indptr[2] + 1)}, "x_indptr"),
        "short indptr": ({"x_indptr": indptr[:-1]}, "x_indptr"),
        "lengths differ": ({"x_data": x[:-1]}, "x_data"),
        "NaN": ({"x_data": at(x, 1, np.nan)}, "NaN"),
        "infinity": ({"x_data": at(x, 1, np.inf)}, "infinity"),
        "negative value": ({"x_data": at(x, 1, -1)}, "negative"),
        "short var": ({"adata_var": json.dumps(var | {k: var[k][:-1] for k in ("index", "data")})}, "n_vars"),
        "long obs": ({"adata_obs": json.dumps({"columns": [], "index": ["a"] * 4, "data": [[]] * 4})}, "adata_obs"),
        "no JSON": ({"adata_var": "{oops"}, "adata_var"),
        "null obs": ({"adata_obs": None}, "adata_obs"),
        "empty": ({"x_data": x[:0], "x_indices": indices[:0], "x_indptr": indptr[:1], "n_obs": 0,
                   "adata_obs": json.dumps(obs | {"index": [], "data": []})}, "empty"),
        "no matrix": ({"x_data": None, "x_indices": None, "x_indptr": None}, "no matrix"),
        "unknown genes": ({"adata_var": json.dumps(var | {"index": [f"x{i}" for i in range(40)]})}, "vocabulary"),
    }  # fmt: skip


def test_bad_row_fails_alone_with_its_reason(spark, run, home, model, golden):
    bad = damaged_rows(golden)
    template, good = next(small_rows(1, golden)), list(small_rows(40, golden))
    table, out = f"delta.`{home}/with_bad`", f"delta.`{home}/with_bad_out`"
    damaged = [template | damage | {"adata_id": f"bad: {name}"} for name, (damage, _) in bad.items()]
    write_rows(spark, [*good, *damaged], table)
    embed = ["embed", "--model-uri", model, "--input-table", table, "--output-table", out, "--mode", "cell", *BINS_ONLY]
    code, summary, _ = run(*embed)
    assert (code, summary["rows_ok"], summary["rows_failed"]) == (TOO_MANY_FAILED_ROWS, len(good), len(bad))

    lines, vectors = embeddings(spark, out, "cell_id")
    parameters = Parameters(mode="cell", need_preprocess=False, data_is_raw=True)
    wanted = list(load_embedder(golden / "checkpoint_flash").embed_rows(good, parameters))
    names = [(row["adata_id"], cell) for row, answer in zip(good, wanted, strict=True) for cell in answer.cell_ids]
    assert list(zip(lines["adata_id"], lines["cell_id"], strict=True)) == names
    assert_close(vectors, np.concatenate([answer.cell_embeddings for answer in wanted]), atol=1e-5)

    failed = spark.table(tables.beside(out, "_ledger")).where("status = 'failed'").collect()
    assert len(failed) == len(bad)
    for line in failed:
        message = bad[line["adata_id"].removeprefix("bad: ")][1]
        assert message in line["error_message"] and line["error_class"] in ("PayloadError", "LowCoverage")

    code, summary, _ = run(*embed, "--max-failed-fraction", "1", "--retry-failed")
    assert (code, summary["rows_failed"]) == (OK, len(bad))


def test_key_with_several_contents_is_rejected(spark, run, home, model, golden):
    table = f"delta.`{home}/ambiguous`"
    rows = [row | {"adata_id": "one"} for row in small_rows(2, golden)]
    write_rows(spark, rows, table)
    code, _, err = run("embed", "--model-uri", model, "--input-table", table, "--output-table", f"delta.`{home}/amb`")
    assert code == WRONG_USAGE and "'one'" in err


@pytest.fixture(scope="module")
def foreign(spark, home, model, golden):
    """The words of a run over two rows without hash and shape, one of them twice, and its JSON line."""
    rows = [{"adata_id": r["adata_id"], "adata_obs": r["adata_obs"], "adata_var": r["adata_var"],
             "adata_sparsematrix": from_row(r).X.toarray().tolist(),
             "note": "mine"} for r in small_rows(2, golden)]  # fmt: skip
    ddl = "adata_id string, adata_obs string, adata_var string, adata_sparsematrix array<array<double>>, note string"
    table, out = f"delta.`{home}/foreign`", f"delta.`{home}/foreign_out`"
    spark.createDataFrame([*rows, rows[0]], ddl).write.format("delta").save(f"{home}/foreign")
    words = ["embed", "--model-uri", model, "--input-table", table, "--output-table", out, *BINS_ONLY]
    return words, summary_of(*words), spark.table(out)


def test_equal_copies_of_a_row_are_embedded_once(foreign):
    _, summary, lines = foreign
    assert (summary["rows_in"], summary["rows_ok"], summary["rows_skipped"]) == (3, 2, 1)
    assert lines.groupBy("adata_id", "gene").count().where("count > 1").count() == 0


def test_input_without_hashes_and_shapes_is_read(run, foreign):
    words, _, lines = foreign
    assert run(*words, "--plan")[1]["rows"] == 0
    assert lines.select(F.length("content_hash")).distinct().first()[0] == 32


def test_equal_static_vectors_compress_well(spark, run, home, model, golden):
    table, out = f"delta.`{home}/many`", home / "many_out"
    write_rows(spark, small_rows(60, golden), table)
    run("embed", "--model-uri", model, "--input-table", table, "--output-table", f"delta.`{out}`", *BINS_ONLY)
    lines = spark.table(f"delta.`{out}`").cache()
    lines.repartition(4).write.option("compression", "snappy").parquet(str(home / "unsorted"))
    size = {folder: size_of_vectors(folder) for folder in (out, home / "unsorted")}
    lines.unpersist()
    assert size[out] * 3 < size[home / "unsorted"]  # the more rows, the more: 200 rows take a tenth


def size_of_vectors(folder):
    """Bytes on disk of a table's vectors; its column of keys, all different, takes as much sorted as unsorted."""
    size = 0
    for path in folder.glob("*.parquet"):
        rows = pq.read_metadata(path)
        for group in (rows.row_group(i) for i in range(rows.num_row_groups)):
            columns = (group.column(i) for i in range(group.num_columns))
            size += sum(each.total_compressed_size for each in columns if each.path_in_schema.startswith("embedding."))
    return size


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--model-uri", "models:/scgpt/999"], "models:/scgpt/999"),
        (["--model-uri", "models:/nobody@champion"], "nobody"),
        (["--model-uri", "/nowhere"], "/nowhere"),
        (["--input-table", "delta.`/nowhere/rows`"], "/nowhere/rows"),
        (["--output-table", "not a table"], "not a table"),
    ],
)
def test_wrong_usage_is_one_line(spark, run, home, model, rows_table, argv, wanted):
    base = {"--model-uri": model, "--input-table": rows_table, "--output-table": f"delta.`{home}/never`"}
    base |= dict(zip(argv[::2], argv[1::2], strict=True))
    code, summary, err = run("embed", *(word for pair in base.items() for word in pair))
    last = err.strip().splitlines()[-1]
    assert (code, summary) == (WRONG_USAGE, {})
    assert last.startswith("scgpt-batch: ") and wanted in last and "Traceback" not in err
    assert not (home / "never").exists()


def test_output_table_of_another_kind_is_rejected(spark, run, home, model, rows_table):
    code, _, err = run("embed", "--model-uri", model, "--input-table", rows_table, "--output-table", rows_table)
    assert code == WRONG_USAGE and "lacks" in err


def test_named_table_is_found_by_the_next_session(spark, run, model, rows_table):
    warehouse = spark.conf.get("spark.sql.warehouse.dir").removeprefix("file:")
    # what another process leaves: a folder, and nothing in the catalog of this one
    spark.sql(f"CREATE TABLE delta.`{warehouse}/lab.db/genes` ({tables.GENE_EMBEDDINGS}) USING delta")
    assert tables.exists(spark, "lab.genes") and not tables.exists(spark, "lab.cells")
    embed = ["embed", "--model-uri", model, "--input-table", rows_table, "--output-table", "lab.genes", *BINS_ONLY]
    assert run(*embed)[1]["rows_ok"] == 4
    assert spark.table("lab.genes").count() == spark.table(f"delta.`{warehouse}/lab.db/genes`").count() == 8800


def test_mlflow_spark_udf_answers_every_row(spark, model, rows_table):
    udf = mlflow.pyfunc.spark_udf(spark, model, params={"need_preprocess": False, "on_error": "record"})
    columns = ["x_data", "x_indices", "x_indptr", "adata_obs", "adata_var"]
    rows = spark.table(rows_table).select(*columns)
    rows = rows.union(rows.limit(1).withColumn("adata_obs", F.lit("{"))).repartition(4)
    answers = rows.select(udf(F.struct(*columns)).alias("a")).select("a.*").collect()
    *answered, failed = sorted(answers, key=lambda row: -len(row["genes"]))
    # in a batch that also holds errors, MLflow's spark_udf turns a null string into the text "None"
    assert len(answered) == 4 and all(row["error"] in (None, "None") and len(row["genes"]) == 2200 for row in answered)
    assert all(row["coverage"] > 0.5 and "X looks like counts" in row["warnings"][0] for row in answered)
    assert failed["error"].startswith("PayloadError") and failed["coverage"] is None and failed["warnings"] == []
    assert len(answered[0]["gene_embeddings"]) == 2200 and len(answered[0]["gene_embeddings"][0]) == 64


def write_10x(adata, folder):
    """The three files of a 10x folder and the one .h5, as Cell Ranger 3 writes them."""
    folder.mkdir()
    scipy.io.mmwrite(folder / "matrix.mtx", adata.X.T.astype(int))
    features = pd.DataFrame({"id": adata.var["gene_ids"], "name": adata.var["gene_symbol"], "type": "Gene Expression"})
    features.to_csv(folder / "features.tsv", sep="\t", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(folder / "barcodes.tsv", header=False, index=False)
    for name in ("matrix.mtx", "features.tsv", "barcodes.tsv"):
        subprocess.run(["gzip", str(folder / name)], check=True)
    with h5py.File(folder.with_suffix(".h5"), "w") as file:
        x = sp.csr_matrix(adata.X)
        group = file.create_group("matrix")
        for name, value in {"data": x.data.astype(int), "indices": x.indices, "indptr": x.indptr}.items():
            group.create_dataset(name, data=value)
        group.create_dataset("shape", data=x.shape[::-1])
        group.create_dataset("barcodes", data=adata.obs_names.to_numpy("S"))
        columns = group.create_group("features")
        for name, column in {"id": features["id"], "name": features["name"], "feature_type": features["type"]}.items():
            columns.create_dataset(name, data=column.to_numpy("S"))
        columns.create_dataset("genome", data=np.full(len(features), b"hg19"))


def test_every_kind_of_file_gives_the_same_rows(spark, run, tmp_path, cells):
    adata = ad.read_h5ad(cells)
    write_10x(adata, tmp_path / "tenx")
    columns = adata.copy()
    columns.X = adata.X.tocsc()
    columns.write_h5ad(tmp_path / "csc.h5ad")
    (tmp_path / "tenx").rename(tmp_path / "folder")
    symbols = adata.var["gene_symbol"].tolist()  # names that repeat stay as they are
    names = {"csc": adata.var_names.tolist(), "tenx": symbols, "folder": symbols}
    table, paths = f"delta.`{tmp_path}/rows`", [tmp_path / name for name in ("csc.h5ad", "tenx.h5", "folder")]
    code, summary, _ = run("ingest", "--input", *paths, "--table", table, "--cells-per-row", "25")
    assert (code, summary["rows"], summary["cells"], summary["rows_skipped"]) == (OK, 9, 180, 0)
    lines = spark.table(table).orderBy(F.col("n_obs").desc(), "adata_id").toArrow().to_pylist()
    for kind, genes in names.items():
        rows = [from_row(line) for line in lines if line["adata_id"].startswith(f"{kind}:")]
        assert [name for row in rows for name in row.obs_names] == adata.obs_names.tolist()
        assert all(row.var_names.tolist() == genes for row in rows)
        assert abs(sp.vstack([row.X for row in rows]) - sp.csr_matrix(adata.X)).max() == 0


def test_only_changed_files_are_ingested_again(spark, run, tmp_path, cells):
    path, table = tmp_path / "mine.h5ad", f"delta.`{tmp_path}/rows`"
    adata = ad.read_h5ad(cells)
    adata.write_h5ad(path)
    ingest = ["ingest", "--input", path, "--table", table, "--cells-per-row", "20"]

    def counts():
        summary = run(*ingest)[1]
        return [summary[key] for key in ("rows", "cells", "rows_skipped", "rows_removed", "files_unchanged")]

    assert counts() == [3, 60, 0, 0, 0]
    assert counts() == [0, 60, 3, 0, 1]
    adata.X[0, 0] = 7
    adata.write_h5ad(path)
    assert counts() == [1, 60, 2, 0, 0]
    spark.sql(f"DELETE FROM {table} WHERE adata_id = 'mine:20-40'")  # not unchanged any more: the table lacks a row
    assert counts() == [1, 60, 2, 0, 0]
    assert spark.table(table).count() == 3


def test_rows_that_a_file_no_longer_has_are_removed(spark, run, tmp_path, cells):
    """Fewer cells, other lengths of rows, groups: the table always holds each cell of the file once."""
    path, table = tmp_path / "mine.h5ad", f"delta.`{tmp_path}/rows`"
    adata = ad.read_h5ad(cells)
    random_adata(5, 3).write_h5ad(tmp_path / "other.h5ad")
    assert run("ingest", "--input", tmp_path / "other.h5ad", "--table", table)[0] == OK
    steps = [(60, ["--cells-per-row", "20"], 0), (25, ["--cells-per-row", "20"], 2), (25, [], 2),
             (25, ["--split-by", "cell_type"], 1)]  # fmt: skip
    for n, options, removed in steps:
        adata[:n].write_h5ad(path)
        assert run("ingest", "--input", path, "--table", table, *options)[1]["rows_removed"] == removed
        rows = spark.table(table).where("adata_id LIKE 'mine:%'").toArrow().to_pylist()
        names = [name for row in rows for name in from_row(row).obs_names]
        assert sorted(names) == sorted(adata.obs_names[:n])
    assert spark.table(table).where("adata_id LIKE 'other:%'").count() == 1


def test_files_with_the_same_name_keep_their_rows(spark, run, tmp_path, cells):
    table = f"delta.`{tmp_path}/rows`"
    paths = [tmp_path / folder / "sample.h5ad" for folder in ("one", "two")]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        ad.read_h5ad(cells)[i:].copy().write_h5ad(path)
        assert run("ingest", "--input", path, "--table", table)[0] == OK
    assert run("ingest", "--input", *paths, "--table", table)[1]["files_unchanged"] == 2
    ids = [row[0] for row in spark.table(table).select("adata_id").orderBy("adata_id").collect()]
    assert ids == ["sample:0-60", "two/sample:0-59"]


def test_failing_file_does_not_affect_others(spark, run, tmp_path, cells):
    table = f"delta.`{tmp_path}/rows`"
    good, corrupt, cut = (tmp_path / f"{name}.h5ad" for name in ("good", "corrupt", "cut"))
    ad.read_h5ad(cells).write_h5ad(good)
    random_adata(30, 200).write_h5ad(corrupt, compression="gzip")
    assert run("ingest", "--input", corrupt, "--table", table, "--cells-per-row", "10")[0] == OK
    with h5py.File(corrupt) as file:
        at = file["X/data"].id.get_chunk_info(0).byte_offset
    with corrupt.open("r+b") as file:
        file.seek(at)
        file.write(bytes(64))
    cut.write_bytes(good.read_bytes()[:4000])
    argv = ["ingest", "--input", good, corrupt, cut, "--table", table]
    code, summary, _ = run(*argv)
    assert (code, summary["rows"], summary["files"], summary["files_failed"]) == (TOO_MANY_FAILED_ROWS, 1, 3, 2)
    assert spark.table(table).where("adata_id LIKE 'corrupt:%'").count() == 3  # as they were
    assert run(*argv, "--max-failed-fraction", "0.7")[0] == OK
    lines = spark.table(summary["files_table"]).where("status = 'failed'").orderBy("at", "path").collect()
    assert [line["error_class"] for line in lines] == ["FileError"] * 4
    assert lines[0]["error_message"].startswith(f"{corrupt}: cannot be read: OSError")
    assert lines[1]["error_message"].startswith(f"{cut}: cannot be opened as HDF5")


def test_genes_do_not_depend_on_cells_per_row(spark, run, tmp_path, model, golden, cells):
    """By default a file is one sample: its rows share the choice of variable genes."""
    rows, out = f"delta.`{tmp_path}/rows`", f"delta.`{tmp_path}/out`"
    assert run("ingest", "--input", cells, "--table", rows, "--cells-per-row", "20")[1]["rows"] == 3
    chosen = {"data_is_raw": True, "log1p": True, "filter_gene_by_counts": 40, "subset_hvg": 200}
    flags = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    summary = run("embed", "--model-uri", model, "--input-table", rows, "--output-table", out, *flags)[1]
    assert summary["rows_ok"] == 3
    whole = load_embedder(golden / "checkpoint_flash").embed(to_row(ad.read_h5ad(cells)), Parameters(**chosen))
    for row in spark.table(out).groupBy("adata_id").agg(F.collect_set("gene").alias("genes")).collect():
        assert set(row["genes"]) <= set(whole.genes)
    assert {row[0] for row in spark.table(out).select("gene").distinct().collect()} == set(whole.genes)


def test_split_by_column_and_gene_symbols(spark, run, tmp_path, cells):
    adata = ad.read_h5ad(cells)
    adata.var_names = adata.var["gene_ids"].astype(str)
    adata.write_h5ad(tmp_path / "ids.h5ad")
    table = f"delta.`{tmp_path}/rows`"
    _, summary, _ = run("ingest", "--input", tmp_path / "ids.h5ad", "--table", table, "--split-by", "cell_type",
                     "--gene-symbols", "gene_symbol")  # fmt: skip
    assert summary["rows"] == 3
    for row in spark.table(table).toArrow().to_pylist():
        found = from_row(row)
        assert found.obs["cell_type"].nunique() == 1 and "CD3D" in found.var_names


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--input", "/nowhere.h5ad"], "/nowhere.h5ad"),
        (["--input", __file__], "test_jobs.py"),
        (["--split-by", "donor"], "donor"),
        (["--gene-symbols", "symbols"], "symbols"),
        (["--cells-per-row", "0"], "cells_per_row"),
    ],
)
def test_ingest_errors_name_file_or_column(spark, run, tmp_path, cells, argv, wanted):
    base = {"--input": str(cells), "--table": f"delta.`{tmp_path}/rows`"} | dict([argv])
    code, _, err = run("ingest", *(word for pair in base.items() for word in pair))
    assert code == WRONG_USAGE and wanted in err.strip().splitlines()[-1]
    assert not (tmp_path / "rows").exists()


def test_flags_override_environment_and_file(spark, run, tmp_path, cells, monkeypatch):
    config = tmp_path / "c.yml"
    config.write_text(f"ingest:\n  input: ['{cells}']\n  table: delta.`{tmp_path}/file`\n  cells_per_row: 30\n")
    monkeypatch.setenv("SCGPT_BATCH_TABLE", f"delta.`{tmp_path}/environment`")
    monkeypatch.setenv("SCGPT_BATCH_CELLS_PER_ROW", "20")
    summary = run("ingest", "--config", config, "--cells-per-row", "10")[1]
    assert summary["rows"] == 6 and "environment" in summary["table"]


def test_workers_with_a_loaded_model_search_no_jars(spark, golden):
    """Under spark-submit the jars of `spark.jars.packages` lie on the workers' path: each is read before each task."""
    checkpoint = golden / "checkpoint_flash"
    model = ModelRef(str(checkpoint), load_embedder(checkpoint).digest, "", "", "")

    def jars(batches):
        sys.path.insert(1, "/jars/delta.jar")
        sys.path_importer_cache["/jars/delta.jar"] = None
        model.load()
        for batch in batches:
            found = [path for path in (*sys.path, *sys.path_importer_cache) if path.endswith(".jar")]
            yield pa.RecordBatch.from_pydict({"jars": [len(found)] * batch.num_rows})

    assert {row["jars"] for row in spark.range(2).mapInArrow(jars, "jars LONG").collect()} == {0}


def test_local_session_has_no_jars_on_python_path(spark):
    def jars(batches):
        for _ in batches:
            yield pa.RecordBatch.from_pydict({"jars": [sum(path.endswith(".jar") for path in sys.path)]})

    assert spark.range(1).mapInArrow(jars, "jars LONG").first()["jars"] == 0
    assert not [path for path in sys.path if path.endswith(".jar")]
