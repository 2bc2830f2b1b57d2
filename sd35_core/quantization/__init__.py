"""Models made smaller: `python -m sd35_core.quantization`."""
