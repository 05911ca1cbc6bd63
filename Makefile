# Two commands: `make encode` extracts features of a drawing and a photo with the bundled model, `make test` runs every
# check. They share one virtual environment, which whichever comes first makes.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: encode test docs clean

encode: $(VENV)/.installed
	$(RUN)/sketchfusion encode examples/images/cat.svg examples/images/cat.jpg --out features.safetensors

test: $(VENV)/.tested
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/python docs/generate.py --check
	$(RUN)/python -m pytest

docs: $(VENV)/.tested
	$(RUN)/python docs/generate.py

clean:
	rm -rf $(VENV) features.safetensors

# The tested versions, torch first: on its own it installs the build that fits this machine's package index.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
