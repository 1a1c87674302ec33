"""Which cells become which rows: names, samples, layers, and the formats that are read."""

import gzip
import io
import shutil

import anndata as ad
import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import zarr

from scgpt_batch.errors import ConfigError, FileError, ScgptBatchError
from scgpt_batch.io import files
from scgpt_batch.io.files import ReadOptions, repeated_names
from scgpt_batch.io.locations import canonical, fingerprint, name_sources
from scgpt_batch.io.rows import from_row
from tests.helpers import random_adata


def read_all(*paths, **options):
    options = ReadOptions(**options)
    return [row for task in files.plan([str(path) for path in paths], options) for row in files.read(task, options)]


def cells(rows):
    return ad.concat([from_row(row) for row in rows])


def assert_same(rows, adata):
    found = cells(rows)
    assert found.obs_names.tolist() == adata.obs_names.tolist()
    assert found.var_names.tolist() == adata.var_names.tolist()
    assert abs(found.X - sp.csr_matrix(adata.X)).max() == 0


@pytest.fixture
def counts():
    """Counts as whole numbers in float32."""
    adata = random_adata(30, 9)
    adata.X = adata.X * 4
    return adata


# Names of files and rows


def test_a_unique_stem_is_the_name():
    assert name_sources(["/d/a.h5ad", "/d/b.v1.zarr"]) == {"/d/a.h5ad": "a", "/d/b.v1.zarr": "b.v1"}


def test_files_of_equal_name_are_distinguished_by_folder():
    one, two = "/runs/A/outs/f.h5", "/runs/B/outs/f.h5"
    assert name_sources([one, two]) == {one: "A/outs/f", two: "B/outs/f"}


def test_files_of_equal_stem_are_distinguished_by_suffix():
    assert name_sources(["/d/one.h5ad", "/d/one.zarr"]) == {"/d/one.h5ad": "one.h5ad", "/d/one.zarr": "one.zarr"}


def test_a_file_keeps_the_name_that_the_table_has():
    known = {"/d/A/f.h5ad": "f"}
    assert name_sources(["/d/A/f.h5ad", "/d/B/f.h5ad"], known=known) == {"/d/A/f.h5ad": "f", "/d/B/f.h5ad": "B/f"}
    assert name_sources(["/d/A/f.h5ad"], known=known | {"/d/B/f.h5ad": "B/f"}) == {"/d/A/f.h5ad": "f"}


def test_a_name_in_the_table_is_not_reused():
    assert name_sources(["/d/B/f.h5ad"], known={"/d/A/f.h5ad": "f"}) == {"/d/B/f.h5ad": "B/f"}


def test_id_from_sets_the_shortest_name():
    assert name_sources(["/d/A/f.h5ad"], "parent") == {"/d/A/f.h5ad": "A/f"}
    assert name_sources(["/d/A/f.h5ad"], "path") == {"/d/A/f.h5ad": "/d/A/f"}
    assert name_sources(["/d/A/f.h5ad"], "parent", {"/d/A/f.h5ad": "f"}) == {"/d/A/f.h5ad": "A/f"}


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("file:///data/a.h5ad", "/data/a.h5ad"),
        ("file:/data/a.h5ad", "/data/a.h5ad"),
        ("dbfs:/data/a.h5ad", "/dbfs/data/a.h5ad"),
        ("dbfs:/Volumes/main/lab/raw/a.h5ad", "/Volumes/main/lab/raw/a.h5ad"),
        ("s3://bucket/a.h5ad", "s3://bucket/a.h5ad"),
    ],
)
def test_uris_become_paths_where_they_are_mounted(given, path):
    assert canonical(given) == path


def test_a_file_named_twice_counts_once(tmp_path, counts):
    counts.write_h5ad(tmp_path / "one.h5ad")
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "one.h5ad")
    rows = read_all(tmp_path / "one*.h5ad", f"file://{tmp_path}/one.h5ad", tmp_path / "link.h5ad")
    assert [row["adata_id"] for row in rows] == ["one:0-30"]


@pytest.mark.parametrize(
    ("url", "package"), [("s3://b/a.h5ad", "s3fs"), ("gs://b/a.h5ad", "gcsfs"), ("abfss://c@a/a.h5ad", "adlfs")]
)
def test_a_cloud_without_its_package_names_what_to_install(url, package):
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        files.plan([url], ReadOptions())


