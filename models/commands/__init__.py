"""The commands, a file each: HELP, add_arguments(parser), run(options)."""
