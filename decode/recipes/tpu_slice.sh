#!/bin/sh
# Answers a file of prompts on a Cloud TPU slice: one process per host, the same script on all hosts
# at once. From your own machine:
#
#     gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="cd eagle-jax &&
#         decode/recipes/tpu_slice.sh --model MODEL --draft HEAD --input IN.jsonl
#         --output OUT.jsonl"
#
# Hosts are prepared as train/recipes/tpu_slice.sh says; model, prompts and answers lie on the file
# system that they share. The first host writes the answers.
#
# tensor: chips that share the weights; it divides the slice's chips and the model's heads (keys and
# values too). Groups of so many share the rows of a batch.

exec python -m eagle_jax.decode --distributed --tensor 8 "$@"