def test_files_of_fsspec_are_read(counts, tmp_path):
    memory = fsspec.filesystem("memory")
    counts.write_h5ad(tmp_path / "a.h5ad")
    counts.write_zarr(tmp_path / "b.zarr")
    memory.put(str(tmp_path / "a.h5ad"), "/lab/a.h5ad")
    memory.put(str(tmp_path / "b.zarr"), "/lab/b.zarr", recursive=True)
    write_10x(counts, tmp_path / "c")
    memory.put(str(tmp_path / "c"), "/lab/c", recursive=True)
    for name in ("a.h5ad", "b.zarr", "c"):
        assert_same(read_all(f"memory://lab/{name}"), counts)
    before = fingerprint("memory://lab/a.h5ad")
    assert before == fingerprint("memory://lab/a.h5ad")
    assert [row["source"] for row in read_all("memory://lab/*.h5ad")] == ["memory:///lab/a.h5ad"]


# Samples


def test_rows_of_a_file_are_one_sample_by_default(tmp_path, counts):
    counts.write_h5ad(tmp_path / "s.h5ad")
    assert {row["sample_id"] for row in read_all(tmp_path / "s.h5ad", cells_per_row=7)} == {"s"}
    split = read_all(tmp_path / "s.h5ad", cells_per_row=7, split_by="donor")
    assert {row["sample_id"] for row in split} == {"s:donor 0", "s:donor 1", "s:donor 2"}


def test_a_column_can_say_which_sample_a_cell_belongs_to(tmp_path, counts):
    counts.obs["patient"] = pd.Categorical(["p1"] * 12 + ["p2"] * 12 + [None] * 6)
    counts.write_h5ad(tmp_path / "s.h5ad")
    rows = read_all(tmp_path / "s.h5ad", cells_per_row=7, sample_id="patient")
    assert {row["sample_id"] for row in rows} == {"p1", "p2", "s:(missing)"}
    for row in rows:
        assert from_row(row).obs["patient"].nunique(dropna=False) == 1


def test_without_samples_each_row_is_its_own(tmp_path, counts):
    counts.write_h5ad(tmp_path / "s.h5ad")
    assert {row["sample_id"] for row in read_all(tmp_path / "s.h5ad", sample_id="none")} == {None}


def test_sample_ids_never_equal_row_ids(tmp_path, counts):
    counts.obs["range"] = "x:0-30"
    counts.write_h5ad(tmp_path / "s.h5ad")
    (row,) = read_all(tmp_path / "s.h5ad", sample_id="range")
    assert row["sample_id"] == "x:0-30:"


# Names of cells and genes


def test_repeated_cell_names_become_unique_over_the_whole_file(tmp_path, counts, monkeypatch):
    monkeypatch.setattr(files, "PARTITION_CELLS", 10)
    monkeypatch.setattr(files, "NAMES_BLOCK", 7)
    counts.obs_names = ["A", "B", "A", "A-1", "A"] * 6
    counts.write_h5ad(tmp_path / "f.h5ad")
    found = cells(read_all(tmp_path / "f.h5ad", cells_per_row=4))
    assert found.obs_names.tolist() == ad.utils.make_index_unique(counts.obs_names).tolist()
    assert abs(found.X - counts.X).max() == 0


def test_names_are_unique_as_anndata_makes_them():
    class Named:
        n_obs = 9

        def names(self, positions):
            return np.array(["A", "A-1", "A", "A-1", "", "", "A", "A-1-1", "A"], object)[positions]

    names = Named().names(np.arange(9))
    for position, name in repeated_names(Named()).items():
        names[position] = name
    assert names.tolist() == ad.utils.make_index_unique(pd.Index(Named().names(np.arange(9)))).tolist()


def test_repeated_and_missing_gene_symbols_stay_in_the_row(tmp_path, counts):
    counts.var["symbol"] = ["A", "B", "A", None, "", "C", "D", "E", "F"]
    counts.write_h5ad(tmp_path / "f.h5ad")
    (row,) = read_all(tmp_path / "f.h5ad", gene_symbols="symbol")
    assert '"index":["A","B","A","","","C"' in row["adata_var"] and row["n_vars"] == 9


