# make run ARGS="--port 8001"    make test ARGS="-k sessions -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test lint format typecheck bench lock clean

help:
	@echo 'make run        serve on http://localhost:8000; ARGS="--port 8001" goes to chatd serve'
	@echo 'make test       lint, check types and test; ARGS="-k sessions" goes to pytest'
	@echo 'make lint       ruff check, ruff format --check'
	@echo 'make format     write the code as ruff does'
	@echo 'make typecheck  mypy'
	@echo 'make bench      measure chatd and what it is compared with; ARGS="--short" takes a minute'
	@echo 'make lock       write the constraints and package-lock.json anew'
	@echo 'make clean      remove what the others made; databases and .env stay'

run:
	@scripts/setup runtime && exec .venv/bin/chatd serve $(ARGS)

test:
	@scripts/setup dev && exec scripts/check $(ARGS)

lint:
	@scripts/setup dev && .venv/bin/ruff check && .venv/bin/ruff format --check

format:
	@scripts/setup dev && .venv/bin/ruff check --fix && .venv/bin/ruff format

typecheck:
	@scripts/setup dev && .venv/bin/mypy

bench:
	@scripts/setup bench $(ARGS) && exec .venv/bin/python -m bench $(ARGS)

lock:
	@scripts/lock

clean:
	rm -rf .venv .venv-gateway .venv-bench node_modules build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
