"""The `shoal` command. One file per command: `<name>.py` holds a function `command`.

main.py     the console script and its exit codes; app.py: the application, finds the commands
options.py  options that several commands share
console.py  tables, JSON Lines, errors; listing.py: the table of `list`
progress.py bars, or plain lines where no terminal is

Commands import the lab inside their functions, so that `shoal list` and `--help` need no torch.
"""
