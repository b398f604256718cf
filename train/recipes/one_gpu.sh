#!/bin/sh
# Trains on one GPU. From the root of the repository:
#
#     train/recipes/one_gpu.sh configs/tiny/eagle_cpu.py [--set a.b=c ...]
#
# After SIGTERM (exit status 143) and Ctrl-C (130) the current step is saved, and the same command
# resumes from there. After a crash it resumes from the last checkpoint.

# Training takes every GPU it sees: on a node with several, choose one.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

exec python -m eagle_jax.train --config "$@"
