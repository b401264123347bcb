"""Routing: how a model uses its experts, and what they are worth.

Owns: the analysis behind `moequant routing`.
Leaves out: the forward pass (`calibrate.forward`), and printing (`tables.routing`). Nothing is
imported here: `options` must be cheap to import, since `--help` shows its defaults.
"""
