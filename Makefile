# make demo     train and evaluate on the embedded benchmark      make test     run all notebooks and tests
# make lint     check style and formatting                         make export   write otseg/*.py from the notebooks
# make gpu      verify and measure a GPU                           make readme   write README.md from nbs/index.ipynb
# make site     write the pages of the site into _docs/html        make jupyter  test notebooks and site in a browser, Chromium
# Every target installs the environment first. PYTHON is the interpreter (3.10 or newer), VENV the folder of the environment,
# THREADS the threads of the demo (its model is small: one is fastest), JOBS the number of tests that run at a time.
PYTHON ?= python3
VENV ?= .venv
THREADS ?= 1
JOBS ?= 2
bin := $(VENV)/bin
installed := $(VENV)/installed

.PHONY: demo test gpu lint site jupyter readme export clean

# The terminal shows the last line of the training log every ten seconds.
demo: $(installed)
	mkdir -p runs
	@echo "Training an inductive and a transductive run: a few minutes"
	@OMP_NUM_THREADS=$(THREADS) $(bin)/papermill nbs/train.ipynb runs/digits.ipynb -p dataset digits -p setting all & \
	pid=$$!; \
	while kill -0 $$pid 2>/dev/null; do \
		sleep 10; log=$$(ls -t runs/digits/*/log.jsonl 2>/dev/null | head -n 1); \
		[ -z "$$log" ] || echo "  $$(tail -n 1 "$$log" | cut -c 1-110)"; \
	done; \
	wait $$pid
	@echo; cat runs/digits/table.md
	@echo; echo "Executed notebook: runs/digits.ipynb"; echo "Pictures:"; ls runs/digits/*.png

# nbdev runs the numbered notebooks and the index; tests run the others. Triton reads TRITON_INTERPRET when it is imported:
# the kernels then run on the CPU. One thread each: several notebooks or tests run at a time.
test: $(installed)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(bin)/nbdev_test --file_re '^(\d\d_|index)'
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(JOBS) --dist loadfile tests

# GPU: verifies and measures it in 6 minutes; DEVICE=cpu tries everything with tiny sizes; WHEELS=FOLDER installs from there.
# It needs no installation by this file: PYTHON runs it where there is no VENV.
gpu:
	$(if $(wildcard $(bin)/python),$(bin)/python,$(PYTHON)) scripts/gpu.py $(if $(DEVICE),--device $(DEVICE)) $(if $(WHEELS),--wheels $(WHEELS))

lint: $(installed)
	$(bin)/ruff check docs nbs scripts tests
	$(bin)/ruff format --check docs nbs scripts tests

# Static pages: nothing is executed, and they load nothing from elsewhere. Any web server can serve the folder.
site: $(installed)
	$(bin)/python docs/build.py

jupyter: $(installed)
	$(bin)/pip install --quiet playwright
	$(bin)/python -m pytest -rs tests/test_jupyter.py tests/test_site.py

readme: $(installed)
	$(bin)/python scripts/readme.py

export: $(installed)
	$(bin)/nbdev_clean
	$(bin)/nbdev_export

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find nbs otseg scripts tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# The installation is editable: only changed requirements need a new one.
$(installed): settings.ini setup.py
	test -x $(bin)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): several minutes and 6.5 GB the first time"
	$(bin)/pip install --quiet --editable '.[dev]'
	touch $@
