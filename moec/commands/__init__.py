"""The commands of the command line, one file each; each file's ``command`` is the click command."""
