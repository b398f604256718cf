"""Decoding methods that need no trained draft of their own, one file each."""
