#!/bin/sh
# Trains on one GPU. From the root of the repository:
#
#     train/recipes/one_gpu.sh configs/tiny/eagle_cpu.py [--set a.b=c ...]
#
# Exit status 143 (SIGTERM) and 130 (Ctrl-C): the step in flight is saved, and the same command goes
# on from there. It does so after a crash as well, from the last checkpoint.

# Training takes every GPU it sees: on a node with several, choose one.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

exec python -m eagle_jax.train --config "$@"
