"""What the parsers' tests hold every answer to."""

from tzip.formats.containers import Contents, check


def promises(contents: Contents, size: int) -> None:
    """It is as the interface says: proven by what proves it for `recognise`, and each name there once."""
    check(contents, size)
    names = [view.name for view in contents.tensors]
    assert len(set(names)) == len(names)
    for view in contents.tensors:
        view.name.encode()
        assert 0 <= view.begin <= size
