#!/bin/sh
# Trains on a Cloud TPU slice: one process per host, the same script on all hosts at once. From your
# own machine:
#
#     gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="cd eagle-jax &&
#         train/recipes/tpu_slice.sh CONFIG --set fsdp=16"
#
# Before: the repository and `pip install -e '.[tpu,train]'` on every host, with `python` on PATH,
# and a file system that all hosts mount at the same place (Filestore, NFS) for the config's text,
# output_dir and data.cache_dir: each host writes its part of a checkpoint.
#
# --distributed: the hosts find each other through the TPU VM's metadata. A slice that is taken away
# ends with status 143 after saving, if there was a warning; the same command goes on from there, on
# a slice of another size too.
#
# fsdp: devices that share one copy of the weights; it must divide the slice's chips. v5litepod-16
# and v6e-16 have 16; v5p-16 has 8, since its name counts cores. (`python -m eagle_jax.aot` tells
# beforehand whether a model fits.)

exec python -m eagle_jax.train --distributed --set fsdp=8 --config "$@"
