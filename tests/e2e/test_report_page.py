"""The page of `report` in headless Chromium, with hostile names of genes and labels."""

import numpy as np
import pandas as pd
import pytest

from scgpt_batch.analysis.gene_vectors import GeneVectors
from scgpt_batch.report import page
from tests.analysis_data import LABELS, cluster_vectors
from tests.paths import REPO

HOSTILE = "<img src=x onerror='window.hacked=1'>"
GENES = [f"GENE{i}" for i in range(59)] + [HOSTILE]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    model = {"mode": "contextual", "model_name": "scgpt", "model_version": "3", "params_hash": "0123456789"}
    obs = pd.DataFrame({"cell_type": np.array([*LABELS[:2], HOSTILE], dtype=object)[np.arange(90) % 3]})
    scores = pd.DataFrame({"P1 GENE0": np.linspace(0, 1, 90)})
    names = np.array([f"c{i}" for i in range(90)])
    cells = page.CellVectors("cells", model | {"mode": "cell"}, cluster_vectors(), names, obs, scores)
    groups = {
        name: pd.DataFrame(cluster_vectors(60, seed=seed), index=GENES) for seed, name in enumerate(["T", HOSTILE])
    }
    programs = pd.DataFrame({"program": "P1 GENE0", "gene": GENES[:6], "rank": range(1, 7), "stability": 0.9})
    contents = page.Contents(
        cells=cells, genes=[GeneVectors("genes", model, groups)], programs=programs,
        label_column="cell_type",
        group_scores=pd.DataFrame({"P1 GENE0": [0.1, 0.9]}, index=["T", HOSTILE]),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.render(page.compute(contents)), encoding="utf-8")
    return path


@pytest.fixture(params=["light", "dark"])
def opened(chromium, page_file, request):
    tab = chromium.new_page(color_scheme=request.param, viewport={"width": 1280, "height": 900})
    console, requests = [], []
    # Chromium comments on how the test reads the canvas
    tab.on("console", lambda message: "getImageData" in message.text or console.append(message.text))
    tab.on("pageerror", lambda error: console.append(str(error)))
    tab.on("request", lambda call: requests.append(call.url))
    tab.goto(page_file.as_uri())
    yield tab, request.param
    assert console == [] and requests == [page_file.as_uri()]
    assert tab.evaluate("window.hacked") is None and tab.locator("img").count() == 0
    tab.close()


COLOURS = """id => { const canvas = document.querySelector(`#${id} .stage canvas`);
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, found = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) found.add(data.slice(i, i + 3).join());
  return found.size; }"""


def test_maps_are_drawn_and_coloured_by_a_chosen_column(opened):
    tab, scheme = opened
    (REPO / ".cache" / "screenshots").mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=REPO / ".cache" / "screenshots" / f"report-{scheme}.png", full_page=True)
    assert tab.evaluate(COLOURS, "cells-map") > 3 and tab.evaluate(COLOURS, "genes-map") > 3
    assert tab.locator("#cells-map .entry").count() == 3
    tab.locator("#cells-map .entry").first.click()
    assert tab.locator("#cells-map .entry[aria-pressed=false]").count() == 1
    tab.locator("#cells-map select").select_option(label="score P1 GENE0")
    assert tab.locator("#cells-map .ramp").is_visible() and tab.evaluate(COLOURS, "cells-map") > 20


def test_gene_is_found_by_keyboard(opened):
    tab, _ = opened
    tab.get_by_label("Find a gene").fill("gene17")
    assert tab.locator("#gene-list [role=option]").first.inner_text() == "GENE17"
    tab.keyboard.press("Enter")
    panel = tab.locator("#gene-panel")
    assert panel.get_by_role("heading", name="GENE17").is_visible()
    assert panel.locator("tbody tr").count() == 10 and panel.locator(".bars li").count() == 2
    tab.get_by_label("Find a gene").fill("<img")
    tab.keyboard.press("Enter")
    assert panel.locator("h3").inner_text() == HOSTILE


def test_page_has_landmarks_and_fits_on_a_phone(opened):
    tab, _ = opened
    tree = tab.locator("body").aria_snapshot()
    for part in ('heading "scGPT embeddings: scgpt version 3" [level=1]', 'navigation "Sections"', 'img "Map of cells',
                 'combobox "Find a gene"', 'button "Zoom in to the map of genes"'):  # fmt: skip
        assert part in tree, part
    assert tab.locator("th:not([scope])").count() == 0
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
