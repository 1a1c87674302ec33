"""`ai_query` on local Spark, against MLflow's own server around a registered model."""

import threading
import time

import mlflow
import numpy as np
import pandas as pd
import pytest
import uvicorn
from mlflow.pyfunc import scoring_server
from pyspark.errors import PythonException

from scgpt_batch.cli.main import OK, main
from scgpt_batch.embedding_tables import nearest
from scgpt_batch.errors import ConfigError
from scgpt_batch.inference.results import unpack
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, to_row
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.spark import register_ai_query, tables
from tests.databricks_workspace import Workspace, served
from tests.endpoint_process import EndpointProcess, payload
from tests.helpers import assert_close, random_adata, write_rows
from tests.paths import GOLDEN, REPO

EXAMPLES = REPO / "examples" / "sql"
GENES = Vocabulary.from_file(GOLDEN / "checkpoint_flash" / "vocab.json").tokens[:40]
STRUCT = "struct(x_data, x_indices, x_indptr, adata_obs, adata_var, 'cell' as mode, false as need_preprocess)"


@pytest.fixture(scope="module")
def model(registered):
    """The golden checkpoint, loaded."""
    return mlflow.pyfunc.load_model(registered.uri)


@pytest.fixture(scope="module")
def server(model):
    """MLflow's server on this machine: its URL, and the requests that came (path, Authorization)."""
    app, came = scoring_server.init(model), []

    @app.middleware("http")
    async def note(request, call_next):
        came.append((request.url.path, request.headers.get("authorization")))
        return await call_next(request)

    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", came
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def rows():
    """Five rows: three good ones, one whose genes nobody knows, one whose names are no JSON."""
    good = [to_row(random_adata(3, 40, seed=seed, genes=GENES)) | {"adata_id": f"good-{seed}"} for seed in range(3)]
    strange = to_row(random_adata(3, 40, genes=[f"x{i}" for i in range(40)])) | {"adata_id": "strange"}
    return [*good, strange, good[0] | {"adata_id": "torn", "adata_var": "{oops"}]


@pytest.fixture(scope="module")
def table(spark, rows, server):
    """The rows in a table, and the endpoint registered as `scgpt`."""
    write_rows(spark, rows, "asked_rows")
    register_ai_query(spark, {"scgpt": server[0], "closed": "http://127.0.0.1:9/invocations"})
    return "asked_rows"


def example(spark, name, **parameters):
    return spark.sql((EXAMPLES / f"{name}.sql").read_text(), args=parameters).toPandas()


def predict(model, rows, **parameters):
    answers = model.predict(pd.DataFrame(rows), params={"need_preprocess": False} | parameters)
    return {row["adata_id"]: answer for row, answer in zip(rows, answers.to_dict("records"), strict=True)}


def good(table):
    return f"(select * from {table} where adata_id like 'good%')"


def test_sql_matches_the_model(spark, model, rows, table):
    found = spark.sql(f"select adata_id, ai_query('scgpt', {STRUCT}) as a from {good(table)}").collect()
    wanted = predict(model, rows[:3], mode="cell")
    assert len(found) == 3
    for line in found:
        answer = wanted[line["adata_id"]]
        assert line["a"]["cell_ids"] == list(answer["cell_ids"]) and line["a"]["embedding_dim"] == 64
        assert_close(line["a"]["cell_embeddings"], np.stack(answer["cell_embeddings"]), atol=1e-6)
        assert line["a"]["response"] is None and line["a"]["errorMessage"] is None


def test_named_arguments_and_null_requests(spark, table):
    found = spark.sql(f"""
        select ai_query(request => if(adata_id = 'good-1', null, {STRUCT}), endpoint => 'scgpt').cell_ids as ids
        from {good(table)} order by adata_id
    """).collect()
    assert [line["ids"] is None for line in found] == [False, True, False]


