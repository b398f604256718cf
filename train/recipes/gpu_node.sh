#!/bin/sh
# Trains on the eight GPUs of one node, in one process. From the root of the repository:
#
#     train/recipes/gpu_node.sh CONFIG [--set a.b=c ...]
#
# fsdp=8: each GPU stores an eighth of weights and optimizer state and has rows of its own, so
# data.batch_size must be a multiple of eight. For a target whose layers are too large for that,
# --set fsdp=2 --set tensor=4 cuts every matrix in four as well. What stands later on the command
# line wins.

exec python -m eagle_jax.train --set fsdp=8 --config "$@"
