"""Named base images: the store they are kept in, and the recipes that build them."""

from pytest_vmbottle.images.builder import build, can_build
from pytest_vmbottle.images.disk import disk_format
from pytest_vmbottle.images.recipes import RECIPES, Recipe
from pytest_vmbottle.images.store import Image, ImageStore, Traits, default_firmware

__all__ = ["RECIPES", "Image", "ImageStore", "Recipe", "Traits", "build", "can_build", "default_firmware", "disk_format"]
