.PHONY: demo test check docs setup

demo: ## Train a small mixture-of-experts model on the CPU
	@scripts/demo

test: ## Format, lint, types, layering, tests
	@scripts/test

check: ## Format, lint, types, layering
	@scripts/check

docs: ## Build the documentation into site/
	@scripts/docs

setup: ## Create .venv from constraints.txt
	@scripts/setup
