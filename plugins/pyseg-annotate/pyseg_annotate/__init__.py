"""Annotation that stops when it is good enough (Sameki et al., CVPR-W 2016), and what surrounds it.

START with `engine`, the loop. `tasks` says what is annotated, `annotators` by whom, `quality` how
good a mask is without knowing the truth, `ledger` what is on disk, `consensus` and `policies` what
it is compared with.
"""
