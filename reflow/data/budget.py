"""How many pixels are decoded at once, whatever the number of threads."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

from PIL import Image

# As many as the largest image that Pillow takes: it is decoded alone, small ones side by side.
PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**28 // 3)
LARGE = 2**24  # pixels of an image whose memory is given back to the system


def trim() -> None:
    """Give what is free back to the system. glibc keeps it otherwise, for each thread as much as its largest image took."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Budget:
    """Pixels that threads take and give back. Who asks first is served first, so that a large image is not put off for ever."""

    def __init__(self, pixels: int = PIXELS) -> None:
        self.total = self.free = pixels
        self.asked = self.served = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Hold so many pixels, at most all of them; waits until they are free."""
        pixels = min(pixels, self.total)
        with self.changed:
            turn, self.asked = self.asked, self.asked + 1
            self.changed.wait_for(lambda: self.served == turn and self.free >= pixels)
            self.served, self.free = self.served + 1, self.free - pixels
            self.changed.notify_all()
        try:
            yield
        finally:
            if pixels > LARGE:
                trim()
            with self.changed:
                self.free += pixels
                self.changed.notify_all()
