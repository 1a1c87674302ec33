"""A file that refers to other files, or declares more than it can hold, is refused before it is read."""

import h5py
import numpy as np
import pytest

from scgpt_batch.errors import FileError, PayloadError
from scgpt_batch.inference.row_reader import RowReader
from scgpt_batch.io.hdf5_safety import open_hdf5
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.tokens import ScgptTokenizer
from tests.helpers import random_adata


@pytest.fixture
def secret(tmp_path):
    """A file that must not be readable through another."""
    path = tmp_path / "secret.bin"
    path.write_bytes(b"password" * 100)
    return path


def external_storage(file, secret):
    file.create_dataset("obs/leak", (800,), "u1", external=[(str(secret), 0, 800)])


def external_link(file, secret):
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["x"] = np.arange(3)
    file["obs/leak"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "x")


def soft_link(file, secret):
    file["obs/leak"] = h5py.SoftLink("/X")


def virtual_dataset(file, secret):
    layout = h5py.VirtualLayout((3,), "i8")
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "x", (3,))
    file.create_virtual_dataset("uns/leak", layout)


def declared_only(file, secret):
    file.create_dataset("uns/huge", (40_000, 40_000), "f4", chunks=(1000, 1000))


def declared_chunk(file, secret):
    file.create_dataset("uns/chunk", (1,), "u1", chunks=(2**30,), maxshape=(None,))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (external_storage, "'obs/leak' stores its values in another file"),
        (external_link, "'obs/leak' is a link to another file"),
        (soft_link, "'obs/leak' is a soft link"),
        (virtual_dataset, "'uns/leak' is a virtual dataset"),
        (declared_only, "'uns/huge' declares 6,104 MB, but stores only 0 bytes"),
        (declared_chunk, "'uns/chunk' declares 1,024 MB"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_with_links_or_wrong_sizes_are_rejected(tmp_path, secret, damage, message):
    random_adata(5, 4).write_h5ad(tmp_path / "f.h5ad")
    with h5py.File(tmp_path / "f.h5ad", "r+") as file:
        damage(file, secret)
    with pytest.raises(FileError, match=message):
        open_hdf5(tmp_path / "f.h5ad")


def test_file_with_highly_compressed_data_is_read(tmp_path):
    with h5py.File(tmp_path / "zeros.h5", "w") as file:
        file.create_dataset("x", data=np.zeros(100_000_000, "u1"), chunks=(10_000_000,), compression="gzip")
    assert open_hdf5(tmp_path / "zeros.h5")["x"].shape == (100_000_000,)


def test_circular_groups_are_checked_in_bounded_time(tmp_path):
    with h5py.File(tmp_path / "circle.h5", "w") as file:
        inner = file.create_group("a/b")
        inner["back"] = file["a"]
    assert list(open_hdf5(tmp_path / "circle.h5")) == ["a"]


def test_file_that_is_not_hdf5_is_an_error(tmp_path):
    (tmp_path / "f.h5ad").write_bytes(b"not HDF5")
    with pytest.raises(FileError, match="cannot be opened as HDF5"):
        open_hdf5(tmp_path / "f.h5ad")


def test_input_data_path_rejects_external_storage(tmp_path, secret):
    random_adata(5, 4).write_h5ad(tmp_path / "f.h5ad")
    with h5py.File(tmp_path / "f.h5ad", "r+") as file:
        external_storage(file, secret)
    reader = RowReader(ScgptTokenizer(Vocabulary({"GENE0": 0})), [str(tmp_path)])
    parameters = Parameters(mode="cell", need_preprocess=False, input_data_path=str(tmp_path / "f.h5ad"))
    with pytest.raises(PayloadError, match=r"f\.h5ad.*stores its values in another file"):
        reader.prepare({}, parameters, 0)
