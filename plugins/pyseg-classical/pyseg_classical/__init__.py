"""Classical segmentation as models and refiners of pyseg.

Every method is a class in the module of its family: made with options, it is a model of
`pyseg.build`, and its ``regions`` or ``foreground`` takes an array. START with `regions`.
"""
