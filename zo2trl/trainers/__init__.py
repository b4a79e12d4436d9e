"""Drop-in trainers: the only room that imports transformers' Trainer, TRL and PEFT."""
