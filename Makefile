# Everything a fresh machine needs: `make demo` and `make test`. Each makes .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out

.PHONY: demo test lint llama-cpp cuda-check bench clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	mkdir -p $(OUT)
	$(BIN)/moequant export examples/tiny-additive-moe --quant Q4_K_M --force \
		--output $(OUT)/tiny-additive-moe-Q4_K_M.gguf \
		--perplexity examples/tiny-additive-moe/held-out.txt

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# before pytest, whose tests have a time limit each: a first build takes minutes
llama-cpp: $(VENV)/installed
	$(BIN)/moequant runtime build --stock
	$(BIN)/moequant runtime build --tool test-backend-ops

test: lint llama-cpp
	$(BIN)/pytest -n auto --dist loadfile $(PYTEST_OPTIONS)

# needs nvcc and no GPU; some minutes, once
cuda-check: $(VENV)/installed
	$(BIN)/moequant runtime cuda-check

bench: $(VENV)/installed
	$(BIN)/python benchmarks/encoders.py
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache
