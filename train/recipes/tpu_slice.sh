#!/bin/sh
# Trains on a Cloud TPU slice: one process per host, the same script on all hosts at once. From your
# own machine:
#
#     gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="cd eagle-jax &&
#         train/recipes/tpu_slice.sh CONFIG --set fsdp=16"
#
# Every host needs the repository, `pip install -e '.[tpu,train]'` and `python` on PATH. All hosts
# must mount one file system at the same place (Filestore, NFS) for the config's text, output_dir
# and data.cache_dir, since each host writes its part of a checkpoint.
#
# --distributed: the hosts find each other through the TPU VM's metadata. If a slice is preempted
# with a warning, the run saves and ends with status 143; the same command resumes from there, also
# on a slice of another size.
#
# fsdp: number of devices that split one copy of the weights; it must divide the slice's chips.
# v5litepod-16 and v6e-16 have 16; v5p-16 has 8, since its name counts cores. (`eagle-jax compile`
# tells beforehand whether a model fits.)

exec python -m eagle_jax.train --distributed --set fsdp=8 --config "$@"
