"""Hooks of the documentation site: pages made from the code, the notebooks and files outside docs/.

Reference pages come from settings, parameters, docstrings and SQL files, so they cannot differ from the code.
"""

import hashlib
import json
import posixpath
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo

REPO = Path(__file__).parents[1]
HOW_TO = "How-to"
# Files outside docs/ that are pages of the site.
COPIED = {"benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}
NOTEBOOKS = ("quickstart", "spark_quickstart")
# Public functions that `scgpt_batch` does not export at its top level.
FURTHER_FUNCTIONS = {
    "scgpt_batch.client": ("embed",),
    "scgpt_batch.spark.datasource": ("register",),
    "scgpt_batch.spark.ai_query": ("register_ai_query",),
    "scgpt_batch.monitoring.queries": ("requests_view", "run"),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append pages that the navigation does not name to the how-to pages."""
    assert config.nav is not None
    named = set(_names(config.nav))
    how_to = next(section[HOW_TO] for section in config.nav if HOW_TO in section)
    how_to += [path.name for path in sorted(Path(config.docs_dir).glob("*.md")) if path.name not in named]
    return config


def _names(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _names(part)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from other files."""
    made: dict[str, str | bytes] = {
        "reference/python.md": python_reference(),
        "reference/parameters.md": parameters_reference(),
        "reference/commands.md": commands_reference(),
        "reference/sql.md": sql_reference(),
        **{page: (REPO / path).read_text(encoding="utf-8") for page, path in COPIED.items()},
    }
    for name in NOTEBOOKS:
        made |= notebook_page(REPO / "examples" / f"{name}.ipynb")
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links lead to the site's pages, and show diagrams as pictures."""
    here = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri in COPIED:
        markdown = re.sub(r"\]\(\.\./docs/", "](", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+benchmarks/README\.md", f"]({posixpath.relpath('benchmarks.md', here)}", markdown)
    markdown = re.sub(
        r"\]\((?:\.\./)+examples/(\w+)\.ipynb\)", rf"]({posixpath.relpath('tutorials', here)}/\1.md)", markdown
    )
    # files of the repository that are not on the site: their name alone
    markdown = re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:examples|conf|jobs|scgpt_batch|tests)/[^)]+\)", r"\1", markdown)
    return re.sub(r"```mermaid\n(.*?)```", _picture, markdown, flags=re.DOTALL)


def _picture(block: re.Match[str]) -> str:
    """Return the drawn diagram: mermaid itself is 3 MB of JavaScript, which its readers would have to fetch."""
    path = diagram_path(block[1])
    if not path.exists():
        raise PluginError(f"a diagram is new or has changed; draw it: python docs/images/diagrams.py ({path.name})")
    return f"![diagram](images/{path.name})"


def diagram_path(source: str) -> Path:
    """Where the picture of a diagram is; a changed diagram has another name."""
    return REPO / "docs/images" / f"diagram-{hashlib.sha256(source.encode()).hexdigest()[:12]}.svg"


def python_reference() -> str:
    """Every name of `scgpt_batch.__all__`, and the public functions below it."""
    import scgpt_batch
    from scgpt_batch import analysis

    places = dict(scgpt_batch._PLACES)
    lines = ["# Python", "", "`import scgpt_batch as sb`; names are imported when they are first used.", ""]
    described = set(scgpt_batch.__all__) - {"errors", "Parameters", "EmbeddingWarning"}
    for name in sorted(described, key=lambda name: (not name.islower(), name)):  # functions first
        lines += _docstring(f"scgpt_batch.{places[name]}.{name}", f"sb.{name}")
    lines += [
        "## Parameters",
        "",
        "`sb.Parameters(**parameters)` checks the parameters of `sb.embed`; [parameters](parameters.md) lists them.",
        "",
        "## errors",
        "",
        "`sb.errors` holds all errors; [errors](../errors.md) says what causes each, and what mends it.",
        "`sb.EmbeddingWarning` is the class of all warnings about data.",
        "",
    ]
    for module, names in FURTHER_FUNCTIONS.items():
        for name in names:
            lines += _docstring(f"{module}.{name}", f"{module.removeprefix('scgpt_batch.')}.{name}")
    for module, name in _analysis_functions(analysis):
        lines += _docstring(f"{module}.{name}", f"{module.removeprefix('scgpt_batch.')}.{name}")
    return "\n".join(lines)


def _docstring(path: str, title: str) -> list[str]:
    return [f"::: {path}", "    options:", f"      heading: {title}", f"      toc_label: {title}", ""]


