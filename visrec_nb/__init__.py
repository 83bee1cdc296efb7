"Jupyter-first image and video classification, recommendation, and reproducible reports."

__version__ = "0.1.0"
