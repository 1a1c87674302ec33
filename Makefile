# make demo    sets everything up, runs the main job on real cells, shows the result
# make test    sets everything up, passes checks and tests
# make check   lint, format, types, import direction
# make parity  compares live with the real scgpt 0.2.4, in an environment of its own
# make bench-blog   the blog's wrapper against this job, side by side

PYTHON ?= python3
VENV := .venv
UPSTREAM := .venv-upstream
export SPARK_LOCAL_IP ?= 127.0.0.1
export PYTHONUNBUFFERED = 1

.PHONY: setup java demo test check parity bench-blog clean

setup: $(VENV)/.ready java

# A stamp inside the environment: it is built again when the pins or the project's needs change.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; call make with PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python -c constraints.txt -e '.[dev]'
	touch $@

$(UPSTREAM)/.ready: pyproject.toml constraints-upstream.txt $(VENV)/.ready
	$(PYTHON) -m venv --clear $(UPSTREAM)
	$(VENV)/bin/uv pip install --quiet --python $(UPSTREAM)/bin/python -c constraints-upstream.txt -e '.[local,upstream]' pytest
	touch $@
