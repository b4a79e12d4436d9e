"""This package holds the drop-in trainers; it is the only one that imports transformers' Trainer, TRL and PEFT."""
