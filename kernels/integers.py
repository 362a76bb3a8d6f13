"""Whole-number arithmetic of block and tile sizes; needs neither torch nor Triton."""


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`; Triton's blocks have such sizes."""
    # Triton's own function takes longer on the host than a launch.
    return 1 << (value - 1).bit_length()


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up: how many tiles of a size cover a dimension."""
    return -(-dividend // divisor)
