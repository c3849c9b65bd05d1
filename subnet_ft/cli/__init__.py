"""The `subnet-ft` command: one file a subcommand, no logic of its own."""
