"""Real libraries give the right result in a compartment that was granted nothing, and never a wrong one in silence.

Each workload runs three times: in this process, where the plain function ran before; in a fresh interpreter with what its
policy loads before the walls go up, where the result must be right; and in a fresh interpreter with nothing loaded, where it
must be right or a ViolationError, whatever the library made of the refusals.
"""

import inspect
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compart import CompartmentDied, CompartmentTimeout, MemoryLimitError, RemoteError, ViolationError, sandboxed

ROOT = Path(__file__).parents[2]


# ---- the workloads: each imports what it uses itself, and gives a plain value -----------------------------------------------


@dataclass
class Workload:
    """One piece of work: a function that needs nothing but its imports, its input, and what is loaded before."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    preload: tuple[str, ...] = ()
    warm: Callable[[], object] | None = None


def all_of_pillow():
    import PIL.Image

    PIL.Image.init()


def decodes_a_picture(data):
    import hashlib
    import io

    import PIL.Image

    with PIL.Image.open(io.BytesIO(data)) as image:
        frames = []
        for frame in range(getattr(image, "n_frames", 1)):
            image.seek(frame)
            frames.append(hashlib.sha256(image.convert("RGBA").tobytes()).hexdigest())
        return image.format, image.size, image.mode, frames, sorted(map(str, image.getexif().items()))


def picture(format: str, **options: Any) -> bytes:
    import PIL.Image

    across, down = PIL.Image.linear_gradient("L"), PIL.Image.linear_gradient("L").rotate(90)
    image = PIL.Image.merge("RGB", (across, down, PIL.Image.radial_gradient("L"))).resize((61, 47))
    written = io.BytesIO()
    if options.pop("frames", False):
        options |= {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    image.save(written, format, **options)
    return written.getvalue()


PICTURES = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {"quality": 90}),
    "jpeg_progressive": ("JPEG", {"progressive": True, "comment": "a comment"}),
    "jpeg2000": ("JPEG2000", {}),
    "tiff": ("TIFF", {}),
    "tiff_lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff_jpeg": ("TIFF", {"compression": "jpeg"}),
    "tiff_pages": ("TIFF", {"frames": True}),
    "gif_animated": ("GIF", {"frames": True}),
    "webp": ("WEBP", {"lossless": True}),
    "webp_animated": ("WEBP", {"frames": True}),
    "bmp": ("BMP", {}),
    "ico": ("ICO", {}),
    "ppm": ("PPM", {}),
    "pcx": ("PCX", {}),
    "tga": ("TGA", {"compression": "tga_rle"}),
    "sgi": ("SGI", {}),
    "dds": ("DDS", {}),
    "png_optimized": ("PNG", {"optimize": True}),
}


def parses_xml(data):
    import lxml.etree

    root = lxml.etree.fromstring(data)
    return root.getroottree().docinfo.encoding, [(child.tag, dict(child.attrib), child.text) for child in root.iter()]


def xml_in(encoding: str) -> bytes:
    word = {"koi8-r": "кофе", "shift_jis": "珈琲", "iso-8859-1": "café", "utf-16": "𝔘 ☕", "windows-1251": "чай"}[
        encoding
    ]
    text = f'<?xml version="1.0" encoding="{encoding}"?><orders><order id="1">{word}</order><order>x</order></orders>'
    return text.encode(encoding)


def parses_html(data):
    import lxml.html

    page = lxml.html.fromstring(data)
    links = [(link.get("href"), link.text_content()) for link in page.iter("a")]
    return page.findtext(".//title"), links, lxml.html.tostring(page, encoding="unicode")


def transforms_xml(data):
    import lxml.etree

    sheet = lxml.etree.XSLT(
        lxml.etree.XML(
            '<xsl:stylesheet version="1.0" xmlns:xsl="http://www.w3.org/1999/XSL/Transform"><xsl:template match="/">'
            '<out><xsl:for-each select="//order"><xsl:sort select="." order="descending"/><o><xsl:value-of select="."/></o>'
            "</xsl:for-each></out></xsl:template></xsl:stylesheet>"
        )
    )
    return str(sheet(lxml.etree.fromstring(data)))


def validates_xml(data):
    import lxml.etree

    schema = lxml.etree.RelaxNG(
        lxml.etree.XML(
            '<element name="orders" xmlns="http://relaxng.org/ns/structure/1.0"><oneOrMore><element name="order">'
            '<optional><attribute name="id"/></optional><text/></element></oneOrMore></element>'
        )
    )
    return schema.validate(lxml.etree.fromstring(data)), lxml.etree.fromstring(data).xpath("count(//order)")


def reads_a_pdf(data):
    import io

    import pypdf

    document = pypdf.PdfReader(io.BytesIO(data))
    return [page.extract_text() for page in document.pages], str(document.metadata.title)


def a_pdf(*, filters: str = "Flate", encoding: str = "/WinAnsiEncoding", unicode: bool = False) -> bytes:
    import pypdf
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    document = pypdf.PdfWriter()
    document.add_metadata({"/Title": "Три страницы"})
    kind = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica", "/Encoding": encoding}
    font = DictionaryObject({NameObject(key): NameObject(value) for key, value in kind.items()})
    if unicode:
        table = DecodedStreamObject()
        table.set_data(
            b"/CIDInit /ProcSet findresource begin begincmap 1 begincodespacerange <00> <FF> endcodespacerange\n"
            b"1 beginbfrange <61> <7A> <0430> endbfrange endcmap"
        )
        font[NameObject("/ToUnicode")] = document._add_object(table)
    for number in ("one", "two"):
        page = document.add_blank_page(width=595, height=842)
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        text = DecodedStreamObject()
        drawn = b"BT /F1 24 Tf 72 760 Td (page %s \\351) Tj ET" % number.encode()
        if filters == "ASCIIHex":
            text[NameObject("/Filter")] = NameObject("/ASCIIHexDecode")
            text.set_data(drawn.hex().encode() + b">")
        else:
            text.set_data(drawn)
            text = text.flate_encode()
        page[NameObject("/Contents")] = document._add_object(text)
    written = io.BytesIO()
    document.write(written)
    return written.getvalue()


def loads_yaml(data):
    import yaml

    return yaml.safe_load(data), yaml.safe_dump(yaml.safe_load(data)), [str(token) for token in yaml.scan(data)]


YAML = "a: [1, 2.5, yes, ~, 2020-02-29, 0x1f]\nb: &x {c: 'ключ', d: !!binary AAEC}\ne: *x\nf: |\n  text\n  more\n"


def unpickles(data):
    import pickle

    return pickle.loads(data)


def benign() -> bytes:
    import datetime
    import decimal
    import fractions
    import uuid

    zone = datetime.timezone(datetime.timedelta(hours=9))
    when = datetime.datetime(2024, 2, 29, 12, tzinfo=zone)
    values = [when, decimal.Decimal("1.50"), uuid.UUID(int=7), {1, 2}, datetime.timedelta(days=1)]
    assert fractions
    return pickle.dumps(values)


def reads_a_zip(data):
    import hashlib
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, info.date_time, archive.read(info)) for info in archive.infolist()]
        return [(name, date, hashlib.sha256(content).hexdigest()) for name, date, content in members]


def a_zip(packing: int) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", packing) as archive:
        archive.writestr("plain.txt", b"plain " * 1000)
        archive.writestr("grüße/名前.txt", bytes(range(256)) * 50)
    return written.getvalue()


def a_zip_of_an_old_system() -> bytes:
    """Names in cp437, as DOS wrote them: the flag for UTF-8 is off."""
    name = "gr\x81\xe1e.txt".encode("latin-1")
    content = b"content"
    check = zlib.crc32(content)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, check, len(content), len(content), len(name), 0)
    entry = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, check, len(content), len(content), len(name), 0, 0, 0, 0, 0, 0
    )
    start = len(local) + len(name) + len(content)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry) + len(name), start, 0)
    return local + name + content + entry + name + end


def reads_a_tar(data):
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [
            (member.name, member.size, member.uname, archive.extractfile(member).read() if member.isfile() else None)
            for member in archive
        ]


def a_tar(how: str) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=how) as archive:
        for name, content in (("plain.txt", b"plain " * 100), ("grüße/名前.txt", bytes(range(256)))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.uname = "somebody"
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def loads_an_array(data):
    import io

    import numpy

    array = numpy.load(io.BytesIO(data), allow_pickle=False)
    return array.shape, str(array.dtype), array.tolist(), float(array.mean())


def an_array() -> bytes:
    import numpy

    written = io.BytesIO()
    numpy.save(written, numpy.arange(24, dtype="f4").reshape(2, 3, 4))
    return written.getvalue()


def multiplies_and_decomposes(size):
    import numpy

    matrix = numpy.arange(size * size, dtype=float).reshape(size, size) % 7 + numpy.eye(size)
    product = matrix @ matrix
    singular = numpy.linalg.svd(matrix, compute_uv=False)
    return float(product.sum()), [round(float(value), 6) for value in singular[:5]]


def transforms_and_draws_numbers(size):
    import numpy

    wave = numpy.sin(numpy.arange(size) / 7)
    spectrum = numpy.abs(numpy.fft.rfft(wave))
    drawn = numpy.random.default_rng(5).normal(size=3)
    roots = numpy.polynomial.Polynomial([6, -5, 1]).roots()
    return int(spectrum.argmax()), [round(float(x), 9) for x in drawn], sorted(round(float(x), 6) for x in roots)


def reads_csv_and_json(text):
    import csv
    import io
    import json

    rows = list(csv.DictReader(io.StringIO(text)))
    dialect = csv.Sniffer().sniff(text)
    return rows, dialect.delimiter, json.loads(json.dumps(rows)), json.dumps({"π": 1.5, "n": None}, indent=1)


def asks_sqlite(rows):
    import sqlite3

    with sqlite3.connect(":memory:") as base:
        base.execute("create table t (name text, n real)")
        base.executemany("insert into t values (?, ?)", rows)
        answer = base.execute("select name, sum(n), upper(name) from t group by name order by 2 desc").fetchall()
    base.close()
    return answer


def reads_xml_and_html_of_the_library(text):
    import html
    import html.parser
    import xml.dom.minidom
    import xml.etree.ElementTree
    import xml.sax.saxutils

    class Links(html.parser.HTMLParser):
        found = ()

        def handle_starttag(self, tag, attrs):
            self.found += (tag, *attrs)

    links = Links()
    links.feed("<p>&eacute;<a href='x&amp;y'>z</a>")
    root = xml.etree.ElementTree.fromstring(text)
    dom = xml.dom.minidom.parseString(text.encode())
    return (
        [(child.tag, child.text) for child in root.iter()],
        dom.documentElement.tagName,
        html.unescape("&Aacute;&#233;&notit;"),
        xml.sax.saxutils.escape("<&>"),
        links.found,
    )


def reads_mail(data):
    import email
    import email.policy

    message = email.message_from_bytes(data, policy=email.policy.default)
    body = message.get_body(preferencelist=("plain", "html"))
    return (
        str(message["subject"]),
        [(address.display_name, address.addr_spec) for address in message["to"].addresses],
        message["date"].datetime.isoformat(),
        body.get_content(),
        [(part.get_filename(), part.get_content()) for part in message.iter_attachments()],
    )


MAIL = (
    b"From: a@example.org\r\nTo: =?iso-8859-2?q?Ji=F8=ED?= <jiri@example.org>, b@example.org\r\n"
    b"Subject: =?koi8-r?b?8NLJ18XU?= =?shift_jis?b?k/qWew==?=\r\nDate: Thu, 29 Feb 2024 12:00:00 +0900\r\nMIME-Version: 1.0\r\n"
    b'Content-Type: multipart/mixed; boundary="b"\r\n\r\n'
    b"--b\r\nContent-Type: text/plain; charset=windows-1252\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=93caf=E9=94\r\n"
    b"--b\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n"
    b"Content-Disposition: attachment; filename*=utf-8''na%C3%AFve.bin\r\n\r\nAAEC\r\n--b--\r\n"
)


def matches_and_compresses(text):
    import bz2
    import gzip
    import hashlib
    import lzma
    import re
    import zlib

    data = text.encode()
    packed = [module.compress(data) for module in (bz2, gzip, lzma, zlib)]
    unpacked = [module.decompress(item) for module, item in zip((bz2, gzip, lzma, zlib), packed, strict=True)]
    digests = [hashlib.new(name, data).hexdigest() for name in ("sha256", "blake2b", "sha3_256", "md5")]
    return unpacked, digests, re.findall(r"(?i)\b(\w)\w+\1\b", text), re.sub(r"\s+", " ", text)


CSV = 'name,n\nann,1\nbob,2\n"o\'neil, ted",3\n'
HTML = "<html><title>Grüße</title><body><p>See <a href='https://example.org'>the <b>manual</b></a><p>unclosed".encode()
TREE = "<a x='1'><b>é</b><c/>&lt;</a>"

WORKLOADS = {
    **{
        f"pillow_{name}": Workload(decodes_a_picture, (picture(format, **options),), warm=all_of_pillow)
        for name, (format, options) in PICTURES.items()
    },
    **{
        f"lxml_{encoding}": Workload(parses_xml, (xml_in(encoding),), preload=("lxml.etree",))
        for encoding in ("koi8-r", "shift_jis", "iso-8859-1", "utf-16", "windows-1251")
    },
    "lxml_html": Workload(parses_html, (HTML,), preload=("lxml.html",)),
    "lxml_xslt": Workload(transforms_xml, (xml_in("koi8-r"),), preload=("lxml.etree",)),
    "lxml_relaxng": Workload(validates_xml, (xml_in("koi8-r"),), preload=("lxml.etree",)),
    "pypdf": Workload(reads_a_pdf, (a_pdf(),), preload=("pypdf", "pypdf.filters")),
    "pypdf_hex": Workload(reads_a_pdf, (a_pdf(filters="ASCIIHex"),), preload=("pypdf", "pypdf.filters")),
    "pypdf_mac": Workload(reads_a_pdf, (a_pdf(encoding="/MacRomanEncoding"),), preload=("pypdf", "pypdf.filters")),
    "pypdf_cmap": Workload(reads_a_pdf, (a_pdf(unicode=True),), preload=("pypdf", "pypdf.filters")),
    "yaml": Workload(loads_yaml, (YAML,), preload=("yaml",)),
    "pickle": Workload(unpickles, (benign(),)),
    "zip": Workload(reads_a_zip, (a_zip(zipfile.ZIP_DEFLATED),)),
    "zip_lzma": Workload(reads_a_zip, (a_zip(zipfile.ZIP_LZMA),)),
    "zip_bzip2": Workload(reads_a_zip, (a_zip(zipfile.ZIP_BZIP2),)),
    "zip_cp437": Workload(reads_a_zip, (a_zip_of_an_old_system(),)),
    "tar_xz": Workload(reads_a_tar, (a_tar("w:xz"),)),
    "tar_gz": Workload(reads_a_tar, (a_tar("w:gz"),)),
    "tar_bz2": Workload(reads_a_tar, (a_tar("w:bz2"),)),
    "numpy_load": Workload(loads_an_array, (an_array(),), preload=("numpy",)),
    "numpy_linalg": Workload(multiplies_and_decomposes, (60,), preload=("numpy",)),
    "numpy_lazy": Workload(
        transforms_and_draws_numbers, (500,), preload=("numpy", "numpy.fft", "numpy.random", "numpy.polynomial")
    ),
    "csv_json": Workload(reads_csv_and_json, (CSV,)),
    "sqlite": Workload(asks_sqlite, ([("ann", 1.0), ("bob", 2.0), ("ann", 3.5)],)),
    "xml_html": Workload(
        reads_xml_and_html_of_the_library,
        (TREE,),
        preload=("html.parser", "xml.dom.expatbuilder", "xml.dom.minidom", "xml.sax.saxutils"),
    ),
    "mail": Workload(reads_mail, (MAIL,), preload=("email.policy",)),
    "re_compression": Workload(matches_and_compresses, ("Anna ate a radar ÄÖÜ " * 20,)),
}


def all_of_fonttools():
    import importlib
    import pkgutil

    import fontTools.ttLib.tables

    for module in pkgutil.iter_modules(fontTools.ttLib.tables.__path__):
        importlib.import_module(f"fontTools.ttLib.tables.{module.name}")


def reads_a_font(data):
    import io

    from fontTools.ttLib import TTFont

    font = TTFont(io.BytesIO(data))
    return {tag: type(font[tag]).__name__ for tag in font.keys()}  # noqa: SIM118


def a_font() -> bytes:
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 0))
    pen.lineTo((250, 700))
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "A"])
    builder.setupCharacterMap({65: "A"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "A": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (600, 0), "A": (600, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    written = io.BytesIO()
    builder.save(written)
    return written.getvalue()


def japanese_maps():
    import pdfminer.high_level
    from pdfminer.cmapdb import CMapDB

    assert pdfminer.high_level
    CMapDB.get_cmap("90ms-RKSJ-H")
    CMapDB.get_unicode_map("Adobe-Japan1")


def extracts_japanese(data):
    import io

    from pdfminer.high_level import extract_text

    return extract_text(io.BytesIO(data)).strip()


def a_japanese_pdf() -> bytes:
    """Text in Shift-JIS, in a font that every reader of Japanese has: its characters are found by a table of the reader."""
    drawn = b"BT /F1 24 Tf 50 200 Td <%s> Tj ET" % "あい".encode("shift_jis").hex().encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(drawn), drawn),
        b"<</Type/Font/Subtype/Type0/BaseFont/Ryumin-Light/Encoding/90ms-RKSJ-H/DescendantFonts[6 0 R]>>",
        b"<</Type/Font/Subtype/CIDFontType0/BaseFont/Ryumin-Light/FontDescriptor 7 0 R"
        b"/CIDSystemInfo<</Registry(Adobe)/Ordering(Japan1)/Supplement 2>>>>",
        b"<</Type/FontDescriptor/FontName/Ryumin-Light/Flags 4/FontBBox[0 0 1000 1000]/ItalicAngle 0/Ascent 800"
        b"/Descent -200/CapHeight 700/StemV 80>>",
    ]
    written, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(written))
        written += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"xref\n0 8\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    return written + table + b"trailer<</Size 8/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(written)


# ---- right or refused ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the plain functions give."""
    return {name: work.function(*work.args) for name, work in WORKLOADS.items()}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_result_is_the_same_as_outside(name: str, expected: dict[str, Any]) -> None:
    work = WORKLOADS[name]
    outcome = sandboxed(work.function, timeout=30, preload=work.preload, warm=work.warm).run(*work.args)
    assert outcome.value == expected[name]
    assert outcome.violations == ()


