"""The benchmark of advdl_ops: ``python -m benchmarks`` in a checkout, ``advdl-bench`` once installed.

See benchmarks/README.md. A new op family needs only one file in ``cases/``.
"""
