"""The course as a program: its steps and their ledger, its lessons, and the runner that executes them."""