# Each workload in a fork of an interpreter that has loaded nothing but compart: how it ended, one line for each.
RUNNER = """
import os, pickle, sys, traceback
from compart import ViolationError, sandboxed

with open(sys.argv[1], "rb") as file:
    works, warmed, on_violation = pickle.load(file)
sandboxed(lambda: 0)()  # what compart itself loads before the first call is there for all
for name, (sources, args, preload, warm, expected) in works.items():
    space = {}
    for source in sources:
        exec(compile(source, "workload", "exec"), space)
    function = space[sources[-1].split("(")[0].split()[-1]]
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        continue
    options = {"timeout": 30, "on_violation": on_violation}
    if warmed:
        options |= {"preload": preload, "warm": space[warm] if warm else None}
    try:
        value = sandboxed(function, **options)(*args)
        said = "right" if value == expected else f"wrong: {value!r:.300}, not {expected!r:.300}"
    except ViolationError as error:
        said = f"refused: {error}"
    except BaseException as error:
        said = f"failed: {error!r}"
    print(name, said.replace(chr(10), " "), sep="\\t", flush=True)
    os._exit(0)
"""


def ran_fresh(
    directory: Path, works: dict[str, Workload], expected: dict[str, Any], *, warmed: bool, on_violation: str = "raise"
) -> dict[str, str]:
    packed = {}
    for name, work in works.items():
        functions = [function for function in (work.warm, work.function) if function]
        sources = [textwrap.dedent(inspect.getsource(function)) for function in functions]
        warm = work.warm.__name__ if work.warm else None
        packed[name] = (sources, work.args, work.preload, warm, expected[name])
    (directory / "works").write_bytes(pickle.dumps((packed, warmed, on_violation)))
    command = [sys.executable, "-c", RUNNER, str(directory / "works")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(line.split("\t", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory, expected: dict[str, Any]) -> dict[str, str]:
    return ran_fresh(tmp_path_factory.mktemp("warmed"), WORKLOADS, expected, warmed=True)


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory, expected: dict[str, Any]) -> dict[str, str]:
    return ran_fresh(tmp_path_factory.mktemp("cold"), WORKLOADS, expected, warmed=False)


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_its_policy_loads_is_enough_in_a_fresh_interpreter(name: str, warmed: dict[str, str]) -> None:
    assert warmed[name] == "right"


@pytest.mark.parametrize("name", WORKLOADS)
def test_with_nothing_loaded_it_is_right_or_refused(name: str, cold: dict[str, str]) -> None:
    assert cold[name].split(":")[0] in ("right", "refused"), cold[name]


def test_a_library_that_was_not_loaded_is_refused_with_the_remedy(cold: dict[str, str]) -> None:
    """The refusals of a cold run say what to load."""
    for name, module in (
        ("pillow_png", "PIL"),
        ("lxml_html", "lxml"),
        ("pypdf", "pypdf"),
        ("yaml", "yaml"),
        ("numpy_load", "numpy"),
    ):
        assert cold[name].startswith("refused")
        assert f"Policy(preload=['{module}" in cold[name]


# Libraries that make something else of a refusal, without a word. Only their main module is loaded before.
SILENT = {
    "fonttools": (reads_a_font, a_font, "fontTools.ttLib", all_of_fonttools, "DefaultTable"),
    "pdfminer": (extracts_japanese, a_japanese_pdf, "pdfminer.high_level", japanese_maps, "wrong"),
}


@pytest.mark.parametrize(("function", "make", "main", "warm", "wrong"), SILENT.values(), ids=SILENT)
def test_a_library_that_hides_refusals_is_right_or_refused(
    function: Any, make: Any, main: str, warm: Any, wrong: str, tmp_path: Path
) -> None:
    data = make()
    plain = {"it": function(data)}
    half = {"it": Workload(function, (data,), preload=(main,))}
    full = {"it": Workload(function, (data,), preload=(main,), warm=warm)}
    assert ran_fresh(tmp_path, full, plain, warmed=True) == {"it": "right"}
    assert ran_fresh(tmp_path, half, plain, warmed=True)["it"].startswith("refused")
    # What the violation saves from: a wrong result, and no error.
    hidden = ran_fresh(tmp_path, half, plain, warmed=True, on_violation="deny")["it"]
    assert hidden.startswith("wrong")
    assert wrong in hidden


# ---- attacks ----------------------------------------------------------------------------------------------------------------


def hostile_pickle(command: str) -> bytes:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (command,)

    return pickle.dumps(Hostile())


ATTACKS = {
    "pickle": (unpickles, lambda command: hostile_pickle(command)),
    "yaml": (
        lambda data: __import__("yaml").unsafe_load(data),
        lambda command: f"!!python/object/apply:os.system ['{command}']",
    ),
    "numpy": (
        lambda data: __import__("numpy").load(io.BytesIO(data), allow_pickle=True),
        lambda command: hostile_pickle(command),
    ),
}


@pytest.mark.parametrize(("load", "make"), ATTACKS.values(), ids=ATTACKS)
def test_a_file_that_runs_a_command_runs_none_and_is_told(load: Any, make: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    attack = make(f"touch {marker}")
    load(attack)
    assert marker.exists()
    marker.unlink()

    with pytest.raises(ViolationError) as caught:
        sandboxed(load)(attack)
    assert {violation.call for violation in caught.value.violations} & {"clone", "fork", "vfork", "execve"}
    # The library itself says nothing: its answer is the shell's.
    sandboxed(load, on_violation="deny")(attack)
    assert not marker.exists()


def test_an_external_entity_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    document = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret}">]><a>&x;</a>'.encode()

    def follows(data: bytes) -> str | None:
        import lxml.etree

        parser = lxml.etree.XMLParser(load_dtd=True, resolve_entities=True, no_network=False)
        return lxml.etree.fromstring(data, parser).text

    assert follows(document) == "the secret"
    with pytest.raises(ViolationError, match="secret"):
        sandboxed(follows)(document)
    with pytest.raises(RemoteError, match=r"XMLSyntaxError|failed to load"):
        sandboxed(follows, on_violation="deny")(document)


def test_a_bomb_meets_the_memory_limit() -> None:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(100 << 20))
    with pytest.raises(MemoryLimitError, match="memory=64 MiB"):
        sandboxed(reads_a_zip, memory="64M")(written.getvalue())


