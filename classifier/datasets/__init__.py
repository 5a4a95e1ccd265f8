"""Data sets: finding, downloading, verifying, decoding and splitting them."""
