"""`python -m spa` is `spa`."""

from spa.cli import main

if __name__ == "__main__":
    main()
