"""Data sets: those of the catalog and the user's own, as uint8 images with labels, statistics and a digest."""

from ncfm_core.datasets.dataset import Dataset, Images
from ncfm_core.datasets.loading import DEFAULT_MEMORY_BYTES, load_dataset

__all__ = ["DEFAULT_MEMORY_BYTES", "Dataset", "Images", "load_dataset"]
