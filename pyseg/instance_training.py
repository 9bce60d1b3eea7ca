"""Where `train_instances` was; it lives in `pyseg.training`."""

from .training import train_instances as train_instances
