"""Tiny stand-ins: real diffusers pipelines of every family with random weights, made offline in a second.

For the examples' `--tiny`, for tests, and for whoever writes a pipeline and wants to see it divided.
"""

from asyncdiff.tiny.registry import TINY_PIPELINES, TinyCall, TinyPipeline, generate, tiny_pipeline

__all__ = ["TINY_PIPELINES", "TinyCall", "TinyPipeline", "generate", "tiny_pipeline"]
