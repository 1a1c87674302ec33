"""Pending rows are divided into waves."""

import itertools
from unittest.mock import patch

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_batch.spark import pending as module
from scgpt_batch.spark.pending import PendingRows


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_waves_are_bounded_and_start_with_the_largest_row(data):
    n = data.draw(st.integers(1, 40))

    def column(values):
        return data.draw(st.lists(values, min_size=n, max_size=n))

    pending = pd.DataFrame(
        {
            "adata_id": [f"row-{i:02}" for i in range(n)],
            "cells": column(st.integers(1, 30)),
            "sample": column(st.sampled_from([None, None, "a", "b"])),
            "ingested_at": pd.array(column(st.sampled_from([None, 1, 2])), "Int64"),
        }
    ).sort_values("cells", ascending=False)
    with patch.object(module, "WAVE_ROWS", 5):
        waves = list(PendingRows(n, pending).waves(40))
    assert sorted(name for wave in waves for name in wave["adata_id"]) == sorted(pending["adata_id"])
    assert waves[0]["cells"].max() == pending["cells"].max()
    ranges = []
    for wave in waves:
        alone = wave["sample"].isna()
        one_sample = wave["sample"].nunique() == 1 and not alone.any()
        assert (wave["cells"].sum() <= 40 and len(wave) <= 5) or len(wave) == 1 or one_sample
        assert alone.all() or not alone.any()
        if alone.all():
            places = [
                (-1 if at is pd.NA else at, name)
                for at, name in zip(wave["ingested_at"], wave["adata_id"], strict=True)
            ]
            ranges.append((min(places), max(places)))
    for (_, last), (first, _) in itertools.pairwise(sorted(ranges)):
        assert last < first
    for _, sample in pending.dropna(subset="sample").groupby("sample"):
        assert sum(wave["adata_id"].isin(sample["adata_id"]).any() for wave in waves) == 1
