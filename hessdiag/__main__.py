"""`python -m hessdiag`, which is how torchrun starts it."""

from hessdiag.cli import main

if __name__ == "__main__":
    main()
