# Two commands on a fresh machine with only Python 3.11:  make demo  and  make test
# Each first sets up what it needs (make venv); an existing, current set-up is reused.

SHELL := /bin/sh
PYTHON ?= python3.11
PYTHON312 ?= python3.12
VENV ?= .venv
VENV_LATEST ?= .venv-latest
# More arguments for pytest, like ARGS="tests/unit -k rope" or ARGS="-n0 --pdb".
ARGS ?=
# One per file of pins, tests/clients/NAME.txt; each has a venv of its own, .venv-clients/NAME.
CLIENTS = $(basename $(notdir $(wildcard tests/clients/*.txt)))
# Tests run on every core, at most on four: those with ranks use several cores each.
WORKERS = -n logical --maxprocesses 4

# Ranks share the cores: more threads than cores only slow down each other.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help venv venv-latest demo test test-latest test-clients check docs docs-links clean

help:
	@echo "make demo         extend a small Llama model 8x on this machine's CPU and evaluate it (sets up first)"
	@echo "make test         the test suite without the cases marked complete (sets up first)"
	@echo "make test-latest  all of it, on Python 3.12 with the newest supported megatron-core"
	@echo "make test-clients exports in other versions of transformers, vLLM and llama.cpp, in .venv-clients"
	@echo "make check        ruff (format and rules) and mypy"
	@echo "make docs         the documentation as a site, in build/site; warnings and broken internal links are errors"
	@echo "make docs-links   check the external links of the documentation, over the network"
	@echo "make venv         only the set-up of $(VENV) from setup.py and constraints.txt"
	@echo "make clean        remove build files and caches; $(VENV), $(VENV_LATEST) and runs/ are kept"

venv:
	@$(call set_up,$(VENV),$(PYTHON),3.11)

venv-latest:
	@$(call set_up,$(VENV_LATEST),$(PYTHON312),3.12)
	@$(call set_up_transformer_engine,$(VENV_LATEST)/transformer-engine)

demo: venv
	$(VENV)/bin/python examples/demo/demo.py

test: venv
	$(VENV)/bin/python -m pytest $(WORKERS) -m "not complete and not long" $(ARGS)

test-latest: venv-latest
	$(VENV_LATEST)/bin/python -m pytest $(WORKERS) $(ARGS)

# A client that cannot be installed is skipped, with the reason in one line.
test-clients: venv
	@$(foreach client,$(CLIENTS),$(call set_up_client,$(client));)
	@$(call set_up_llama_cpp)
	$(VENV)/bin/python -m pytest -rs tests/clients $(ARGS)

check: venv
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

docs: venv
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet
	@echo "open build/site/index.html, or for the search: $(VENV)/bin/python -m http.server --directory build/site"

docs-links: venv
	$(VENV)/bin/python docs/hooks/links.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# $(1) folder, $(2) Python to use, $(3) its required version. The folder's set-up file records what it was made from and where;
# another setup.py, constraints.txt or location makes it again.
define set_up
want="$$(cat setup.py constraints.txt | cksum) $(CURDIR)"; \
if [ "$$(cat $(1)/set-up 2>/dev/null)" = "$$want" ] && $(1)/bin/python -c "" 2>/dev/null; then exit 0; fi; \
python=; \
for candidate in $(2) python$(3) "$$HOME"/.pyenv/versions/$(3).*/bin/python /usr/bin/python$(3) /usr/local/bin/python$(3) python3; do \
  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit("%d.%d" % sys.version_info[:2] != "$(3)")' >/dev/null 2>&1; then \
    python="$$candidate"; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "error: no Python $(3) with the venv module here; install it (Debian: python$(3) and python$(3)-venv) and try again" >&2; exit 2; fi; \
echo "setting up $(1) with $$python (minutes, once)"; \
rm -rf $(1) && "$$python" -m venv $(1) && \
$(1)/bin/python -m pip install --quiet -c constraints.txt torch && \
$(1)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]' && \
echo "$$want" > $(1)/set-up
endef

# $(1) folder for TransformerEngine's Python files, where only tests/null_gpu/check_transformer_engine.py looks. Its compiled
# part is not installed: building it takes a CUDA toolkit.
define set_up_transformer_engine
if [ ! -d $(1) ]; then \
  $(VENV_LATEST)/bin/python -m pip install --quiet --no-deps -c constraints.txt --target $(1) transformer-engine || \
    echo "skipped: TransformerEngine's Python files could not be installed" >&2; fi
endef

# $(1) client. Its own packages come before those of $(VENV), where it finds the rest (torch among them).
define set_up_client
dir=.venv-clients/$(1); want="$$(cat tests/clients/$(1).txt constraints.txt | cksum) $(CURDIR)"; \
if [ "$$(cat $$dir/set-up 2>/dev/null)" != "$$want" ]; then \
  echo "setting up $$dir"; rm -rf $$dir; mkdir -p .venv-clients; \
  if $(VENV)/bin/python -m venv $$dir && \
    $$dir/bin/python -m pip install --quiet --no-deps -r tests/clients/$(1).txt >$$dir/log 2>&1 && \
    $(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
      > "$$($$dir/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/base.pth"; then \
    echo "$$want" > $$dir/set-up; \
  else echo "skipped: $(1): $$(grep ERROR $$dir/log | tail -n 1)"; rm -f $$dir/set-up; fi; fi
endef

# llama.cpp is in the source archive of llama-cpp-python, with the Python files that load it; only its library is compiled.
define set_up_llama_cpp
dir=.venv-clients/llama.cpp-source; want="$$(cat tests/clients/llama.cpp.archive) $(CURDIR)"; \
if [ "$$(cat $$dir/built 2>/dev/null)" != "$$want" ]; then \
  echo "compiling llama.cpp (minutes, once)"; rm -rf $$dir; mkdir -p $$dir; \
  if ! command -v cmake c++ >$$dir/log; then echo "skipped: llama.cpp: cmake and c++ are needed" ; \
  elif { $(VENV)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $$dir \
      -r tests/clients/llama.cpp.archive && tar -xzf $$dir/*.tar.gz -C $$dir --strip-components 1 && \
    cmake -S $$dir/vendor/llama.cpp -B $$dir/build -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
      -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
      -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF -DGGML_OPENMP=OFF -DGGML_NATIVE=OFF -DBUILD_SHARED_LIBS=ON && \
    cmake --build $$dir/build --target llama --parallel 2; } >$$dir/log 2>&1; then echo "$$want" > $$dir/built; \
  else echo "skipped: llama.cpp: $$(tail -n 1 $$dir/log)"; fi; fi
endef
