"""`python -m qwencli`, and what the installed command starts."""

import os


def main() -> None:
    # Ctrl-C while modules are still imported is one as well, and nothing is begun yet.
    try:
        from qwencli.cli import main as command

        command()
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main()
