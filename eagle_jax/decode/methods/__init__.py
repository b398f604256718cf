"""Decoding methods that do not belong to a single drafter, one file each."""
