#!/bin/sh
# Answers a file of prompts on a Cloud TPU slice: one process per host, the same script on all hosts
# at once. From your own machine:
#
#     gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="cd eagle-jax &&
#         decode/recipes/tpu_slice.sh --model MODEL --draft HEAD --input IN.jsonl
#         --output OUT.jsonl"
#
# Prepare the hosts as in train/recipes/tpu_slice.sh; model, prompts and answers are on the shared
# file system. The first host writes the answers.
#
# tensor: number of chips that split the weights; it must divide the slice's chips and the model's
# query and key/value heads. Groups of that many chips share the rows of a batch.

exec python -m eagle_jax.decode --distributed --tensor 8 "$@"
