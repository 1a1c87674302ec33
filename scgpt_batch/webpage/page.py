"""Render a page as one HTML file that works offline, with a keyboard and with a screen reader.

Every value is escaped. Besides, the page's content security policy names the hashes of its own scripts, so a browser
runs no other script, whatever a table contains.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from importlib.util import find_spec
from typing import Any

import pandas as pd

from scgpt_batch.errors import ConfigError, install
from scgpt_batch.io.locations import local_path


def check(path: str, option: str = "--report") -> None:
    """Raise ConfigError if a page is requested and cannot be written."""
    if not path:
        return
    if find_spec("jinja2") is None:
        raise ConfigError(f"{option} needs jinja2: run {install('report')}")
    local = local_path(path, option.removeprefix("--"))
    folder = local.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {option} {path}: folder {folder} does not exist; create it")
    if local.is_dir():
        raise ConfigError(f"cannot write {option} {path}: it is a folder; name a file")


def write(path: str, text: str, option: str = "--report") -> None:
    """Write a page."""
    try:
        local_path(path, option.removeprefix("--")).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot write {option} {path}: {exc.strerror}") from exc


def render(package: str, template: str, *, scripts: Sequence[str] = (), style: str = "", **context: Any) -> str:
    """Return a page as text.

    Parameters
    ----------
    package, template
        The template, which extends `base.html.j2`.
    scripts
        Sources of the page's own scripts; they run in this order after the shared one.
    style
        The page's own style, after the shared one.
    context
        What the template shows.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    folders = ChoiceLoader([PackageLoader(package, ""), PackageLoader("scgpt_batch.webpage", "")])
    environment = Environment(
        loader=folders, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"readable": readable, "words": words, "breakable": breakable}
    sources = [source("scgpt_batch.webpage", "page.js"), *scripts]
    return environment.get_template(template).render(
        style=Markup(source("scgpt_batch.webpage", "style.css") + style),
        scripts=[Markup(script) for script in sources],
        hashes=Markup(" ".join(f"'sha256-{_digest(script)}'" for script in sources)),
        **context,
    )


def source(package: str, name: str) -> str:
    """Return the text of a file of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def data_block(value: Any) -> str:
    """Return JSON for a `<script type="application/json">`, escaped so that no value can close the element."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def readable(value: Any) -> str:
    """Return a table's value as text for people: short numbers, times in UTC, nothing for null."""
    if value is None or value is pd.NaT or (isinstance(value, float) and pd.isna(value)):
        return ""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {readable(each)}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def words(name: str) -> str:
    """Return a column's name as words: `cells_per_second` → `cells per second`."""
    return name.replace("_", " ")


def breakable(text: str) -> str:
    """Return text whose paths and names may break after a slash or underscore, so that their words stay whole."""
    from markupsafe import Markup, escape

    return escape(text).replace("/", Markup("/<wbr>")).replace("_", Markup("_<wbr>"))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
