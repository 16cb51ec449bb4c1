# make demo      set up .venv and run the main job on real faces
# make test      set up .venv and run the tests, one process per core
# make runtimes  install other runtimes and processors for the tests, into QFACE_RUNTIMES or .runtimes
# make browser   write the page of examples/browser and onnxruntime-web to build/browser
# make docs      set up .venv and build the documentation site in build/site; a broken link or a missing page fails
# make check     set up .venv and run ruff, mypy and codespell
# make format    set up .venv and let ruff fix what it can
PYTHON ?= python3
VENV ?= .venv
# Empty takes the newest torch that setup.cfg allows: make test VENV=.venv-newest CONSTRAINTS=
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test runtimes browser docs check format clean

demo: $(VENV)/installed-demo
	$(BIN)/qface demo

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto

runtimes:
	$(PYTHON) -m tests.runtimes.setup

browser:
	$(PYTHON) examples/browser/build.py build/browser

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell *.md benchmarks docs examples qface tests

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One stamp for each set of optional packages, renewed when the requirements change.
$(VENV)/installed-%: setup.cfg $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
