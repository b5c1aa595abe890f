"""The command line: one file a command, flags made from the settings, failures as messages and exit codes."""
