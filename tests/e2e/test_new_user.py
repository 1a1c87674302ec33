"""A new user gets from the repository to a UMAP of their own cells with the README alone."""

import subprocess
import sys

import pytest

from tests import new_user
from tests.paths import REPO


def test_readme_leads_from_a_copy_to_a_umap(tmp_path):
    venv = sys.prefix  # the environment of the tests is one that `make setup` built
    command = [sys.executable, "-m", "tests.new_user", tmp_path / "scgpt", "--venv", venv]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *steps, last = done.stdout.splitlines()
    assert len(steps) == 3 and last.startswith("done: ") and last.endswith(".png")


def test_a_step_that_the_readme_lacks_stops_the_way(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("## Try it\n\n    make demo\n\n## More\n")
    section = new_user.section_of(readme, "Try it")
    with pytest.raises(new_user.NotInReadme, match="how to embed"):
        new_user.the(r"^```python\n(.*?)^```$", section, "how to embed a file of one's own")
