# Joey: the few commands a person needs. Each may be run again at any time, also after an interruption.
#
# State of the demo lives in .run/ (its registry, its logs) and in DATA; tools fetched for it live in .tools/.

DATA     ?= /var/lib/joey
RELEASE  := target/release
PACKAGES := mold gcc libc6-dev binutils nftables iproute2 e2fsprogs skopeo umoci curl ca-certificates
export DATA

.PHONY: help run down test bench bench-classes crash test-kubernetes check build packages clean

help: ## What can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

run: build ## Start everything, run one Pod and show it
	@scripts/run.sh

down: ## End the demo: every Pod, joey and its registry
	@scripts/down.sh

test: build ## Every test: house checks, formatting, lints, units, the whole system, a real Kubernetes
	@scripts/test.sh

test-kubernetes: build ## Joey's virtual node on a real Kubernetes control plane (needs Go; skipped without)
	@scripts/test-kubernetes.sh

bench: build ## Start times and memory, beside containerd with runc; results go to benches/results/
	@scripts/bench.sh

bench-classes: build ## Start times, first answers and memory of each sandbox class; results go to benches/results/
	@scripts/bench-classes.sh

crash: build ## Random rounds of killing joey and agents while Pods come and go: ROUNDS of them, 500 unless said
	@scripts/crash.sh

check: packages ## Formatting, lints and house checks alone
	@scripts/check.sh

build: packages ## joey and its static agent, optimised
	@scripts/build.sh

packages: ## Debian packages for building and running
	@scripts/packages.sh $(PACKAGES)

clean: down ## Remove what was built and fetched
	rm -rf target .run .tools tests/kubernetes/bin
