"""Weights on disk: safetensors files, Hugging Face directories."""
