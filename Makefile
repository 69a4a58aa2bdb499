# Needs only python3 (3.11 or newer) and make. PYTHON=python3.12 picks another interpreter, VENV another folder.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
OUT ?= out
TESTS ?= tests
EXTRAS ?= test,dev

.PHONY: demo test check slow bench clean

demo: $(STAMP)  ## sample three prompts with 4-bit weights and activations, beside bf16
	$(BIN)/sdq sample --compare bf16 --out $(OUT)/demo \
	  --prompt "a large red circle moves left over a blue checkerboard" \
	  --prompt "a medium white triangle bounces sideways over a orange gradient" \
	  --prompt "a small yellow ring orbits clockwise and a large purple square stays still over a green wall"
	@echo "open $(OUT)/demo/report.html in a browser"

test: $(STAMP)  ## everything but the slow tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(TESTS)

slow: $(STAMP)  ## everything
	$(BIN)/python -m pytest -q -n auto --dist loadfile --slow

check: $(STAMP)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## CPU throughput of every format, written to docs/results/
	$(BIN)/python -m scripts.bench_quantize --out docs/results

clean:
	rm -rf $(VENV) $(OUT) *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Installed again only when pyproject.toml changes; the install is editable.
$(STAMP): pyproject.toml
	@echo "setting up $(VENV) (a minute or two)"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	@touch $@
