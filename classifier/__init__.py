"""The software around image_classification.py: everything but the story of learning itself."""

__version__ = "0.12.0"
