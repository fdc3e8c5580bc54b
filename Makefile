# make demo   train and evaluate OTSeg on the embedded benchmark     make test     all tests and all notebooks
# make readme README.md from nbs/index.ipynb                         make export   otseg/*.py from nbs/*.ipynb
# make jupyter  notebooks in JupyterLab, driven by a browser (needs Chromium; without it, the tests are skipped)
# Each makes its environment first. PYTHON picks the interpreter (3.10 or newer), VENV where the environment lives.
# THREADS is for the demo, whose model is so small that a second thread costs more than it brings; JOBS is how many tests run at a time.
PYTHON ?= python3
VENV ?= .venv
THREADS ?= 1
JOBS ?= 2
bin := $(VENV)/bin
installed := $(VENV)/installed

.PHONY: demo test lint jupyter readme export clean

demo: $(installed)
	mkdir -p runs
	OMP_NUM_THREADS=$(THREADS) $(bin)/papermill nbs/train.ipynb runs/digits.ipynb -p dataset digits -p setting all
	@echo; cat runs/digits/table.md
	@echo; echo "Executed notebook: runs/digits.ipynb"; echo "Pictures:"; ls runs/digits/*.png

# The numbered notebooks and the index run as tests; papermill runs the others from within pytest. Notebooks share processes,
# and Triton must know from its import that 41_kernel interprets its kernel.
test: $(installed)
	TRITON_INTERPRET=1 $(bin)/nbdev_test --file_re '^(\d\d_|index)'
	$(bin)/python -m pytest -n $(JOBS) --dist loadfile tests

jupyter: $(installed)
	$(bin)/pip install --quiet playwright
	$(bin)/python -m pytest -rs tests/test_jupyter.py

readme: $(installed)
	$(bin)/python scripts/readme.py

lint: $(installed)
	$(bin)/ruff check nbs scripts tests
	$(bin)/ruff format --check nbs scripts tests

export: $(installed)
	$(bin)/nbdev_clean
	$(bin)/nbdev_export

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find nbs otseg scripts tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# Editable, so a change of the code needs no new installation; a change of the requirements does.
$(installed): settings.ini setup.py
	test -x $(bin)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): several minutes and 6.5 GB the first time"
	$(bin)/pip install --quiet --editable '.[dev]'
	touch $@
