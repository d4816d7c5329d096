"""Ten small parsers of files from strangers. Each one runs in a compartment of its own.

The decorator is the whole integration: the functions are ordinary code on ordinary libraries, and
even careless code. `read_pickle` unpickles, `read_yaml` loads any tag, `read_xml` follows external
entities, `read_image` accepts any size. A compartment is what makes that survivable: it holds
the one open file that it was handed, and nothing else of this machine.

    with open("cat.jpg", "rb") as file:
        print(read_image(file))

What a library imports at its first use cannot be imported inside, where no path can be opened. What the
standard library imports late, codecs included, compart has ready; for the rest a policy says what to load before
the walls go up: `preload` names modules, and `warm` is called once. Where something was forgotten, the error names it.

`parser.__wrapped__` is the plain function, without a compartment around it.
"""

import hashlib
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import lxml.etree
import lxml.html
import numpy
import PIL.Image
import pypdf
import yaml

from compart import Policy, sandboxed

careful = Policy(timeout=5, memory="256M", open_files=16, result_bytes="16M")


# Pillow finds its decoders by importing a plug-in for each format; init() imports them all.
@sandboxed(careful, warm=PIL.Image.init)
def read_image(file: BinaryIO) -> dict[str, Any]:
    """JPEG, PNG, WebP and what else Pillow knows: the format, the size, and a digest of the pixels."""
    PIL.Image.MAX_IMAGE_PIXELS = None  # Pillow's own guard, off: the memory limit is the guard here
    with PIL.Image.open(file) as image:
        pixels = image.convert("RGB").tobytes()
        return {"format": image.format, "size": image.size, "sha256": hashlib.sha256(pixels).hexdigest()}


# pypdf imports its decompression at the first stream that needs it.
@sandboxed(careful, preload=("pypdf.filters",))
def read_pdf(file: BinaryIO) -> dict[str, Any]:
    """PDF: its title and the text of each page."""
    document = pypdf.PdfReader(file)
    title = document.metadata.title if document.metadata else None
    return {"title": title and str(title), "pages": [page.extract_text() for page in document.pages]}


@sandboxed(careful)
def read_html(file: BinaryIO) -> dict[str, Any]:
    """HTML: the title, the visible text, and where the links lead."""
    page = lxml.html.parse(file).getroot()
    text = " ".join(page.itertext())
    links = [(str(link.text_content()), link.get("href")) for link in page.iter("a")]
    return {"title": page.findtext(".//title"), "text": " ".join(text.split()), "links": links}


@sandboxed(careful)
def read_xml(file: BinaryIO) -> tuple[Any, ...]:
    """XML: the tree, as nested (tag, attributes, text, children). Entities are followed wherever they point."""
    parser = lxml.etree.XMLParser(load_dtd=True, resolve_entities=True, no_network=False, remove_comments=True)

    def plain(element: Any) -> tuple[Any, ...]:
        text = (element.text or "").strip()
        return (element.tag, dict(element.attrib), text, [plain(child) for child in element])

    return plain(lxml.etree.parse(file, parser).getroot())


@sandboxed(careful)
def read_yaml(file: BinaryIO) -> Any:
    """YAML with every tag it can have, those that call functions included."""
    return yaml.unsafe_load(file)


@sandboxed(careful)
def read_zip(file: BinaryIO) -> dict[str, Any]:
    """Zip: the size and the digest of each member."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    return {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in members.items()}


@sandboxed(careful)
def read_tar(file: BinaryIO) -> dict[str, Any]:
    """Tar, packed in any way or not at all: the size and the digest of each regular member."""
    digests = {}
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            if member.isfile():
                data = archive.extractfile(member).read()
                digests[member.name] = (len(data), hashlib.sha256(data).hexdigest())
    return digests


# Called with a grant, unpack_tar.options(grants=[grant.directory(folder, "rw")]), for without one no folder is there.
@sandboxed(careful)
def unpack_tar(file: BinaryIO, folder: Path) -> list[str]:
    """Tar: write the regular members to a folder, wherever their names lead. Returns the names."""
    written = []
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            if member.isfile():
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
                written.append(member.name)
    return written


# A pickle imports what it names: have ready what honest ones name.
@sandboxed(careful, preload=("datetime", "decimal"))
def read_pickle(file: BinaryIO) -> Any:
    """A pickle. It runs whatever it says, in there."""
    return pickle.load(file)


# The annotation names the type, so a NumPy array arrives as one; its data is not copied through a pipe.
@sandboxed(careful)
def read_npy(file: BinaryIO) -> numpy.ndarray:
    """One NumPy array."""
    return numpy.load(file, allow_pickle=True)
