# Two commands do everything: `make demo` runs the main job, `make test` proves it. Both create and reuse $(VENV).
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test check clean

demo: $(VENV)/.worker
	$(VENV)/bin/ncfm demo

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.worker $(VENV)/.dev: $(VENV)/.%: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV)
