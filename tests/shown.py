"""A result that is printed, or is a cell's value in a notebook, is a few lines that a reader takes in."""

MOST = 1500


def require_shown(*results: object) -> None:
    """Short, without numbers by the page, and in HTML without anything that a prompt or an answer could smuggle in."""
    for result in results:
        told = repr(result)
        assert 0 < len(told) < MOST, told
        assert told.count("\n") < 14, told
        assert "tensor(" not in told, told
        assert str(result) == told
        if hasattr(result, "_repr_html_"):
            page = result._repr_html_()
            assert "<table" in page
            assert "<script" not in page
            assert len(page) < 20 * MOST
