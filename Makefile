# `make demo` trains a small model on this machine and samples from it. `make test` runs the fast checks, which take a
# few minutes; `make test-all` runs the slow ones. `make engines` opens exported models in engines with large packages.
PYTHON ?= python3
# Any release since 2.11 works: `make setup TORCH=torch` installs the newest.
TORCH ?= torch==2.13.0
# The Triton release that matches this torch on Linux. Skipped if torch's wheel already installed Triton.
TRITON ?= triton==3.7.1
# The oldest Triton release that the kernels must compile with.
OLD_TRITON := triton==3.6.0
# The oldest transformers release that must open exported models.
OLD_TRANSFORMERS := transformers==4.57.6
BIN := .venv/bin
DEMO := demo

.PHONY: setup demo test test-all engines lines

setup: .venv/installed

.venv/installed: pyproject.toml
	@echo "Installing PyTorch, Triton and the tools into .venv. This takes a few minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	[ "$$(uname)" != Linux ] || $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet "$(TRITON)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# Standard library packages, used as training text because every machine has them.
PACKAGES := asyncio collections concurrent email html http importlib json logging multiprocessing unittest urllib xml

demo: setup
	rm -rf $(DEMO)
	$(BIN)/python -m acceleron.data prepare --output $(DEMO)/data --vocab_size 2048 --input \
		$$($(BIN)/python -c 'import sys, sysconfig; print(*(sysconfig.get_path("stdlib") + "/" + p for p in sys.argv[1:]))' $(PACKAGES))
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		flags="--model_size tiny --vocab_size 2048 --batch_size 16 --seq_len 1024 --max_steps 300 --lr 1e-3"; \
	else \
		flags="--model_size nano --batch_size 4 --seq_len 256 --max_steps 450 --lr 5e-3 --no_compile"; \
	fi; \
	set -x; $(BIN)/python train.py --data_dir $(DEMO)/data --save_dir $(DEMO)/run --no_gradient_checkpointing \
		--num_workers 1 --log_interval 25 --eval_interval 150 $$flags
	$(BIN)/python -m acceleron.plot $(DEMO)/run
	$(BIN)/python generate.py --checkpoint $$(ls $(DEMO)/run/checkpoint_*.pt) --prompt "def " --max_new_tokens 120 --seed 1
	@echo "The loss curve is $(DEMO)/run/loss.png"

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n logical --dist worksteal

test-all: setup
	$(BIN)/pyright
	$(BIN)/python -m pytest -n logical --dist worksteal -m slow
	$(BIN)/python -m bench compile --check --dtype bf16 fp16 fp32
	$(BIN)/python -m bench compile --check --tokens 1 --arch sm_90 gfx942
	$(BIN)/pip install --quiet --upgrade --no-deps --target ".venv/$(OLD_TRITON)" "$(OLD_TRITON)"
	PYTHONPATH=".venv/$(OLD_TRITON)" $(BIN)/python -m bench compile --check --dtype bf16 fp16 fp32
	$(BIN)/pip install --quiet --upgrade --target ".venv/$(OLD_TRANSFORMERS)" "$(OLD_TRANSFORMERS)"
	PYTHONPATH=".venv/$(OLD_TRANSFORMERS)" $(BIN)/python -m pytest \
		tests/export/test_transformers.py tests/export/test_other_models.py

# Each engine gets a virtual environment in .venv/engines, 7 GB in all. `make engines ENGINES="mlx peft"` runs two of them.
engines: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/export/engines.py $(ENGINES)

# Count the lines of Python per folder, excluding symlinks, and the words in the documentation.
lines:
	@for folder in kernels acceleron bench tests; do \
		printf '%-9s %6d lines\n' $$folder $$(find $$folder -name '*.py' -type f -exec cat {} + | wc -l); done
	@printf '%-9s %6d words\n' documents $$(cat *.md docs/*.md kernels/*.md bench/README.md | wc -w)