def test_the_type_of_x_is_stated(tmp_path, counts):
    counts.X = counts.X.astype(np.int64)
    counts.write_h5ad(tmp_path / "f.h5ad")
    assert read_all(tmp_path / "f.h5ad")[0]["x_dtype"] == "int64"


# Layers


def log_normalised(adata):
    x = adata.X.copy()
    x.data = np.log1p(x.data).astype(np.float32)
    return x


def scaled(adata):
    x = adata.X.toarray()
    return ((x - x.mean(0)) / (x.std(0) + 1e-3)).astype(np.float32)


@pytest.mark.parametrize("make_x", [log_normalised, scaled])
@pytest.mark.parametrize("place", ["counts", "raw"])
def test_auto_reads_counts_if_x_has_none(tmp_path, counts, make_x, place):
    adata = counts.copy()
    if place == "raw":
        adata.raw = counts
        adata = adata[:, :5].copy()
        adata.X = make_x(adata)
    else:
        adata.layers["counts"] = counts.X
        adata.X = make_x(counts)
    adata.write_h5ad(tmp_path / "f.h5ad")
    rows = read_all(tmp_path / "f.h5ad", cells_per_row=11)
    assert_same(rows, counts)
    assert {row["layer"] for row in rows} == {place}
    assert rows[0]["notes"][0].startswith(f"{place} is read: it contains counts")


def test_auto_reads_x_if_it_has_counts(tmp_path, counts):
    counts.layers["counts"] = counts.X * 2
    counts.write_h5ad(tmp_path / "f.h5ad")
    assert_same(read_all(tmp_path / "f.h5ad"), counts)


def test_auto_reads_a_layer_without_x(tmp_path, counts):
    ad.AnnData(obs=counts.obs, var=counts.var, layers={"counts": counts.X}).write_zarr(tmp_path / "f.zarr")
    assert_same(read_all(tmp_path / "f.zarr"), counts)


def test_auto_prefers_log_values_to_scaled_values(tmp_path, counts):
    log = counts.copy()
    log.X = log_normalised(counts)
    adata = counts.copy()
    adata.X, adata.raw = scaled(counts), log
    adata.write_h5ad(tmp_path / "f.h5ad")
    rows = read_all(tmp_path / "f.h5ad")
    assert_same(rows, log)
    assert "no matrix contains counts" in rows[0]["notes"][0]


def test_only_scaled_values_is_an_error_with_advice(tmp_path, counts):
    counts.X = scaled(counts)
    counts.write_h5ad(tmp_path / "f.h5ad")
    with pytest.raises(ConfigError, match=r"f\.h5ad.*negative values.*--layer"):
        read_all(tmp_path / "f.h5ad")


def test_only_an_existing_layer_is_read(tmp_path, counts):
    counts.layers["ambient"] = counts.X * 3
    counts.write_h5ad(tmp_path / "f.h5ad")
    assert abs(cells(read_all(tmp_path / "f.h5ad", layer="ambient")).X - counts.X * 3).max() == 0
    with pytest.raises(ConfigError, match="no layer 'spliced'; set --layer to auto or one of 'X', 'ambient'"):
        read_all(tmp_path / "f.h5ad", layer="spliced")


# Formats


def write_10x(adata, folder, *, features="features.tsv.gz", columns=3, prefix="", plain=()):
    folder.mkdir(exist_ok=True)
    stream = io.BytesIO()
    scipy.io.mmwrite(stream, sp.coo_matrix(adata.X.T.astype(int)))
    ids = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    every = [ids, adata.var_names, ["Gene Expression"] * adata.n_vars, ["chr1"] * adata.n_vars]
    taken = [adata.var_names] if columns == 1 else every[:columns]
    texts = {
        features: "".join("\t".join(line) + "\n" for line in zip(*taken, strict=True)).encode(),
        "barcodes.tsv.gz": "".join(f"{name}\n" for name in adata.obs_names).encode(),
        "matrix.mtx.gz": stream.getvalue(),
    }
    for name, data in texts.items():
        name = name.removesuffix(".gz") if name in plain else name
        (folder / f"{prefix}{name}").write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


