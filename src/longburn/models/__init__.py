"""Model families built from the library's blocks, and how to load them."""

from longburn.models.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