def test_fail_on_error_false_reports_errors_by_row(spark, model, rows, table):
    found = spark.sql(f"select adata_id, ai_query('scgpt', {STRUCT}, failOnError => false) as a from {table}").collect()
    wanted = predict(model, rows[:3], mode="cell")
    for line in found:
        answer = line["a"]
        if line["adata_id"].startswith("good"):
            assert answer["errorMessage"] is None and answer["cell_ids"] is None
            embeddings = answer["response"]["cell_embeddings"]
            assert_close(embeddings, np.stack(wanted[line["adata_id"]]["cell_embeddings"]), atol=1e-6)
        else:
            assert answer["response"] is None and answer["errorMessage"].startswith("HTTP 400")
            assert "Traceback" not in answer["errorMessage"]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (f"ai_query('scgpt', {STRUCT})", "HTTP 400"),
        (f"ai_query('nobody', {STRUCT})", "no endpoint 'nobody'; registered are: 'closed', 'scgpt'"),
        (f"ai_query(adata_id, {STRUCT})", "a string literal"),
        (f"ai_query('closed', {STRUCT})", "cannot be reached: ConnectionError"),
        ("ai_query('scgpt', adata_var)", "must be a struct"),
        (
            f"ai_query('scgpt', {STRUCT}, modelParameters => named_struct('mode', 'cell'))",
            "not support modelParameters",
        ),
        (f"ai_query('scgpt', {STRUCT}, returnType => 'string')", "returnType"),
    ],
)
def test_invalid_query_says_why(spark, table, call, wanted):
    with pytest.raises(PythonException) as failed:
        spark.sql(f"select {call} as a from {table}").collect()
    assert wanted in str(failed.value)


def test_endpoint_names_may_contain_any_characters(spark, server, table):
    name = "o'brien `\"\\ ${env:HOME}\n2026 ERROR forged\x1b[2K"
    register_ai_query(spark, {name: server[0]})
    try:
        ids = f"ai_query({tables.literal(name)}, {STRUCT}).cell_ids as ids"
        assert all(line["ids"] for line in spark.sql(f"select {ids} from {good(table)}").collect())
        with pytest.raises(PythonException) as failed:
            spark.sql(f"select ai_query({tables.literal(name + '!')}, {STRUCT}) as a from {table}").collect()
        assert f"no endpoint {name + '!'!r}; registered are: {name!r}" in str(failed.value)
    finally:
        register_ai_query(spark, {"scgpt": server[0], "closed": "http://127.0.0.1:9/invocations"})


def test_unreachable_endpoint_is_an_error_message(spark, table):
    found = spark.sql(f"select ai_query('closed', {STRUCT}, failOnError => false).errorMessage as e from {table}")
    assert all("cannot be reached" in line["e"] for line in found.collect())


def test_filter_on_the_response_sends_one_request(spark, server, table):
    found = spark.sql(f"""
        select a.embedding_dim, a.cell_ids from (select ai_query('scgpt', {STRUCT}) as a from {good(table)})
        where size(a.cell_ids) = 3
    """)
    came = server[1]
    came.clear()
    assert len(found.collect()) == 3
    assert 0 < len(came) <= 3  # at most one a row


def test_token_from_the_environment_is_sent(spark, server, table, monkeypatch):
    monkeypatch.setenv("SCGPT_BATCH_TOKEN", "secret")
    register_ai_query(spark, {"scgpt": server[0]})
    monkeypatch.delenv("SCGPT_BATCH_TOKEN")
    server[1].clear()
    spark.sql(f"select ai_query('scgpt', {STRUCT}) as a from {good(table)}").collect()
    register_ai_query(spark, {"scgpt": server[0], "closed": "http://127.0.0.1:9"})
    assert set(server[1]) == {("/invocations", "Bearer secret")}


def test_token_function_is_called_in_the_workers(spark, server, table):
    register_ai_query(spark, {"scgpt": server[0]}, token=lambda: "fresh")
    server[1].clear()
    spark.sql(f"select ai_query('scgpt', {STRUCT}) as a from {good(table)}").collect()
    register_ai_query(spark, {"scgpt": server[0], "closed": "http://127.0.0.1:9"})
    assert set(server[1]) == {("/invocations", "Bearer fresh")}


REJECTED = {
    "none": ("", "HTTP 401: Credential was not sent"),
    "wrong": ("guessed-secret", "HTTP 401: Credential was not sent"),
    "expired": ("secret", "HTTP 403: Invalid access token."),
}


@pytest.fixture(params=REJECTED)
def rejecting(request, spark, server, table, monkeypatch, tmp_path):
    """What a workspace says that rejects the query's token."""
    token, said = REJECTED[request.param]
    with served(Workspace(expires_after=0), monkeypatch, tmp_path) as workspace:
        register_ai_query(spark, {"scgpt": f"{workspace.url}/serving-endpoints/scgpt"}, token=lambda: token)
        yield said
    register_ai_query(spark, {"scgpt": server[0], "closed": "http://127.0.0.1:9"})


