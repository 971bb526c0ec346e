"""`python -m regrow` is the command `regrow`."""

from regrow.launch.train import main

if __name__ == "__main__":
    main()
