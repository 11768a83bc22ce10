"""The entry point of a spawned worker: `python -m asyncdiff.worker`."""
