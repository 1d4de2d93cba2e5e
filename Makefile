# make demo and make test need nothing but Python 3.11, 3.12 or 3.13: they make .venv and install into it.
# make VENV=PATH ... uses another environment; where that has what is needed, nothing is installed.

VENV ?= .venv
PY := $(VENV)/bin/python
TEST_EXTRAS := dev,train,xla,eval,plan
SETUP := .ci/setup

.PHONY: install demo test lint bench plan clean help

help:
	@echo "make demo     draw pictures with the embedded model into out/"
	@echo "make test     run the whole suite"
	@echo "make lint     ruff and mypy"
	@echo "make bench    speed and memory beside other implementations"
	@echo "make plan     compile the training step of DALL·E Mega for the pod it was trained on: ten minutes, 16 GB of memory"
	@echo "make install  the dalle-torch command, into $(VENV)"
	@echo "make clean    remove caches and build products"
	@echo "VENV=PATH     uses another environment than .venv"

install:
	@$(SETUP) "$(VENV)"
	@$(PY) -m pip install --no-compile --quiet --no-deps --editable .
	@echo "installed: $(VENV)/bin/dalle-torch"

demo:
	@$(SETUP) "$(VENV)"
	@$(PY) -m dalle_torch.cli.main demo --output out

# torch_xla takes the process over and wants its devices counted before it starts: its tests run apart.
test:
	@$(SETUP) "$(VENV)" $(TEST_EXTRAS)
	@status=0; \
	USE_TORCH_XLA=0 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not xla" tests || status=$$?; \
	DALLE_TORCH_XLA_TESTS=1 PJRT_DEVICE=CPU CPU_NUM_DEVICES=8 $(PY) -m pytest -m xla tests || status=$$?; \
	exit $$status

lint:
	@$(SETUP) "$(VENV)" $(TEST_EXTRAS)
	$(PY) -m ruff check .
	$(PY) -m mypy

bench:
	@$(SETUP) "$(VENV)" bench
	@for name in generation vqgan loading training; do USE_TORCH_XLA=0 $(PY) -m benchmarks.$$name || exit $$?; done

plan:
	@$(SETUP) "$(VENV)" train,plan
	@$(PY) -m dalle_torch.cli.main plan --config configs/train/mega-v3-256.yaml --output plans/mega-v3-256

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dalle_torch tests launch benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
