"""A matplotlib figure that notebooks show without `%matplotlib inline`.

Imported by the first plot, since matplotlib is slow to import.
"""

from __future__ import annotations

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A figure without pyplot, so that no global state of matplotlib changes."""

    def _repr_png_(self) -> bytes:
        """The picture, for IPython."""
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
