"""Which images can be read: looked at on threads before a run, and remembered in `.cache/`.

    header   the file is an image of an accepted size: .03 ms each, 3 s for 100,000 photographs
    full     it is decoded as in training: 3 ms each on one core (photographs of .5 megapixels), so
             5 minutes for 100,000, divided by the cores, and once: a file that did not change since
             is not looked at again

A file that ends too early, as an interrupted download leaves it, has a good header.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
from common import BadInput, Progress, naming
from formats.files import PackedImage, image_identity, open_header, open_image

HOW = ("full", "header")
SEEN = "images-decoded.txt"  # in .cache/, a line for each image that was decoded
AT_A_TIME = 512


def unreadable(images, how):
    """{image: why} of those that cannot be read. how: "full" or "header"; None looks at none."""
    images = [image for image in dict.fromkeys(images) if image is not None]
    if how is None or not images:
        return {}
    for file in {image.file: image for image in images if isinstance(image, PackedImage)}.values():
        file.read()  # unpacks the file, which must not happen on several threads
    if how == "header":
        return {image: why for image, why in looked_at(images, header) if why}
    with processes.first_alone():
        return decoded(images)


def decoded(images):
    """`unreadable` by decoding. Only good images are remembered: another may be repaired."""
    memory = Path(".cache") / SEEN
    seen = set(memory.read_text(errors="replace").split()) if memory.is_file() else set()
    names = {image: identity(image) for image in images}
    new = [image for image in images if names[image] not in seen]
    if not new:
        return {}

    memory.parent.mkdir(exist_ok=True)
    bad, progress = {}, Progress("images decoded", len(new))
    for start in range(0, len(new), AT_A_TIME):
        part = looked_at(new[start : start + AT_A_TIME], open_image)
        bad |= {image: why for image, why in part if why}
        with naming(memory), open(memory, "a") as file:
            file.write("".join(f"{names[image]}\n" for image, why in part if not why))
        progress(start + len(part), f"{len(bad)} cannot be  ")
    return bad


def looked_at(images, look):
    """[(image, why it cannot be read or None)]; the threads pay because Pillow decodes beside."""

    def one(image):
        """Look at an image."""
        try:
            look(image)
        except BadInput as error:
            return image, str(error)
        return image, None

    mine = getattr(os, "sched_getaffinity", None)  # Linux alone knows what a process may use
    with ThreadPoolExecutor(len(mine(0)) if mine else os.cpu_count()) as pool:
        return [
            found
            for i in range(0, len(images), AT_A_TIME)
            for found in pool.map(one, images[i : i + AT_A_TIME])
        ]


def header(image):
    """Open an image without decoding it."""
    open_header(image).close()


def identity(image):
    """A hash of what makes an image another one: its file, that file's size and time, its place."""
    try:
        text = f"{image_identity(image)} {image!r}"
    except OSError:
        return ""  # the file is gone since it was found; decoding it says so
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
