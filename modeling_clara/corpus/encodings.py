"""The encoding of a text file that does not say it."""

import codecs

MARKS = (  # the longer ones first: the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SAMPLE = 2**20  # bytes that an encoding is told from
# In the order in which they are taken where charset-normalizer finds several as likely, as in short texts.
LEGACY = (
    "cp1252", "gb18030", "shift_jis", "euc_jp", "euc_kr", "big5", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254",
    "cp1255", "cp1256", "cp874",
)  # fmt: skip
AS_LIKELY = 0.15  # of its coherence, which is the share of letters' pairs that a language has


def find_encoding(sample: bytes) -> str:
    """The name of the encoding of a text, of which `sample` is the beginning or all.

    A byte order mark decides, then whether it is valid UTF-8, then where zeros stand (UTF-16 without a mark), then
    charset-normalizer.

    Raises:
        ValueError: it is no text.
    """
    for mark, name in MARKS:
        if sample.startswith(mark):
            return name
    if b"\0" not in sample:
        try:
            # the last character of a longer text may be cut
            codecs.getincrementaldecoder("utf-8")().decode(sample, final=len(sample) < SAMPLE)
            return "utf-8"
        except UnicodeDecodeError:
            return _legacy_encoding(sample)
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) > max(10 * min(even, odd), len(sample) // 20):
        return "utf-16-le" if odd > even else "utf-16-be"
    raise ValueError("it is no text, because it has bytes of value zero. Convert it.")


def _legacy_encoding(sample: bytes) -> str:
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        raise ValueError(
            "it is not UTF-8, and telling other encodings needs charset-normalizer: pip install charset-normalizer"
        ) from None
    found = list(from_bytes(sample, cp_isolation=list(LEGACY)))
    if not found:
        raise ValueError("it is in no encoding that is known. Convert it to UTF-8.")
    least = min(match.chaos for match in found) + 0.02
    coherent = max(match.coherence for match in found if match.chaos <= least) - AS_LIKELY
    likely = [match for match in found if match.chaos <= least and match.coherence >= coherent]
    names = {name for match in likely for name in match.could_be_from_charset}
    return next(name for name in (*LEGACY, likely[0].encoding) if name in names)


def decode(data: bytes) -> str:
    """The text of bytes in an encoding that is not told.

    Raises:
        ValueError: they are no text.
    """
    encoding = find_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"begins as {encoding}, but byte {error.start} is not. Convert it to UTF-8.") from error
