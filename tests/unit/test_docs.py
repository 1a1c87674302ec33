"""The documents list what the code has (errors, exit codes, columns), and their links lead somewhere."""

import re

import pytest

from scgpt_batch import errors
from scgpt_batch.cli import analysis_tables
from scgpt_batch.cli.analysis_tables import ddl
from scgpt_batch.cli.main import ALERTS, FAILED, OK, TOO_MANY_FAILED_ROWS, WRONG_USAGE, main
from scgpt_batch.parameters import Parameters
from scgpt_batch.spark import tables
from tests.paths import REPO

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(f"docs/{p.name}" for p in (REPO / "docs").glob("*.md")),
]
CLASSES = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
CODES = (OK, FAILED, WRONG_USAGE, TOO_MANY_FAILED_ROWS, ALERTS)


def read(document):
    return (REPO / document).read_text(encoding="utf-8")


def first_cells(document):
    """The first cell of each table row, without backticks."""
    return [line.split("|")[1].strip().strip("`") for line in read(document).splitlines() if line.startswith("|")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_of_the_repository_that_a_document_names_exist(document):
    named = re.findall(
        r"`((?:tests|scgpt_batch|benchmarks|examples|jobs|conf)/[\w./-]+\.(?:py|sql|yml|ipynb|md|conf))`",
        read(document),
    )
    assert [name for name in named if not (REPO / name).exists()] == []


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "EmbeddingWarning"])
def test_every_error_class_has_a_cause_and_a_remedy(name):
    rows = [line for line in read("docs/errors.md").splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    assert all(cell.strip() for cell in rows[0].strip("|").split("|"))


@pytest.mark.parametrize("code", CODES)
def test_every_exit_code_is_explained(code):
    assert first_cells("docs/errors.md").count(str(code)) == 1


@pytest.mark.parametrize("title", ["adata_rows", "files", "gene_embeddings", "cell_embeddings", "ledger", "runs"])
def test_every_column_of_a_table_is_described_with_its_type(title):
    described = described_columns(title)
    if title == "cell_embeddings":  # refers to the last columns of gene_embeddings
        described = described_columns("gene_embeddings") | described
    columns = dict(re.findall(r"(?:^|,)\s*`?(\w+)`? ([A-Z][\w<>]*)", getattr(tables, title.upper())))
    assert columns and {name: described.get(name) for name in columns} == {k: v.lower() for k, v in columns.items()}


@pytest.mark.parametrize(
    "title", ["gene_programs", "program_scores", "program_enrichment", "annotations", "evaluations"]
)
def test_every_column_of_a_result_table_is_described_with_its_type(title):
    described = described_columns("gene_programs") | described_columns(title)
    columns = dict(re.findall(r"`(\w+)` ([A-Z<>]+)", ddl(getattr(analysis_tables, title.upper()))))
    assert columns and {name: described.get(name) for name in columns} == {k: v.lower() for k, v in columns.items()}


def described_columns(title):
    """The columns of a section of docs/tables.md with their types: one for all columns of a line, or one for each."""
    section = read("docs/tables.md").split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = {}
    for line in (line for line in section.splitlines() if line.startswith("| `") and "…" not in line):
        _, names, types, *_ = line.split("|")
        each = [kind.strip() for kind in types.replace(", not null", "").split(",")]
        found |= dict(zip(named(names), each if len(each) > 1 else each * len(named(names)), strict=True))
    return found


def named(cell):
    return re.findall(r"`(\w+)`", cell)


DEFAULTS = [
    line.split("|")[1:3]
    for line in read("docs/migration.md").split("\n## Defaults\n")[1].splitlines()
    if "`" in line and line.startswith("| `")
]


@pytest.mark.parametrize(("name", "written"), DEFAULTS)
def test_defaults_of_the_migration_table_are_those_of_the_code(name, written):
    value = Parameters.model_fields[name.strip(" `")].default
    shown = written.split("(")[0].strip(" `").replace(",", "")
    assert shown == (
        str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    )


@pytest.mark.parametrize("row", first_cells("CONTRIBUTING.md")[2:])
def test_private_names_of_other_libraries_are_still_in_use(row):
    (line,) = [line for line in read("CONTRIBUTING.md").splitlines() if line.startswith("| ") and row in line]
    _, name, places, _, tests, _ = line.split("|")
    for place in named_paths(places):
        source = (REPO / "scgpt_batch" / place).read_text(encoding="utf-8")
        for used in re.findall(r"`([\w.]+)", name):
            assert used.rpartition(".")[2] in source, place
    assert all((REPO / test).exists() for test in named_paths(tests))


def named_paths(cell):
    return re.findall(r"`([\w/]+\.py)`", cell)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[\w/]+\.(?:py|sql)\b", read("docs/architecture.md")))))
def test_files_of_the_architecture_exist(path):
    assert (REPO / "scgpt_batch" / path).is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document):
    folder = (REPO / document).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = folder / path if path else REPO / document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text):
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def calls():
    """The calls of `scgpt-batch` in the documents' shell blocks: document, command, flags."""
    for document in DOCUMENTS:
        for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if call := re.search(r"scgpt-batch ([\w-]+)(.*)", line.partition(" #")[0]):
                    yield pytest.param(call[1], re.findall(r"--[\w-]+", call[2]), id=f"{document}: {call[0][:40]}")


@pytest.mark.parametrize(("command", "flags"), calls())
def test_documented_flags_exist(command, flags, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(flags) <= known


def test_changelog_of_a_version_has_at_most_25_lines():
    versions = re.split(r"^## ", read("CHANGELOG.md"), flags=re.MULTILINE)[1:]
    assert versions and all(len(version.splitlines()) <= 25 for version in versions)


def test_readme_fits_on_150_lines():
    assert len(read("README.md").splitlines()) <= 150


def test_no_index_is_asked_for_the_package():
    """The package is on no index, and another could take its name there."""
    paths = [*(REPO / name for name in DOCUMENTS), *(REPO / "scgpt_batch").rglob("*.py")]
    bare = re.compile(r"pip install [^`\n]*(?<![/\w-])scgpt_batch(?![/-])")
    allowed = ("`pip install scgpt_batch` finds nothing", "in a clone of scgpt_batch")
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if bare.search(line)]
    assert [line for line in lines if not any(words in line for words in allowed)] == []
