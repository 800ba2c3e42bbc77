# The commands that people need; `make` lists them.
.PHONY: help setup quickstart test docs report
help:
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | column -t -s '|'
setup:  ## make .venv with every pinned package
	@bash scripts/setup.sh
quickstart:  ## the main job on real images, then a report: about 6 minutes
	@bash scripts/quickstart.sh
test:  ## lint, types, shell scripts, docs, all tests
	@bash scripts/test.sh
docs: setup  ## these pages as a site, in site/
	@$${VENV:-.venv}/bin/python -m mkdocs build --strict
report: setup  ## tables, plots and one page from runs/
	@$${VENV:-.venv}/bin/python -m report