def test_an_expression_that_takes_for_ever_meets_the_limits() -> None:
    def matches(text: str) -> bool:
        import re

        return re.match(r"(a+)+$", text) is not None

    assert sandboxed(matches)("a" * 20) is True
    with pytest.raises(CompartmentTimeout):
        sandboxed(matches, timeout=0.2)("a" * 40 + "b")
    with pytest.raises(CompartmentDied, match="cpu="):
        sandboxed(matches, cpu=0.2)("a" * 40 + "b")


def test_native_code_that_crashes_is_a_death_and_the_host_goes_on() -> None:
    def crashes() -> bytes:
        import ctypes

        return ctypes.string_at(0)

    with pytest.raises(CompartmentDied, match="SIGSEGV") as caught:
        sandboxed(crashes)()
    assert caught.value.signal == signal.SIGSEGV
    assert "in crashes" in caught.value.stderr


# ---- threads of libraries -----------------------------------------------------------------------------------------------------

BLAS = """
import faulthandler, sys
import numpy
from compart import sandboxed
faulthandler.dump_traceback_later(50, exit=True)
def work(size):
    matrix = numpy.arange(size * size, dtype=float).reshape(size, size) % 7
    return float((matrix @ matrix).sum()), round(float(numpy.linalg.svd(matrix, compute_uv=False)[0]), 4)
expected = work(300)  # the library starts its threads here, and makes them again in a forked child
assert sandboxed(work, timeout=20)(300) == expected
assert sandboxed(work, timeout=20, memory="512M")(300) == expected
assert sandboxed(work, timeout=20, threads=8, waive={"listener"})(300) == expected
assert list(sandboxed(lambda: (yield work(300)), timeout=20)()) == [expected]
assert work(300) == expected
print("done")
"""


def test_blas_works_in_a_compartment_after_the_host_used_it() -> None:
    """OpenBLAS waits for ever where a forked child may not start threads."""
    done = subprocess.run([sys.executable, "-c", BLAS], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_an_executor_works_inside() -> None:
    def maps(numbers: list[int]) -> list[int]:
        import concurrent.futures

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda n: n * n, numbers))

    assert sandboxed(maps)([1, 2, 3]) == [1, 4, 9]


def test_an_event_loop_works_inside() -> None:
    async def main() -> list[int]:
        import asyncio

        queue: asyncio.Queue[int] = asyncio.Queue()
        await asyncio.gather(*(queue.put(n) for n in range(3)))
        value = await asyncio.to_thread(sum, [1, 2])
        await asyncio.sleep(0.001)
        return [queue.get_nowait(), queue.get_nowait(), value]

    assert sandboxed(main).run().value == [0, 1, 3]
