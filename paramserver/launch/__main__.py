"""`python -m paramserver.launch demo`: see `paramserver.launch.local`."""

from paramserver.launch.local import main

if __name__ == "__main__":
    main()
