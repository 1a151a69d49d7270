#!/bin/sh
# The acceptance of a GPU, 8 minutes: does it compute the same, and how fast? Each result is written as it comes.
#     sh tests/gpu/acceptance.sh acceptance.txt                          (ACCEPTANCE_DEVICE=cpu tries it without a GPU)
cd "$(dirname "$0")/../.." || exit
out=${1:?name a file for the results}
size=--short
[ "$ACCEPTANCE_DEVICE" = cpu ] && size=--tiny
{
    python -m pytest -m gpu -v -n 0 -p no:cacheprovider tests/gpu || echo "FAILED: the figures below are of a GPU that computes wrongly"
    python -m tests.benchmarks.gpu $size --trace "$out.trace.json"
} 2>&1 | tee "$out"
