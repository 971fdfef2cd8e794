"""Bytes in, bytes out: the codecs, the planes and the sums. Knows no file, no tensor name and no GPU."""