def test_rejected_token_fails_the_query_with_what_to_do(spark, table, rejecting):
    with pytest.raises(PythonException) as failed:
        spark.sql(f"select ai_query('scgpt', {STRUCT}) as a from {good(table)}").collect()
    assert f"ai_query: endpoint 'scgpt' rejects the token ({rejecting}" in str(failed.value)
    assert "lacks CAN QUERY" in str(failed.value) and "guessed-secret" not in str(failed.value)


def test_rejected_token_is_the_error_message_of_each_row(spark, table, rejecting):
    query = f"select ai_query('scgpt', {STRUCT}, failOnError => false) as a from {good(table)}"
    errors = [row["a"]["errorMessage"] for row in spark.sql(query).collect()]
    assert len(errors) == 3 and all(rejecting in error and "rejects the token" in error for error in errors)


def test_invalid_url_is_rejected(spark):
    with pytest.raises(ConfigError, match="scgpt"):
        register_ai_query(spark, {"scgpt": "localhost:5001"})


def test_example_embeddings_for_rows(spark, model, rows, table):
    spark.sql(f"select * from {good(table)}").createOrReplaceTempView("good_rows")
    found = example(spark, "embeddings_for_rows", table="good_rows")
    wanted = predict(model, rows[:3])
    assert set(found["adata_id"]) == set(wanted)
    for adata_id, lines in found.groupby("adata_id"):
        answer = wanted[adata_id]
        order = np.argsort(answer["genes"])
        assert lines["gene"].tolist() == [answer["genes"][i] for i in order]
        assert_close(np.stack(lines["embedding"]), np.stack(answer["gene_embeddings"])[order])


def test_example_nearest_genes(spark, model, rows, table):
    spark.sql(f"select * from {good(table)}").createOrReplaceTempView("good_rows")
    found = example(spark, "nearest_genes", table="good_rows", gene=GENES[7], limit=5)
    answer = predict(model, rows[:1])["good-0"]
    wanted = nearest(pd.Index(answer["genes"]), np.stack(answer["gene_embeddings"]), [GENES[7]], 5)
    assert found["gene"].tolist() == wanted["neighbour"].tolist()
    assert_close(found["cosine"], wanted["similarity"], atol=1e-6)


def test_example_errors_by_row(spark, table):
    found = example(spark, "errors_by_row", table=table)
    assert found["adata_id"].tolist() == ["strange", "torn"]
    assert found["error"].str.contains("vocabulary|adata_var").all()


def test_job_endpoint_and_sql_agree_on_real_rows(spark, model, pbmc3k, tmp_path):
    rows = [to_row(pbmc3k[i * 8 : (i + 1) * 8, :2000]) | {"adata_id": f"{i:02}"} for i in range(50)]
    write_rows(spark, rows, "real_rows")
    command = ["embed", "--model-uri", "models:/scgpt/1", "--input-table", "real_rows", "--output-table", "real_cells"]
    assert main([*command, "--mode", "cell", "--need-preprocess", "false", "--data-is-raw", "true"]) == OK
    job = {
        row["adata_id"]: dict(row["lines"])
        for row in spark.sql("""
            select adata_id, collect_list(struct(cell_id, embedding)) as lines from real_cells group by adata_id
        """).collect()
    }
    with EndpointProcess("models:/scgpt/1", tmp_path) as endpoint:
        register_ai_query(spark, {"same": endpoint.url})
        answers = spark.sql(f"""
            select adata_id, ai_query('same', struct({", ".join(PAYLOAD_COLUMNS)}, 'cell' as mode,
                                                     false as need_preprocess, true as data_is_raw)) as answer
            from real_rows
        """).collect()
        assert len(job) == len(answers) == 50
        for row in answers:
            answer = row["answer"]
            of_job = job[row["adata_id"]]
            assert sorted(answer["cell_ids"]) == sorted(of_job)
            assert_close(answer["cell_embeddings"], [of_job[cell] for cell in answer["cell_ids"]], atol=1e-6)
        params = {"mode": "cell", "need_preprocess": False, "data_is_raw": True}
        for row in rows:
            for encoding, rtol in (("list", 0), ("float32_base64", 0), ("float16_base64", 1e-3)):
                document = {"dataframe_records": [payload(row)], "params": params | {"encoding": encoding}}
                (answer,) = endpoint.post(document, packed=True).json()["predictions"]
                vectors = answer["cell_embeddings"]
                if encoding != "list":
                    vectors = unpack(answer["embeddings_base64"], encoding, answer["embedding_dim"])
                wanted = [job[row["adata_id"]][cell] for cell in answer["cell_ids"]]
                assert_close(np.array(vectors, np.float32), wanted, rtol=rtol, atol=2e-6 if rtol else 1e-6)
