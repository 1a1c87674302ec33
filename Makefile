# make demo    install everything, embed real cells, show the result
# make test    install everything, run checks and the tests without Spark and with one local session
# make check   lint, format, types, direction of imports
# make test-e2e        tests with servers, clusters, browsers and fresh environments
# make numbers         numerical tests again, with the kernels of two kinds of older CPUs
# make test-versions   install the wheel with each supported Python and set of versions, and test it there
# make parity  compare live with the real scgpt 0.2.4, in its own environment
# make docs    build the documentation site in build/site; a warning is an error
# make new-user      go a new user's way through the README in an empty folder, with the seconds of each step
# make notebooks       run the notebooks of examples/ and store their results
# make bundle  write the dashboard and alerts of conf/databricks from the SQL and conf/monitor.yml
# make bench   every benchmark, against scgpt and the machine's limit
# make bench-blog      the usual Spark wrapper against this job, side by side
# make bench-serving   the usual wrapper under mlflow models serve against scgpt-batch serve; 20,000 requests; 10,000 rows
# make bench-start     where a cold command's time goes, and the commands against a bare Delta session
# make faults          break the nightly run for real, and count lost and duplicated rows
# make fault-serving   kill the endpoint 50 times under load; 50,000 hostile bodies, 50,000 times random bytes (half an hour)

SHELL := bash
.SHELLFLAGS := -o pipefail -c  # a command that fails before a pipe fails the step

PYTHON ?= python3
VENV := .venv
UPSTREAM := .venv-upstream
export SPARK_LOCAL_IP ?= 127.0.0.1
export PYTHONUNBUFFERED = 1

.PHONY: setup java jars chromium demo test test-e2e numbers test-versions check docs notebooks new-user bundle parity bench bench-blog bench-serving bench-start faults fault-serving clean

setup: $(VENV)/.ready java jars

# A stamp inside the environment: it is rebuilt when the pins or the project's requirements change.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; call make with PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python -c constraints.txt -e '.[dev]'
	touch $@

$(UPSTREAM)/.ready: pyproject.toml constraints-upstream.txt $(VENV)/.ready
	$(PYTHON) -m venv --clear $(UPSTREAM)
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(UPSTREAM)/bin/python -c constraints-upstream.txt -e '.[local,upstream]' graspologic-native pytest pytest-timeout
	touch $@

# Spark needs Java 17 or 21: used if present, installed if that needs no confirmation, else the user is asked to.
java:
	@if ! command -v java >/dev/null && [ -z "$$JAVA_HOME" ]; then \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && apt-get install -y -qq openjdk-17-jre-headless >/dev/null; \
	  else \
	    echo 'Spark needs Java: run  sudo apt-get install openjdk-17-jre-headless  (or install Java 17 or 21 your way)'; \
	    exit 2; \
	  fi; \
	fi

# Delta's jars go into a cache folder once, so that later commands start without Maven, also offline.
jars: $(VENV)/.ready java
	@$(VENV)/bin/python -m scgpt_batch.spark.jars >/dev/null

# A test opens the monitoring report in a real browser.
chromium:
	@if ! command -v chromium >/dev/null; then \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else \
	    echo 'The tests need Chromium: run  sudo apt-get install chromium  (or put a chromium on the PATH your way)'; \
	    exit 2; \
	  fi; \
	fi

DEMO := $(VENV)/bin/scgpt-batch
CONF := --config conf/local.yml

