"""The command line: LightningCLI and the commands, without logic of their own."""
