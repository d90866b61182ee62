"""Sizes of grids and blocks. Triton's own functions are made for kernels too: 3 microseconds of the host a call."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is not below n > 0."""
    return 1 << (n - 1).bit_length()
