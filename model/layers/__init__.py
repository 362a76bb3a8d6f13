"""The kinds of layers that a block may have: one file each."""
