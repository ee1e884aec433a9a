"""Which edits of one run share a pass of the growing batch."""

from collections.abc import Sequence

from mechlens.models.edit import Edit

PASS_COST = 40
"""What one more pass costs, in tokens through all blocks: small products run slower than large ones (measured)."""


def edit_batches(edits: Sequence[Edit], length: int, read: int, n_layers: int, max_tokens: int) -> list[list[int]]:
    """Indices of the edits pass by pass, cut where late edits run too many tokens and passes are too many.

    Edits at neighbouring positions go together: all rows of a pass begin at its first edited token, so a row edited
    later repeats the tokens in between. A pass holds at most `max_tokens` tokens above its last edited layer.
    """
    by_position: dict[int, list[int]] = {}
    for i in sorted(range(len(edits)), key=lambda i: -edits[i].position):
        by_position.setdefault(min(edits[i].position, read), []).append(i)
    pieces = [piece for at, group in by_position.items() for piece in _split(group, max_tokens // (length - at))]
    widths = [length - min(edits[piece[0]].position, read) for piece in pieces]
    depths = [sum(n_layers - edits[i].layer for i in piece) / n_layers for piece in pieces]
    best: list[tuple[float, int]] = [(0.0, 0)]  # for the first n pieces: least cost, and where their last pass starts
    for end, width in enumerate(widths, start=1):
        options, rows, depth = [], 0, 0.0
        for start in range(end - 1, -1, -1):
            rows, depth = rows + len(pieces[start]), depth + depths[start]
            if start < end - 1 and (rows + 1) * width > max_tokens:
                break
            options.append((best[start][0] + PASS_COST + width * (1 + depth), start))
        best.append(min(options))
    batches, end = [], len(pieces)
    while end:
        start = best[end][1]
        batches.append([i for piece in pieces[start:end] for i in piece])
        end = start
    return batches


def _split(group: list[int], rows: int) -> list[list[int]]:
    """The group in parts of at most `rows` edits beside the run itself, as even as can be."""
    n = -(-len(group) // max(rows - 1, 1))
    return [group[i * len(group) // n : (i + 1) * len(group) // n] for i in range(n)]