EVERY = ("features.tsv.gz", "genes.tsv.gz", "barcodes.tsv.gz", "matrix.mtx.gz")


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"features": "genes.tsv.gz", "columns": 2, "plain": EVERY},
        {"plain": EVERY},
        {"features": "genes.tsv.gz", "columns": 2},
        {"plain": ("matrix.mtx.gz",)},
        {"prefix": "GSM1_s1_"},
        {"columns": 1, "plain": EVERY},
        {"columns": 2},
        {"columns": 4},
    ],
    ids=["v3", "v2", "v3 plain", "v2 gz", "mixed", "GEO", "STARsolo 1", "STARsolo 2", "ARC"],
)
def test_folders_of_10x_text_files_are_read(tmp_path, counts, form):
    write_10x(counts, tmp_path / "f", **form)
    assert_same(read_all(tmp_path / "f", cells_per_row=7), counts)


def test_samples_in_one_folder_are_read_by_matrix_name(tmp_path, counts):
    for prefix in ("GSM1_", "GSM2_"):
        write_10x(counts, tmp_path / "f", prefix=prefix)
    with pytest.raises(ConfigError, match=r"contains 2 samples.*GSM1_matrix"):
        read_all(tmp_path / "f")
    assert_same(read_all(tmp_path / "f/GSM2_matrix.mtx.gz"), counts)


def test_a_matrix_header_with_too_many_entries_is_rejected(tmp_path, counts):
    write_10x(counts, tmp_path / "f", plain=EVERY)
    lines = (tmp_path / "f/matrix.mtx").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    lines[at] = "9 30 4000000000"
    (tmp_path / "f/matrix.mtx").write_text("\n".join(lines))
    with pytest.raises(FileError, match="declares 4,000,000,000 entries"):
        read_all(tmp_path / "f")


def write_10x_h5(adata, group, columns, *, shape=True):
    x = sp.csr_matrix(adata.X).astype(np.int32)
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(x, name)
    if shape:
        group["shape"] = np.array(adata.shape[::-1], np.int32)
    group["barcodes"] = adata.obs_names.to_numpy("S")
    for name, values in columns.items():
        group[name] = np.array(list(values), "S")


def test_a_10x_h5_is_read_in_slices_with_all_feature_types(tmp_path, counts):
    types = ["Gene Expression"] * 7 + ["Antibody Capture", "CRISPR Guide Capture"]
    with h5py.File(tmp_path / "f.h5", "w") as file:
        write_10x_h5(counts, file.create_group("matrix"), {})
        features = {"name": counts.var_names, "id": [f"E{i}" for i in range(9)], "feature_type": types,
                    "genome": ["GRCh38"] * 9, "_all_tag_keys": ["genome"]}  # fmt: skip
        for name, values in features.items():
            file[f"matrix/features/{name}"] = np.array(list(values), "S")
    rows = read_all(tmp_path / "f.h5", cells_per_row=7)
    assert len(rows) == 5 and rows[0]["x_dtype"] == "int32"
    assert_same(rows, counts)
    var = from_row(rows[0]).var
    assert var["feature_types"].tolist() == types
    assert set(var) == {"gene_ids", "feature_types", "genome"}


def test_probes_are_named_by_their_gene(tmp_path, counts):
    with h5py.File(tmp_path / "raw_probe_bc_matrix.h5", "w") as file:
        write_10x_h5(counts, file.create_group("matrix"), {})
        genes = ["A", "A", "A", "B", "B", "B", "C", "C", "C"]
        features = {"id": [f"p{i}" for i in range(9)], "gene_id": [f"E{g}" for g in genes], "gene_name": genes,
                    "name": [f"p{i}" for i in range(9)], "feature_type": ["Gene Expression"] * 9}  # fmt: skip
        for name, values in features.items():
            file[f"matrix/features/{name}"] = np.array(list(values), "S")
    (row,) = read_all(tmp_path / "raw_probe_bc_matrix.h5")
    assert '"index":["A","A","A","B"' in row["adata_var"]


