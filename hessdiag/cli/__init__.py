"""The command line: one module per sub-command, with its arguments, its help, and the call that does the work."""


def main() -> None:
    """Entry point of the `hessdiag` script."""
    from hessdiag.cli.program import main as run

    run()
