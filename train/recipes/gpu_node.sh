#!/bin/sh
# Trains on the eight GPUs of one node, in one process. From the root of the repository:
#
#     train/recipes/gpu_node.sh CONFIG [--set a.b=c ...]
#
# fsdp=8: each GPU stores an eighth of weights and optimizer state and processes its own rows, so
# data.batch_size must be a multiple of eight. If a layer of the target is too large for that,
# --set fsdp=2 --set tensor=4 also splits every matrix in four. Later options override earlier ones.

exec python -m eagle_jax.train --set fsdp=8 --config "$@"
