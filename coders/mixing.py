"""mix: the bijection on 64-bit words that sums and record checks use (FORMAT.md, section 4).

The finaliser of splitmix64 (G. Steele, D. Lea and C. Flood, OOPSLA 2014).
"""

_M = (1 << 64) - 1
_INVERSE_2 = pow(0x94D049BB133111EB, -1, 1 << 64)
_INVERSE_1 = pow(0xBF58476D1CE4E5B9, -1, 1 << 64)


def mix(x: int) -> int:
    """Return the image of x, 0 <= x < 2**64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M
    return x ^ (x >> 31)


def unmix(y: int) -> int:
    """Return the x whose image is y."""
    y = ((y ^ (y >> 31) ^ (y >> 62)) * _INVERSE_2) & _M
    y = ((y ^ (y >> 27) ^ (y >> 54)) * _INVERSE_1) & _M
    return y ^ (y >> 30) ^ (y >> 60)
