"""Image classification: fine-tune the trailing layers of a network in little memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from classification.backbones import build_model

__all__ = ["build_model"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: a sweep that is only listed does without."""
    if name != "build_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from classification.backbones import build_model

    return build_model