# Each step leaves its result in .demo and is not repeated; embed itself finds new rows.
demo: setup .demo/registered .demo/ingested
	@echo; echo '--- embed: spark-submit, Delta to Delta'
	@PYSPARK_PYTHON=$(CURDIR)/$(VENV)/bin/python PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
	  $(VENV)/bin/spark-submit --properties-file "$$($(VENV)/bin/python -m scgpt_batch.spark.jars)" jobs/embed_genes.py $(CONF) 2>>.demo/log
	@$(DEMO) embed $(CONF) --mode cell --need-preprocess false --output-table 'delta.`.demo/cell_embeddings`' 2>>.demo/log | sed '$$d'
	@echo; echo '--- the result'
	@$(DEMO) summary $(CONF) 2>>.demo/log | sed '$$d'
	@echo; echo '--- programs: genes that belong together, and their scores by cell type'
	@$(DEMO) programs $(CONF) 2>>.demo/log | sed '$$d'
	@echo; echo '--- annotate: cell types of one half of the cells, from those of the other half'
	@$(VENV)/bin/python benchmarks/known_answers.py --write-labels
	@$(DEMO) annotate $(CONF) 2>>.demo/log | sed '$$d'
	@echo; echo '--- evaluate: vectors of cells by their types, vectors of genes by their families'
	@$(DEMO) evaluate $(CONF) 2>>.demo/log | sed '$$d'
	@$(DEMO) evaluate --embeddings .demo/gene_embeddings 2>>.demo/log | sed '$$d'
	@echo; echo '--- what is known of these cells and genes'
	@$(VENV)/bin/python benchmarks/known_answers.py 2>>.demo/log
	@echo; echo '--- report: a page to open in a browser'
	@$(DEMO) report $(CONF) 2>>.demo/log | sed '$$d'
	@echo; echo 'The demo checkpoint is made from these cells; it is NOT the published scGPT weights (see README.md).'

.demo/checkpoint/best_model.pt: $(VENV)/.ready
	@mkdir -p .demo; echo '--- demo-checkpoint: gene vectors from the co-expression of PBMC3k'
	@$(DEMO) demo-checkpoint $(CONF) 2>>.demo/log
	@touch $@

.demo/registered: .demo/checkpoint/best_model.pt
	@echo; echo '--- register: the model in MLflow (sqlite)'
	@$(DEMO) register $(CONF) 2>>.demo/log
	@touch $@

.demo/ingested: .demo/registered conf/local.yml
	@echo; echo '--- ingest: real PBMC cells -> rows in Delta'
	@$(DEMO) ingest $(CONF) 2>>.demo/log
	@touch $@

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: check numbers
	$(VENV)/bin/pytest -n 2 tests/unit
	$(VENV)/bin/pytest -n 2 --dist loadfile tests/spark

test-e2e: setup chromium
	$(VENV)/bin/pytest -n 2 --dist loadfile tests/e2e

# The files that hold marked tests; the others need not be imported.
NUMBERS = $$(grep -l 'mark\.numbers' tests/unit/*.py)

# torch selects its kernels by CPU: "default" has no vector instructions, "avx2" none of 512 bits.
numbers: setup
	ATEN_CPU_CAPABILITY=default $(VENV)/bin/pytest -n 2 -m numbers $(NUMBERS)
	ATEN_CPU_CAPABILITY=avx2 $(VENV)/bin/pytest -n 2 -m numbers $(NUMBERS)

# LEGS="newest-3.12 lowest-3.11" runs only these
test-versions: setup
	$(VENV)/bin/python -m tests.versions.run $(LEGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo 'open build/site/index.html; with search: python3 -m http.server --directory build/site'

notebooks: setup
	$(VENV)/bin/python -m tests.notebooks

new-user: setup
	$(VENV)/bin/python -m tests.new_user $$(mktemp -d)/scgpt_batch

bundle: setup
	$(VENV)/bin/python -m scgpt_batch.databricks.bundle conf

parity: setup $(UPSTREAM)/.ready
	$(UPSTREAM)/bin/python -m pytest tests/upstream -o addopts= -o filterwarnings=ignore -q -p no:cacheprovider

bench: setup $(UPSTREAM)/.ready
	$(VENV)/bin/python benchmarks/bench.py

bench-blog: setup $(UPSTREAM)/.ready
	$(VENV)/bin/python benchmarks/blog.py

bench-serving: setup $(UPSTREAM)/.ready
	$(VENV)/bin/python benchmarks/serving.py
	$(VENV)/bin/python benchmarks/serving.py --soak memory
	$(VENV)/bin/python benchmarks/serving.py --soak log

bench-start: setup
	$(VENV)/bin/python benchmarks/start.py

faults: setup
	$(VENV)/bin/python -m tests.faults.run

fault-serving: setup
	SCGPT_BATCH_KILLS=$${SCGPT_BATCH_KILLS:-50} SCGPT_BATCH_FUZZ=$${SCGPT_BATCH_FUZZ:-50000} \
	  $(VENV)/bin/pytest --timeout=0 tests/e2e/test_serving.py tests/e2e/test_serving_log.py tests/e2e/test_serving_limits.py \
	  -k 'kills or random_bodies or random_bytes'

clean:
	rm -rf .demo .cache dist mlruns $(VENV) $(UPSTREAM)
