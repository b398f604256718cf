"""Continuous batching: requests come and go between two chunks of the loop."""
