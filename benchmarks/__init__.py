"""The benchmark of advdl_ops: ``python -m benchmarks`` in a checkout, ``advdl-bench`` once installed.

docs: benchmarks/README.md. A new op family adds one file under ``cases/``; nothing else changes.
"""
