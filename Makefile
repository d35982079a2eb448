# The two commands of the README are `make serve` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help setup serve demo-moe test test-unit check format docs dist lock dashboards clean
BIN := .venv/bin
CONFIG ?= deploy/config/demo.yaml

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Make the environment in .venv (GPU=1: for NVIDIA GPUs)
	@deploy/setup.sh

serve: setup ## Start the service with the demo's experts (CONFIG=… for others)
	@exec $(BIN)/coe serve --config $(CONFIG)

demo-moe: setup ## Join the demo's experts into one mixture of experts (deploy/config/demo-moe.yaml)
	@$(BIN)/coe models pull smollm2-135m-instruct
	@$(BIN)/coe moe upcycle --base smollm2-135m-instruct --experts math,intents,code --out .cache/demo-moe

test: setup ## Run every test, real engines included
	@deploy/test_tools.sh
	@deploy/clients.sh
	@$(BIN)/coe models pull smollm2-135m-instruct
	@$(BIN)/python -m pytest

test-unit: setup ## Run the tests that need no engine and no cluster
	@$(BIN)/python -m pytest tests/unit tests/property

check: setup ## Lint, types, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --config pyproject.toml

format: setup ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix --quiet .

docs: ## Build the documents into .cache/site, strictly
	@deploy/docs/build.sh

dist: setup ## Build the wheel and the source archive into dist
	@rm -rf dist build
	@$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" >/dev/null
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

lock: setup ## Resolve the dependencies anew into deploy/locks
	@$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r deploy/locks/tools/uv.txt
	@$(BIN)/uv pip compile pyproject.toml --extra cpu --extra gguf --extra encoder --extra dev --universal \
		--python-version 3.11 --generate-hashes --no-annotate --no-header --quiet \
		--output-file deploy/locks/cpu.txt
	@$(BIN)/uv pip compile pyproject.toml --extra cpu --extra gguf --extra encoder --python-version 3.11 \
		--python-platform linux --constraint deploy/locks/cpu.txt --generate-hashes \
		--no-annotate --no-header --quiet --output-file deploy/locks/image-cpu.txt
	@cd deploy/locks/gpu-project && $(CURDIR)/$(BIN)/uv pip compile $(CURDIR)/pyproject.toml --extra gpu \
		--extra gguf --extra encoder --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-header --quiet --output-file ../gpu.txt
	@$(BIN)/uv pip compile pyproject.toml --extra gpu --extra gguf --extra encoder --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --no-config --constraint deploy/locks/gpu.txt --generate-hashes \
		--no-annotate --no-header --quiet --output-file deploy/locks/image-gpu.txt

lock-tools: setup ## Resolve anew what only tests and installing use, into deploy/locks/tools
	@deploy/lock_tools.sh

notice: setup ## Write NOTICE from the locks and the packages' metadata
	@$(BIN)/python -m deploy.licence_notice

sbom: setup ## Write the images' bills of materials (CycloneDX) into dist
	@mkdir -p dist
	@$(BIN)/python -m deploy.sbom -o dist/sbom-cpu.cdx.json
	@$(BIN)/python -m deploy.sbom --gpu -o dist/sbom-gpu.cdx.json
	@ls dist/sbom-*

dashboards: setup ## Render the dashboards into deploy/grafana/dashboards
	@$(BIN)/python -m deploy.grafana.render_dashboards

clean: ## Remove the environment and caches
	@rm -rf .venv .cache dist build .mypy_cache .ruff_cache .pytest_cache *.egg-info
