PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.stamp
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

book: $(READY)  ## run every notebook live, training included, and render the book from what came out
	$(BIN)/python book/build.py --live

test: $(READY)  ## run the tests, every notebook, the strict book build, and read the book in a browser
	@# The tests and the notebooks side by side, in two processes of one thread: faster than two threads for each.
	printf '%s\n' tests notebooks/*.ipynb notebooks/solutions/*.ipynb | OMP_NUM_THREADS=1 xargs -n 1 -P 2 $(BIN)/pytest -p no:cacheprovider --nbval-lax --nbval-current-env --ignore=tests/browser
	$(BIN)/python book/build.py --strict
	$(BIN)/python tests/check_pages.py book/_build/html
	$(BIN)/pytest -p no:cacheprovider -rs tests/browser

handouts: $(READY)  ## teachers: notebooks for students, with blanks, and filled in, in book/_build/handouts
	$(BIN)/python book/handouts.py

figures: $(READY)  ## teachers: every figure as SVG and PNG in book/_build/figures; runs the notebooks, or one: NAME=01
	$(BIN)/python book/slides.py $(NAME)

kit: $(READY)  ## teachers: one folder for a room without a network, in book/_build/kit
	$(BIN)/python book/kit.py

lab: $(READY)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks/

site: $(READY)  ## render the book from the committed outputs, without running anything
	$(BIN)/python book/build.py
	$(BIN)/python tests/check_pages.py book/_build/html

pdf: site  ## make one PDF of the book, book/_build/book.pdf (needs Chromium)
	$(BIN)/python book/pdf.py

sync: $(READY)  ## authors: refresh mirrored cells, notebook pairs and everything made from the repository's address
	$(BIN)/python book/sync.py $(TAKE:%=--take %)

refresh: $(READY)  ## authors: run the notebooks and keep their outputs in place
	$(BIN)/python book/execute.py

record: $(READY)  ## authors: record five seeds of what a notebook claims, such as NAME=01_ablation; without NAME, all that no longer fit the code
	$(BIN)/python book/record.py $(NAME) $(SEEDS:%=--seeds %)

weights: $(READY)  ## authors: list the commands that trained memtx_minimal/weights, one line each (it does not run them)
	@$(BIN)/python book/weights.py

bench: $(READY)  ## authors: measure the figures of tests/benchmarks, side by side with public packages
	$(BIN)/python tests/benchmarks/run.py

lock:  ## authors: resolve requirements.txt anew from pyproject.toml (needs uv)
	@# torch's own GPU packages stay out: pip picks those that fit the reader's machine.
	echo 'torch==2.13.0' | uv pip compile - pyproject.toml --extra dev --universal --python-version 3.10 --no-python-downloads --upgrade \
	    --no-annotate --no-header | grep -vE '^(nvidia|cuda|triton)' > requirements.part
	{ echo '# Exact pins for running, testing and authoring, Python 3.10 to 3.14. Made by `make lock` from pyproject.toml.'; \
	    cat requirements.part; } > requirements.txt && rm requirements.part

clean:  ## remove .venv and everything that was built
	rm -rf .venv book/_build

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "memtx-minimal needs Python 3.10 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: help book test handouts figures kit lab site pdf sync refresh record weights bench lock clean
.DELETE_ON_ERROR:
