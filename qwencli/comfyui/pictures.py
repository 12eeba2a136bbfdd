"""ComfyUI's pictures to what an engine takes, and back; no file on the way.

A picture of ComfyUI is a tensor [B, H, W, C] of floats from 0 to 1. torch is not imported: tensors
are read through numpy, and made by one that is there already.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.errors import InputError
from qwencli.messages import ImagePart, VideoPart

if TYPE_CHECKING:
    from PIL.Image import Image

# A tensor, whose module is torch's affair.
Tensor = Any
_CHANNELS = (1, 3, 4)
# What a video file may say beside what the node before has made of it, such as a part of it.
_SAME_LENGTH_S = 0.5


class Batch:
    """The pictures of one input, checked when it is made, converted one by one when they are asked
    for.

    Args:
        name: of the input, for errors.

    Raises:
        InputError: no picture is there, or values that are none.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        shape = tuple(getattr(tensor, "shape", ()))
        if len(shape) == 3:
            tensor, shape = tensor[None], (1, *shape)
        if len(shape) != 4:
            raise InputError(
                f"{name} is no batch of pictures: its shape is {list(shape)}",
                "connect an IMAGE output, [pictures, height, width, channels]",
            )
        if 0 in shape:
            raise InputError(
                f"{name} is empty: its shape is {list(shape)}",
                "look at the node in front of it: it gives no picture",
            )
        if shape[3] not in _CHANNELS:
            raise InputError(
                f"{name} has {shape[3]} channels",
                "connect an IMAGE with 1 (grey), 3 (RGB) or 4 (RGBA)",
            )
        is_floating = getattr(tensor, "is_floating_point", None)
        if is_floating is None or not is_floating():
            raise InputError(
                f"{name} holds {tensor.dtype}",
                "connect an IMAGE output: a tensor of floats from 0 to 1",
            )
        self.tensor, self.name = tensor.detach(), name
        for index in range(len(self)):
            if not math.isfinite(float(tensor[index].float().sum())):
                raise InputError(
                    f"{self.name_of(index)} has pixels that are no numbers (NaN or infinity)",
                    "look at the node in front of it: a decoder in float16 often makes them",
                )

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return int(self.tensor.shape[2]), int(self.tensor.shape[1])

    def name_of(self, index: int) -> str:
        return f"picture {index + 1} of {self.name}" if len(self) > 1 else self.name

    def image(self, index: int) -> Image:
        """Mode RGB; transparency is flattened on white, as that of files is."""
        import numpy as np
        from PIL import Image

        pixels = self.tensor[index].float().cpu().numpy()  # [H, W, C]
        levels = (np.clip(pixels, 0.0, 1.0) * 255.0).round().astype(np.uint8)
        if levels.shape[2] == 1:
            return Image.fromarray(levels[..., 0], "L").convert("RGB")
        if levels.shape[2] == 3:
            return Image.fromarray(levels, "RGB")
        rgba = Image.fromarray(levels, "RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")

    def part(self, index: int) -> ImagePart:
        return ImagePart(self.image(index), self.name_of(index))

    def as_video(self, fps: float, frames: int | None) -> VideoPart:
        """The pictures as the frames of one video.

        Args:
            frames: how many are looked at; see `engine.frontend.videos.open_video`.
        """
        from qwencli.engine.frontend.videos import chosen_frames

        duration_s = len(self) / fps
        chosen = chosen_frames(self.name, self.size, len(self), duration_s, frames)
        return VideoPart(
            tuple(self.image(index) for index in chosen),
            tuple(index / fps for index in chosen),
            duration_s,
            self.name,
        )

    def pictures_like(self, images: Sequence[Image]) -> Tensor:
        """RGB pictures of one size -> [B, H, W, 3] of floats from 0 to 1, on the host."""
        import numpy as np

        pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
        return self.tensor.cpu().float().new_tensor(pixels / 255.0)

    def masks_like(self, boxes: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """[x1, y1, x2, y2] of each picture -> [B, H, W]: 1 inside of any, else 0."""
        import numpy as np

        width, height = self.size
        masks = np.zeros((len(boxes), height, width), np.float32)
        for mask, found in zip(masks, boxes, strict=True):
            for left, top, right, bottom in found:
                mask[top:bottom, left:right] = 1.0
        return self.tensor.cpu().float().new_tensor(masks)


def video_part(video: Any, frames: int | None, name: str = "video") -> VideoPart:
    """A VIDEO of ComfyUI as an engine takes it.

    One that is a file is decoded here, and only the frames that are looked at: ComfyUI would make
    floats of all of them.

    Raises:
        InputError, MissingDependencyError: it is none, or cannot be decoded.
    """
    from qwencli.engine.frontend.videos import open_video, open_visual

    if not hasattr(video, "get_components"):
        raise InputError(f"{name} is no video", "connect a VIDEO output, as that of Load Video")
    if "get_stream_source" in vars(type(video)):
        source = video.get_stream_source()
        if isinstance(source, io.BytesIO):
            part = open_visual(source.getvalue(), frames, name=name)
        else:
            part = open_video(Path(str(source)), frames)
        if isinstance(part, VideoPart) and _is_whole(part, video):
            return part
    try:
        components = video.get_components()
        rate = float(components.frame_rate)
    except (ValueError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"{name} cannot be decoded: {why}", "look at the node in front of it"
        ) from error
    if not 0 < rate < math.inf:
        raise InputError(f"{name} has {rate} frames a second", "look at the node in front of it")
    return Batch(components.images, name).as_video(rate, frames)


def _is_whole(part: VideoPart, video: Any) -> bool:
    """Whether ComfyUI means the whole file; it can cut and crop videos without writing them anew,
    and says the size of a turned one as its file has it."""
    length, size = (getattr(video, name, None) for name in ("get_duration", "get_dimensions"))
    if length is not None and abs(float(length()) - part.duration_s) >= _SAME_LENGTH_S:
        return False
    return size is None or sorted(size()) == sorted(part.frames[0].size)
