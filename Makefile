# Every target works as the first command on a fresh clone: it creates .venv and installs into it
# what it needs. Only make and Python 3.11 or newer have to be there. `make PYTHON=/path/to/python`
# chooses the interpreter, `make JOBS=8 test` the number of test processes.

VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
ARGS   ?=
SRC    := lora_fx passes export tools
LAYOUT := .mypy_cache/layout
STACKS := $(patsubst tests/stacks/requirements/%.txt,%,$(wildcard tests/stacks/requirements/*.txt))

RUNTIMES := $(patsubst tests/runtimes/requirements/%.txt,%,$(wildcard tests/runtimes/requirements/*.txt)) js

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

.PHONY: venv
venv: $(VENV)/.dev ## Create .venv with everything that tests and lint need

.PHONY: demo
demo: $(VENV)/.demo ## Plan, rewrite, train, merge, export a real model in a minute (ARGS=--full: compare it, too)
	$(BIN)/lora-fx demo $(ARGS)

.PHONY: test
test: $(VENV)/.dev ## Run the test suite (ARGS='-k merge' and the like)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.dev ## Run the tests marked slow
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "slow and not cuda" $(ARGS)

.PHONY: slow-list
slow-list: $(VENV)/.dev ## Write tests/slow.txt: what takes more than a second is run by test-slow
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not cuda and not stack and not runtime" --write-slow 1 $(ARGS)

.PHONY: test-cuda
test-cuda: $(VENV)/.dev ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m cuda $(ARGS)

.PHONY: test-stacks
test-stacks: $(STACKS:%=.peers/.stack-%) ## Run the tests of training stacks, each in .peers/ (STACKS=trl: one)
	@status=0; for stack in $(STACKS); do \
	  echo "== $$stack"; \
	  .peers/$$stack/bin/python -m pytest -m "stack and not cuda" $(ARGS) || status=1; \
	done; exit $$status

# The runtimes are asked by scripts in environments of their own; the tests run here.
.PHONY: test-runtimes
test-runtimes: $(VENV)/.dev $(RUNTIMES:%=.peers/.runtime-%) ## Run exported files in other runtimes, each in .peers/ (RUNTIMES=genai: one)
	$(BIN)/python -m pytest -m "runtime and not cuda" $(ARGS) tests/runtimes

# Each environment takes minutes to test, and is removed afterwards (ARGS=--keep leaves it in .peers/).
.PHONY: test-versions
test-versions: $(VENV)/.versions ## Run snippet, demo and tests with other versions (VERSIONS=torch-2.15; all of them: hours)
	$(BIN)/python -m tests.versions --jobs $(JOBS) $(ARGS) $(VERSIONS)

.PHONY: golden
golden: $(VENV)/.dev ## Write the golden graphs anew; read the diff before committing it
	LORA_FX_UPDATE_GOLDEN=1 $(BIN)/python -m pytest $(ARGS)

.PHONY: coverage
coverage: $(VENV)/.dev ## Run the test suite and report the lines it does not reach
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term-missing:skip-covered $(ARGS)

.PHONY: lint
lint: style typecheck ## Check style, formatting and types

.PHONY: style
style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/words.py --vague=5 --clause=0 --long=8 --odd=0

# mypy cannot see through the package-dir mapping, so it gets the folders laid out by symbolic links
# as they are installed, and is run from there. The sed turns lora_fx/passes/x.py back into the path
# in the repository.
.PHONY: layout
layout:
	@rm -rf $(LAYOUT) && mkdir -p $(LAYOUT)/lora_fx
	@ln -s "$(CURDIR)"/lora_fx/* "$(CURDIR)/passes" "$(CURDIR)/export" "$(CURDIR)/tools" $(LAYOUT)/lora_fx/

.PHONY: typecheck
typecheck: $(VENV)/.dev layout
	@cd $(LAYOUT) && { status=0; \
	  "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" \
	    --python-executable "$(CURDIR)/$(BIN)/python" -p lora_fx > ../mypy.log 2>&1 || status=$$?; \
	  sed -E 's#^lora_fx/(passes|export|tools)/#\1/#' ../mypy.log; exit $$status; }

.PHONY: format
format: $(VENV)/.dev ## Format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/.dev ## Measure and write docs/benchmarks.md
	$(BIN)/lora-fx bench $(ARGS)

.PHONY: bench-envs
bench-envs: .peers/.olive .peers/.optimum .peers/.runtime-genai ## Install other exporters, each into .peers/, for make bench to compare with

.PHONY: pictures
pictures: $(VENV)/.dev ## Draw the pictures of docs/guides/visualizing.md (needs Chromium)
	PYTHONPATH=. $(BIN)/python docs/pictures.py

.PHONY: zoo
zoo: $(VENV)/.zoo ## Run the whole job on many models and write docs/zoo.md (ARGS='--only swin')
	$(BIN)/lora-fx zoo $(ARGS)

.PHONY: formats
formats: $(VENV)/.dev ## Train, merge, save and export over every format of weights; write the table in docs/guides/quantized.md
	$(BIN)/python -m tests.formats --write $(ARGS)

.PHONY: docs
docs: $(VENV)/.docs layout ## Build the site of the documentation into out/site/; any warning is an error
	$(BIN)/python docs/site/api.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "The site is in out/site/: open out/site/index.html"

# setuptools takes up whatever an earlier build left in build/, deleted modules too.
.PHONY: wheel
wheel: $(BIN)/python ## Build dist/*.whl
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build

# It pushes, tags and publishes nothing: it prints the commands that do.
.PHONY: release
release: $(VENV)/.dev ## Check that a release can be cut, date CHANGELOG.md and build dist/ (ARGS='--date 2030-01-31')
	@$(BIN)/python .ci/release.py $(ARGS)

.PHONY: clean
clean: ## Remove what was built and cached; `rm -rf .venv` for the rest
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov
	find $(SRC) tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment ---------------------------------------------------------------------------

EXTRAS_demo := demo
EXTRAS_dev  := test,lint
EXTRAS_zoo  := zoo
EXTRAS_docs := docs
EXTRAS_versions := versions

$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS_$*)]'
	@touch $@

# Olive imports requests and onnxscript without asking for them.
PEER_olive   := olive-ai onnxruntime onnxscript peft requests transformers
PEER_optimum := optimum-onnx[onnxruntime] peft

.peers/.%: | $(BIN)/python
	$(BIN)/python -m venv .peers/$*
	.peers/$*/bin/python -m pip install --quiet $(PEER_$*)
	@touch $@

# What a stack needs is in its requirement file: this package, its tests, and pins if it has any. A package
# whose own pins are older than what is tested here is in a file `alone`, and is installed without them.
.peers/.stack-%: tests/stacks/requirements/%.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv .peers/$*
	.peers/$*/bin/python -m pip install --quiet --requirement $<
	if [ -f $(<:.txt=.alone) ]; then .peers/$*/bin/python -m pip install --quiet --no-deps -r $(<:.txt=.alone); fi
	@touch $@

# Its PyTorch is newer than pip's configuration may allow, and uv does not read that.
.peers/.stack-gptqmodel: tests/stacks/requirements/gptqmodel.txt pyproject.toml | $(VENV)/.versions
	$(BIN)/uv venv --quiet --clear .peers/gptqmodel
	$(BIN)/uv pip install --quiet --python .peers/gptqmodel/bin/python --requirement $<
	@touch $@

# What a runtime needs of the system, where that can be installed; its tests are skipped without it.
.peers/.runtime-js: | .peers/.debian-chromium
.peers/.runtime-webgpu .peers/.runtime-webgpu-1.25: | .peers/.debian-mesa-vulkan-drivers

.peers/.debian-%:
	@mkdir -p .peers
	@if dpkg -s $* > /dev/null 2>&1; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $* > /dev/null && touch $@ || true; \
	else echo "Debian's package $* is not installed, and only root can install it"; fi

.peers/.runtime-js: tests/runtimes/requirements/package.json
	mkdir -p .peers/js
	cp $< .peers/js/package.json
	npm install --silent --ignore-scripts --prefix .peers/js
	@touch $@

# llama.cpp's converter is a script in the source package; it runs in .venv.
.peers/.runtime-llama_cpp: tests/runtimes/requirements/llama_cpp.txt | $(BIN)/python
	rm -rf .peers/llama_cpp
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest .peers/llama_cpp --requirement $<
	cd .peers/llama_cpp && tar -xzf *.tar.gz --strip-components=3 --wildcards \
	  '*/llama.cpp/convert_*_to_gguf.py' '*/llama.cpp/conversion' '*/llama.cpp/gguf-py'
	@touch $@

# What vLLM asks for and can do without: wheels for CUDA, which do not load where torch is for the CPU.
UNWANTED_vllm := torchaudio torchcodec
UNWANTED_openvino := openvino-telemetry

.peers/.runtime-%: tests/runtimes/requirements/%.txt | $(BIN)/python
	$(BIN)/python -m venv .peers/$*
	.peers/$*/bin/python -m pip install --quiet --requirement $<
	$(if $(UNWANTED_$*),.peers/$*/bin/python -m pip uninstall --quiet --yes $(UNWANTED_$*))
	@touch $@

$(BIN)/python:
	@good='import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))'; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14 python; do \
	  if $$python -c "$$good" > /dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$($$python --version); the first installation takes minutes."; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "lora-fx needs Python 3.11 or newer with its venv module; none was found in PATH" \
	  "(python3 is: $$(python3 --version 2>&1 | head -n 1))." >&2; \
	echo "Install one (Debian, Ubuntu: python3 and python3-venv), or name it:" \
	  "make PYTHON=/path/to/python" >&2; \
	exit 1
