"""Command lines in, calls to the library out.

Takes arguments; gives results on stdout, logs on stderr and an exit code. One file per group of commands.
Read `command.py` first.
"""
