"""The command line: a module a command (or a family of them), beside the options that they share and the terminal that they talk to."""
