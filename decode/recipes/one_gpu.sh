#!/bin/sh
# Answers a file of prompts on one GPU. From the root of the repository:
#
#     decode/recipes/one_gpu.sh --model MODEL --draft HEAD --input IN.jsonl --output OUT.jsonl
#
# Each line is one conversation; `eagle-jax answers --help` lists the options. If it was stopped,
# the same command continues with the prompts that have no answer yet.

# One device decodes, but JAX reserves memory on every GPU it sees.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

exec python -m eagle_jax.decode "$@"
