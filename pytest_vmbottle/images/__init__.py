"""Named base images: their store, build recipes, downloads and a project's declarations."""

from pytest_vmbottle.images.builder import build, can_build, recipe_digest
from pytest_vmbottle.images.cloud import CLOUD_IMAGES, CloudImage
from pytest_vmbottle.images.declared import DeclaredImage, declared_images, find_declared_images
from pytest_vmbottle.images.disk_format import check_again, disk_format
from pytest_vmbottle.images.puller import PULL_SECONDS, PullOptions, pull, pull_url, pulled_name
from pytest_vmbottle.images.recipes import RECIPES, Recipe
from pytest_vmbottle.images.store import Image, ImageStore, Traits, default_firmware

__all__ = [
    "CLOUD_IMAGES",
    "PULL_SECONDS",
    "RECIPES",
    "CloudImage",
    "DeclaredImage",
    "Image",
    "ImageStore",
    "PullOptions",
    "Recipe",
    "Traits",
    "build",
    "can_build",
    "check_again",
    "declared_images",
    "default_firmware",
    "disk_format",
    "find_declared_images",
    "pull",
    "pull_url",
    "pulled_name",
    "recipe_digest",
]
