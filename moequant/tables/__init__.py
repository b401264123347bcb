"""Results as tables for a terminal and as data for `--json`; one module per group of commands."""