def test_old_files_of_several_genomes_are_joined_by_barcode(tmp_path, counts):
    human, mouse = counts[:20, :5].copy(), counts[10:, 5:].copy()
    with h5py.File(tmp_path / "f.h5", "w") as file:
        for genome, part in (("hg19", human), ("mm10", mouse)):
            genes = {"gene_names": part.var_names, "genes": part.var_names}
            write_10x_h5(part, file.create_group(genome), genes)
    found = cells(read_all(tmp_path / "f.h5", cells_per_row=7))
    assert found.obs_names.tolist() == counts.obs_names.tolist()
    assert found.var_names.tolist() == [f"{'hg19' if i < 5 else 'mm10'}_GENE{i}" for i in range(9)]
    wanted = counts.X.toarray()
    wanted[20:, :5] = wanted[:10, 5:] = 0
    assert (found.X.toarray() == wanted).all()


def test_cellbender_output_is_read(tmp_path, counts):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        write_10x_h5(counts, file.create_group("matrix"), {"gene_names": counts.var_names, "genes": counts.var_names})
        file["droplet_latents/cell_probability"] = np.ones(30)
        file["global_latents/epsilon"] = 1.0
    assert_same(read_all(tmp_path / "f.h5"), counts)


# anndata 0.11 writes version 2 only
@pytest.mark.parametrize("version", [2, 3] if hasattr(ad.settings, "zarr_write_format") else [2])
@pytest.mark.parametrize("store", ["folder", "zip"])
def test_zarr_of_both_versions_is_read(tmp_path, counts, version, store):
    with ad.settings.override(**({"zarr_write_format": version} if version == 3 else {})):
        counts.write_zarr(tmp_path / "f.zarr")
    path = tmp_path / "f.zarr"
    if store == "zip":
        path = shutil.make_archive(str(path), "zip", path)
    assert_same(read_all(path, cells_per_row=7, split_by=""), counts)


def test_the_rna_of_mudata_and_the_table_of_spatialdata_are_read(tmp_path, counts):
    counts.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "f.h5mu", "w") as file, h5py.File(tmp_path / "a.h5ad") as part:
        for name in ("atac", "rna"):
            part.copy(part, file.require_group("mod"), name)
        file.create_group("obs")
    assert_same(read_all(tmp_path / "f.h5mu"), counts)
    counts.write_zarr(tmp_path / "s.zarr/tables/table")
    zarr.open_group(tmp_path / "s.zarr", mode="a").require_group("tables")
    assert_same(read_all(tmp_path / "s.zarr"), counts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("f.h5ad.gz", "gunzip"),
        ("f.loom", "read_loom"),
        ("f.rds", "writeH5AD"),
        ("f.txt", "format is not supported: use .h5ad, .h5mu, .zarr"),
        ("empty.h5ad", "cannot be opened as HDF5"),
    ],
)
def test_unreadable_files_are_rejected_by_name(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ScgptBatchError, match=f"{name}: .*{message}"):
        read_all(tmp_path / name)


def test_a_folder_of_files_is_an_error_with_a_pattern(tmp_path, counts):
    counts.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ConfigError, match=r"has no barcodes.tsv.gz\); for the files in it use '.*/\*.h5ad'"):
        read_all(tmp_path)


def test_a_file_without_cells_is_an_error(tmp_path, counts):
    counts[:0].write_h5ad(tmp_path / "f.h5ad")
    with pytest.raises(FileError, match=r"f\.h5ad: contains no cells"):
        read_all(tmp_path / "f.h5ad")


def test_a_file_that_changed_since_it_was_planned_is_an_error(tmp_path, counts):
    counts.write_h5ad(tmp_path / "f.h5ad")
    (task,) = files.plan([str(tmp_path / "f.h5ad")], ReadOptions())
    counts[:20].write_h5ad(tmp_path / "f.h5ad")
    with pytest.raises(FileError, match=r"f\.h5ad: changed while it was read"):
        list(files.read(task, ReadOptions()))


def test_a_fingerprint_changes_with_the_content(tmp_path, counts):
    counts.write_zarr(tmp_path / "f.zarr")
    before = fingerprint(str(tmp_path / "f.zarr"))
    assert fingerprint(str(tmp_path / "f.zarr")) == before
    (tmp_path / "f.zarr/X/data/0").write_bytes(b"other")
    assert fingerprint(str(tmp_path / "f.zarr")) != before
