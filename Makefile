# make demo    sets up .venv and does the whole job on real faces
# make test    sets up .venv and runs the tests, one process per core
# make runtimes  installs other runtimes and processors for the tests, into QFACE_RUNTIMES or .runtimes
# make browser  puts the page of examples/browser and onnxruntime-web into build/browser
# make check   sets up .venv and runs ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test runtimes browser check format clean

demo: $(VENV)/installed-demo
	$(BIN)/qface demo

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto

runtimes:
	$(PYTHON) -m tests.runtimes.setup

browser:
	$(PYTHON) examples/browser/build.py build/browser

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One stamp for each set of optional packages: it is made again when the requirements change.
$(VENV)/installed-%: setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
