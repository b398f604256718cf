#!/bin/sh
# Answers a file of prompts on one GPU. From the root of the repository:
#
#     decode/recipes/one_gpu.sh --model MODEL --draft HEAD --input IN.jsonl --output OUT.jsonl
#
# One conversation a line; `python -m eagle_jax.decode --help` tells the options. Stopped at any
# moment, the same command goes on with the prompts that have no answer yet.

# One device decodes, but JAX reserves memory on every GPU it sees.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

exec python -m eagle_jax.decode "$@"
