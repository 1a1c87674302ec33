"""The package installed as users install it, on each Python and with each set of versions that it supports."""
