"""This package holds the arguments of the trainers, and decides about every argument of the upstream configs."""
