#!/usr/bin/env bash
# Kills joey and agents at random while Pods are created and deleted, ROUNDS times (500 unless said; about 2 s each). A round that
# fails names its seed: JOEY_CRASH_SEED=N repeats it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:$HOME/.cargo/bin"

scripts/kubectl.sh >/dev/null
scripts/debian-files.sh .tools/docker-registry docker-registry
demo/build.sh .run/demo
JOEY_CRASH_ROUNDS=${ROUNDS:-500} cargo test --release --locked -p joey-tests --test crash -- --nocapture random_rounds
