"""Named base images: the store they are kept in, the recipes that build them, and the places they are pulled from."""

from pytest_vmbottle.images.builder import build, can_build
from pytest_vmbottle.images.cloud import CLOUD_IMAGES, CloudImage
from pytest_vmbottle.images.disk import disk_format
from pytest_vmbottle.images.puller import PULL_SECONDS, PullOptions, pull, pull_url, pulled_name
from pytest_vmbottle.images.recipes import RECIPES, Recipe
from pytest_vmbottle.images.store import Image, ImageStore, Traits, default_firmware

__all__ = [
    "CLOUD_IMAGES",
    "PULL_SECONDS",
    "RECIPES",
    "CloudImage",
    "Image",
    "ImageStore",
    "PullOptions",
    "Recipe",
    "Traits",
    "build",
    "can_build",
    "default_firmware",
    "disk_format",
    "pull",
    "pull_url",
    "pulled_name",
]
