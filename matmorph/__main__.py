"""`python -m matmorph` = the command `matmorph`."""

from matmorph.cli.main import main

if __name__ == "__main__":
    main()
