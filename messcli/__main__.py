"""`python -m messcli`, and what the installed `messcli` runs: the command line."""

import os


def run() -> None:
    """Run the command line of this process. Ctrl-C is one line even while modules are imported."""
    try:
        from messcli.cli import main
    except KeyboardInterrupt:
        os.write(2, b"stopped at once; run the same command again to go on\n")
        os._exit(130)
    main(prog_name="messcli")


if __name__ == "__main__":
    run()
