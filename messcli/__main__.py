"""`python -m messcli`: the command line where no script is installed."""

from messcli.cli import main

if __name__ == "__main__":
    main(prog_name="messcli")
