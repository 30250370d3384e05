"""`python -m autoaccum`."""

import sys

if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        sys.path.append(sys.path.pop(0))  # the current folder comes last: a json.py of the user's is not ours to run

    from autoaccum.cli import main

    main()
