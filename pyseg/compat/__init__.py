"""Drop-in replacements for other libraries, on pyseg's kernels."""