def _analysis_functions(package: Any) -> Iterator[tuple[str, str]]:
    """Public functions with an example in the modules of `scgpt_batch.analysis`."""
    for path in sorted(Path(package.__file__).parent.glob("[a-z]*.py")):
        source = path.read_text(encoding="utf-8")
        for name, text in re.findall(r"^def ([a-z]\w*)\((.*?)(?=^def |\Z)", source, re.MULTILINE | re.DOTALL):
            if ">>>" in text:
                yield f"{package.__name__}.{path.stem}", name


def parameters_reference() -> str:
    """The parameters of `sb.embed`, `embed` and the model."""
    from scgpt_batch.cli.commands import NOT_FOR_EMBED
    from scgpt_batch.parameters import PRESETS, Parameters

    lines = [
        "# Parameters",
        "",
        "What `sb.embed`, `scgpt-batch embed`, the registered model and the endpoint take. "
        "[embed](../embed.md#preprocessing) says what matters most. A parameter `max_length` is the flag "
        "`--max-length`.",
        "",
        "| parameter | default | meaning | not in `embed` |",
        "|---|---|---|---|",
    ]
    for name, field in Parameters.model_fields.items():
        absent = "×" if name in NOT_FOR_EMBED else ""
        lines.append(f"| `{name}` | {_default(field)} | {_text(field)} ({_values(field)}) | {absent} |")
    lines += ["", "## Presets", ""]
    for preset, values in PRESETS.items():
        if preset:
            lines.append(f"- `{preset}`: {', '.join(f'`{name}={value!r}`' for name, value in values.items())}")
    return "\n".join(lines)


def commands_reference() -> str:
    """Every command with all its options."""
    from scgpt_batch.cli.commands import COMMANDS
    from scgpt_batch.cli.options import GROUPS, flag

    lines = [
        "# Commands",
        "",
        "Each setting is a flag, an environment variable (`SCGPT_BATCH_` and the name in capitals) or a line in a YAML "
        "file (`--config FILE`). Every command also has `--json` (print the JSON line alone) and `--debug` (show the "
        "traceback of an error).",
        "",
    ]
    for name, command in COMMANDS.items():
        purpose = (command.settings.__doc__ or "").splitlines()[0]
        lines += [f"## {name}", "", purpose, "", "```sh", f"scgpt-batch {name} {command.example}", "```", ""]
        lines += ["| flag | default | meaning |", "|---|---|---|"]
        for group in GROUPS.values():
            for setting in (each for each in group if each in command.fields):
                field = command.fields[setting]
                lines.append(f"| `{flag(setting)}` | {_default(field)} | {_text(field)} ({_values(field)}) |")
        lines.append("")
    return "\n".join(lines)


def _text(field: FieldInfo) -> str:
    """Return the description as a table's cell: `<cls>` is no tag, and a bar ends no cell."""
    return (field.description or "").replace("<", "&lt;").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default in (None, "", (), {}):
        return ""
    value = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
    return f"`{value.lower() if isinstance(field.default, bool) else value}`"


def _values(field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is not None and (choices := [c for c in get_args(kind) if isinstance(c, str) and c]):
        return " or ".join(f"`{choice}`" for choice in choices)
    names = {bool: "true, false", int: "integer", float: "number", str: "text", tuple[str, ...]: "texts"}
    return names.get(kind, "integer" if int in get_args(kind) else "NAME=VALUE …")


def sql_reference() -> str:
    """Every query of `monitor` and the examples for `ai_query`."""
    lines = [
        "# SQL",
        "",
        "The queries behind `scgpt-batch monitor`, the dashboard and the alerts. "
        "[monitoring](../monitoring.md#use-the-sql-directly) says how to run one; names with a colon are parameters.",
        "",
    ]
    for folder in ("scgpt_batch/monitoring/sql", "examples/sql"):
        if folder.startswith("examples"):
            lines += ["# SQL with `ai_query`", ""]
        for path in sorted((REPO / folder).glob("*.sql")):
            lines += [f"## {path.stem}", "", "```sql", path.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines).replace("\n# SQL with", "\n## SQL with")


def notebook_page(path: Path) -> dict[str, str | bytes]:
    """Return a stored notebook as a page with its pictures."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts, pictures = [f"*This page is the notebook `examples/{path.name}`, with the results of its last run.*"], {}
    for i, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source.replace("](../docs/", "](../")))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{i}.png"
                pictures[f"tutorials/{name}"] = b64decode("".join(data["image/png"]))
                parts.append(f"![{output.get('metadata', {}).get('alt', 'the plot of this cell')}]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", []))).rstrip():
                parts.append(f'<div class="output" markdown>\n\n```text\n{text}\n```\n\n</div>')
    title, *rest = [parts[1], parts[0], *parts[2:]]
    return {f"tutorials/{path.stem}.md": "\n\n".join([title, *rest]), **pictures}
