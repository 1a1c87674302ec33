"""The commands that the documents show: shell blocks as scripts, and each call of `scgpt-batch`."""

import re
import shlex
from pathlib import Path

from tests.paths import REPO

DOCUMENTS = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("benchmarks/*.md")])
END_OF_COMMAND = {"|", "&&", "||", ";", "&", ">", ">>", "2>"}


def blocks(document: Path) -> list[tuple[str, str]]:
    """The document's code blocks, in order: language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shell_blocks(document: Path) -> list[str]:
    """The document's blocks in `sh` or `bash`."""
    return re.findall(r"^```(?:sh|bash)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def command_lines(script: str) -> list[str]:
    """The script's lines, continued ones joined, without comments, empty lines and here-documents."""
    script = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", script, flags=re.DOTALL | re.MULTILINE)
    lines = script.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def calls(document: Path) -> list[list[str]]:
    """The words of each call of `scgpt-batch` in the document's shell blocks."""
    return [words for block in shell_blocks(document) for words in calls_of(block)]


def calls_of(script: str) -> list[list[str]]:
    """The words of each call of `scgpt-batch` in a script."""
    found = []
    lines = command_lines(script)
    for line in (line for line in lines if "scgpt-batch" in line):
        words = shlex.split(line, comments=True)
        names = [Path(word).name for word in words]
        if "scgpt-batch" in names:  # and not only a file that is called so
            words = words[names.index("scgpt-batch") + 1 :]
            found.append(words[: next((i for i, word in enumerate(words) if word in END_OF_COMMAND), len(words))])
    return found


def mentions(document: Path) -> list[str]:
    """The calls of `scgpt-batch` within sentences and tables, which may leave out settings."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`scgpt-batch ([^`]+)`", prose.replace("\n", " "))
