# Every command of the project. `make help` lists them; `make book` and `make test` set up all they need.

PYTHON ?= python3
PORT   ?= 8000
JOBS   ?= 2
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
SITE   := _build/html

# Kernels and tools come from .venv, whatever else the machine carries; progress bars stay out of stored outputs.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
export TQDM_DISABLE := 1
# Threads that wait give way: on a busy machine spinning ones slow everything down thirtyfold.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
unexport PYTHONPATH PYTHONHOME MPLBACKEND

.DEFAULT_GOAL := help
.PHONY: help book test notebooks backmatter serve check-site repository constraints clean

help:  ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "minddpm needs Python 3.11 or newer, and $(PYTHON) is older or absent;" \
	    "name another, as in: make PYTHON=python3.12 book"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): once, a few minutes, about 6 GB with PyTorch."
	"$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[book,full,test]"
	@touch $@

book: $(STAMP)  ## Build the book with warnings as errors, and say which page to open
	$(VENV)/bin/jupyter-book build . --all -W -n --keep-going -q
	@$(PY) book/tools/check_site.py $(SITE)
	@echo "Open $(CURDIR)/$(SITE)/index.html"

test: $(STAMP)  ## Lint the code, run the unit tests, replay every notebook (JOBS=4 for four at a time)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadgroup tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile --nbval notebooks

notebooks: $(STAMP)  ## Run every notebook in place and store its outputs (ONLY=notebooks/x.ipynb for one)
	$(PY) book/tools/execute_notebooks.py $(ONLY)
	$(PY) book/tools/backmatter.py

backmatter: $(STAMP)  ## Write the claims ledger and the equation map from the marks in text and code
	$(PY) book/tools/backmatter.py

serve:  ## Show the built book on http://localhost:8000 (PORT=... for another port)
	@test -f $(SITE)/index.html || { echo "There is no book yet: run make book first."; exit 1; }
	$(PY) -m http.server $(PORT) --bind localhost --directory $(SITE)

check-site: $(STAMP)  ## Check the built book: no broken link, nothing loaded from another host
	$(PY) book/tools/check_site.py $(SITE)

repository: $(STAMP)  ## Follow the URL in _config.yml everywhere (URL=https://github.com/... moves it)
	$(PY) book/tools/set_repository.py $(URL)

constraints:  ## Renew the pins in constraints.txt (needs uv)
	uv pip compile pyproject.toml --all-extras --universal --no-annotate --no-header --upgrade \
	  -o constraints.txt

clean:  ## Remove the environment, the built book and caches
	rm -rf $(VENV) _build *.egg-info .pytest_cache .ruff_cache
	find book minddpm notebooks tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
