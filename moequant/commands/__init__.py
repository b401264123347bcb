"""The subcommands of `moequant`: each parses, calls one function, prints what came back."""
