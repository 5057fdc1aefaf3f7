"""Turns a frozen backbone and a trained δ-mem adapter into a bundle that `deltamem_rt` runs.

Nothing is imported here, so that `deltamem_export.adapter` can be read without ONNX and
`deltamem_export.graft` without transformers. The version is `importlib.metadata.version("deltamem-export")`.
"""
