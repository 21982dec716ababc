"""Where training images, captions and their caches come from."""
