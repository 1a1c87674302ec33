"""Draw the diagrams of the documents for the site, after one has changed:

    npm pack mermaid@11 && tar xzf mermaid-11.*.tgz
    .venv/bin/python docs/images/diagrams.py package/dist/mermaid.min.js

The site shows pictures because mermaid itself is 3 MB of JavaScript. `make docs` fails when one is missing.
"""

import re
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))
from docs.site import diagram_path  # noqa: E402

DRAW = """async source => {
    mermaid.initialize({startOnLoad: false, theme: 'neutral', htmlLabels: false, flowchart: {htmlLabels: false}});
    return (await mermaid.render('diagram', source)).svg;
}"""


def main(mermaid: str) -> None:
    """Draw every diagram, and remove pictures of earlier ones."""
    sources = [
        source
        for path in sorted((REPO / "docs").glob("*.md"))
        for source in re.findall(r"```mermaid\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(path=mermaid)
        drawn = {diagram_path(source): page.evaluate(DRAW, source) for source in sources}
        browser.close()
    for path in set((REPO / "docs/images").glob("diagram-*.svg")) - drawn.keys():
        path.unlink()
    for path, svg in drawn.items():
        width, height = re.findall(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg)[0]
        sized = svg.replace('width="100%"', f'width="{width}" height="{height}"', 1)
        path.write_text(sized + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
