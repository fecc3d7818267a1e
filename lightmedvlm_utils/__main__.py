"""`python -m lightmedvlm_utils` is the same as `lightmedvlm`."""

from lightmedvlm_utils.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
