"""What a plan expects of machines, and the size of the output."""

import pytest

from scgpt_batch.models.scgpt.config import ModelConfig
from scgpt_batch.parameters import Parameters
from scgpt_batch.spark.capacity import PUBLISHED, capacities, duration, flop_per_cell, output_bytes, rate, size
from tests.paths import REPO


def found(mode, dtype="float32", config=PUBLISHED, cores=2):
    return {each.compute: each for each in capacities(Parameters(mode=mode, dtype=dtype), config, cores)}


def test_ten_million_cells_on_eight_gpus_take_minutes_in_bfloat16():
    eight = found("cell", "bfloat16")["8 × H100"]
    assert 0.05 < eight.hours_per_ten_million_cells < 0.1 and "not measured" in eight.source
    assert found("cell")["2 CPU cores"].hours_per_ten_million_cells == pytest.approx(694, rel=0.01)


def test_machines_that_cannot_run_a_type_are_left_out():
    assert "1 × T4" in found("cell") and "1 × T4" not in found("cell", "bfloat16")
    assert list(found("static")) == ["2 CPU cores"]
    assert "CPU" not in " ".join(found("cell", cores=None))


def test_rates_scale_with_the_model():
    assert flop_per_cell(PUBLISHED) == pytest.approx(64.4e9, rel=0.01)  # as docs/performance.md calculates
    half = ModelConfig(embsize=512, nheads=8, d_hid=512, nlayers=6)
    ratio = found("cell", config=half)["8 × H100"].cells_per_second / found("cell")["8 × H100"].cells_per_second
    assert ratio == pytest.approx(2, rel=0.01)


def test_output_is_sized_by_mode():
    cell = output_bytes(Parameters(mode="cell"), 512, rows=10, cells=10_000_000)
    assert 18e9 < cell < 21e9
    static, contextual = (
        output_bytes(Parameters(mode=mode), 512, rows=400, cells=9) for mode in ("static", "contextual")
    )
    # measured: 19 MB without the column embedding_id, and 15.6 MB for it
    assert static == pytest.approx(34.6e6, rel=0.1) and contextual > 25 * static
    assert output_bytes(Parameters(mode="contextual", genes=("A", "B")), 512, rows=400, cells=9) < contextual / 500


def test_times_and_sizes_have_a_fitting_unit():
    assert [duration(s) for s in (0, 59, 90, 12_600, 10**7)] == ["0 s", "59 s", "1.5 min", "3.5 h", "115.7 days"]
    assert [size(n) for n in (1.5e6, 20.5e9)] == ["1.5 MB", "20.5 GB"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documented_capacities_are_those_of_the_plan(dtype):
    text = (REPO / "docs" / "performance.md").read_text()
    for name, each in found("cell", dtype).items():
        hours = duration(each.hours_per_ten_million_cells * 3600)
        assert f"| {name} | {dtype} | {rate(each.cells_per_second)} | {hours} |" in text
