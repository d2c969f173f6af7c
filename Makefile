# Thin over pip and npu-rec. `make train` and `make test` do whatever set-up is missing.
#   TORCH='torch==2.12.0'   another build of PyTorch (README.md, "PyTorch builds")
#   PYTHON=python3.12       another interpreter
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml

# A torch that is there already is kept when it is new enough; a torch of the system is shared with the environment.
SUITABLE := import torch; raise SystemExit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))
# Triton for the tests, unless the environment has one; never beside torch_npu, whose triton-ascend it would overwrite.
HAS_TRITON := from importlib.util import find_spec; raise SystemExit(not (find_spec('triton') or find_spec('torch_npu')))
# The engine `torchrec` for the tests, where its one pair of versions fits: torch 2.13 without a card. TorchRec's metadata
# asks for FBGEMM's CUDA build, so its dependencies are named here.
TORCHREC := torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 tensordict==0.15.3 pyvers==0.2.3 cloudpickle torchmetrics==1.0.3 \
	lightning-utilities pyre-extensions==0.0.32 typing-inspect mypy-extensions tqdm
FITS_TORCHREC := import torch; from importlib.util import find_spec; \
	raise SystemExit(not torch.__version__.startswith('2.13.') or torch.version.cuda is not None or bool(find_spec('torch_npu')))
export TORCH_DEVICE_BACKEND_AUTOLOAD ?= 0

.PHONY: train test lint docs install clean
train: install
	$(BIN)/npu-rec train $(CONFIG) --resume auto

test: install
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	$(BIN)/python -m pip install -q mkdocs-material
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

install: $(VENV)/.installed
ifneq ($(TORCH),)
.PHONY: $(VENV)/.installed  # another torch is asked for: look again
endif
$(VENV)/.installed: pyproject.toml setup.py Makefile $(wildcard kernels/cpu/*)
	@start=$$(date +%s); \
	test -x $(BIN)/python || { $(PYTHON) -c "$(SUITABLE)" 2>/dev/null \
		&& $(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv $(VENV); }; \
	if [ -n "$(TORCH)" ]; then $(BIN)/python -m pip install -q $(TORCH); \
	else $(BIN)/python -c "$(SUITABLE)" 2>/dev/null || $(BIN)/python -m pip install -q torch==2.13.0; fi && \
	$(BIN)/python -m pip install -q 'setuptools>=77' && \
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]' && \
	{ $(BIN)/python -c "$(HAS_TRITON)" || $(BIN)/python -m pip install -q 'triton<3.10' \
		|| echo "triton cannot be installed here: the tests of its kernels are skipped"; } && \
	{ ! $(BIN)/python -c "$(FITS_TORCHREC)" || $(BIN)/python -m pip install -q --no-deps $(TORCHREC) \
		|| echo "torchrec cannot be installed here: the tests of its engine are skipped"; } && touch $@ && \
	echo "installed in $$(( $$(date +%s) - start )) s"

clean:
	rm -rf $(VENV) build *.egg-info site
