"""Small mutations of the checks that make tzip safe: (name, module, old text, new text, the tests that must see it).

`old` occurs exactly once in the module; tests/test_mutants.py fails when it does not, so that this list follows the source.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # within the package tzip
    old: str
    new: str
    tests: tuple[str, ...]


_HOSTILE, _FAULTS, _ARCHIVE = "test_hostile.py", "test_faults.py", "test_archive.py"
_CHUNK = f"{_HOSTILE}::test_every_byte_of_a_chunk_flipped_with_its_check_right"
_ORDER = f"{_FAULTS}::test_order_of_publication"
_OFFSETS = f"{_HOSTILE}::test_lying_offsets"
_LIES = f"{_HOSTILE}::test_lying_catalogue"
_FIELDS = f"{_HOSTILE}::test_lying_chunk"
_RACE = f"{_FAULTS}::test_output_that_appears_meanwhile_is_not_replaced"

MUTANTS = [
    Mutant(
        "no decoded sum",
        "chunks.py",
        "if total.value() != layout.head.decoded_sum:",
        "if False:",
        (f"{_CHUNK}[fast]", _FIELDS),
    ),
    Mutant(
        "no stored check",
        "chunks.py",
        'if sum64(record[16:]) != (int.from_bytes(record[8:16].tobytes(), "little") if check is None else check):',
        "if False:",
        (f"{_HOSTILE}::test_every_byte_flipped", f"{_HOSTILE}::test_random_bytes_damaged"),
    ),
    Mutant(
        "chunk not that of the index",
        "formats/reader.py",
        'if check != int(self.index["c_check"][int(self.first_chunk[run]) + chunk]):',
        "if False:",
        (_OFFSETS,),
    ),
    Mutant(
        "rubbish after the last payload",
        "chunks.py",
        "if align(at, ALIGN) != length or record[at:].any():",
        "if False:",
        (_FIELDS,),
    ),
    Mutant(
        "joined bits may differ",
        "chunks.py",
        "if key.joined != rest.joined:",
        "if False:",
        (f"{_HOSTILE}::test_entries_are_proven_before_anything_is_decoded",),
    ),
    Mutant(
        "segments without symbols",
        "coders/tables.py",
        " or (segments - 1) * size >= n:",
        ":",
        (f"{_HOSTILE}::test_entries_are_proven_before_anything_is_decoded", "test_coders.py::test_numbers_of_segments"),
    ),
    Mutant(
        "segments of any length",
        "coders/tables.py",
        "if not 0 < size <= MAX_SEGMENT or",
        "if not 0 < size or",
        ("test_coders.py::test_numbers_of_segments",),
    ),
    Mutant(
        "strings of a transform share tables",
        "chunks.py",
        "    if block.flags:\n",
        "    if False:\n",
        ("test_chunks.py::test_strings_with_flags_are_refused_before_anything_is_decoded",),
    ),
    Mutant(
        "empty strings of a transform have entries",
        "chunks.py",
        "        if block != Block(0):",
        "        if False:",
        ("test_chunks.py::test_flawed_transform_headers_are_refused",),
    ),
    Mutant(
        "transform headers beyond the record",
        "chunks.py",
        "        if head.length < at:\n",
        "        if False:\n",
        ("test_chunks.py::test_records_that_end_within_a_transform_header",),
    ),
    Mutant(
        "rANS words left over",
        "coders/rans.py",
        "        if at[g] != end[g]:",
        "        if False:",
        ("test_chunks.py::test_flawed_blocks_are_refused", "test_tiers.py::test_damaged_payloads_are_judged_alike"),
    ),
    Mutant(
        "rANS lanes end in any state",
        "coders/rans.py",
        "            if x[lane] != np.uint32(32768):\n                return",
        "            if False:\n                return",
        (
            "test_chunks.py::test_flawed_blocks_are_refused",
            "test_chunks.py::test_without_sums_both_decoders_decide_and_decode_alike",
        ),
    ),
    Mutant(
        "rANS bytes behind the words",
        "coders/rans.py",
        "    if words != stop:\n",
        "    if words > stop:\n",
        ("test_chunks.py::test_flawed_blocks_are_refused",),
    ),
    Mutant(
        "overlapping chunks",
        "formats/catalogue.py",
        "if (starts[1:] < stops[:-1]).any() or starts[0] < 64",
        "if starts[0] < 64",
        (_OFFSETS,),
    ),
    Mutant(
        "tables that do not sum up: rANS",
        "coders/rans.py",
        "return 1 if total == 4096 and ",
        "return 1 if ",
        ("test_coders.py",),
    ),
    Mutant(
        "incomplete Huffman code",
        "coders/huffman.py",
        "kraft != SLOTS or ",
        "",
        ("test_coders.py", "test_chunks.py", "test_format.py"),
    ),
    Mutant(
        "escapes in any order",
        "coders/tables.py",
        "if at <= last or at >= n",
        "if at >= n",
        ("test_coders.py", "test_chunks.py", "test_format.py"),
    ),
    Mutant(
        "escape position off by one",
        "coders/tables.py",
        "or at >= n or",
        "or at > n or",
        ("test_coders.py", "test_chunks.py", "test_format.py"),
    ),
    Mutant(
        "no archive id",
        "formats/reader.py",
        "!= self.footer.archive_id:",
        "!= self.footer.archive_id and False:",
        (f"{_HOSTILE}::test_footers", f"{_HOSTILE}::test_every_byte_flipped"),
    ),
    Mutant(
        "index and record may differ",
        "formats/reader.py",
        "if not same or local.member_names",
        "if local.member_names",
        (_LIES,),
    ),
    Mutant(
        "no check of records",
        "formats/reader.py",
        "if check != check_at(record, offset - self.origin):",
        "if False:",
        (f"{_HOSTILE}::test_every_byte_flipped",),
    ),
    Mutant(
        "extents may not cover",
        "formats/catalogue.py",
        "if sum(lengths[x : x + count]) != sizes[member]:",
        "if False:",
        (_LIES,),
    ),
    Mutant("tensor may leave its extent", "formats/catalogue.py", "if (over & ~empty).any():", "if False:", (_LIES,)),
    Mutant(
        "tensors of one name",
        "formats/catalogue.py",
        "if len(set(self.tensor_names[t : t + count])) != count:",
        "if False:",
        (f"{_LIES}[two tensors of one name]",),
    ),
    Mutant(
        "empty components",
        "formats/names.py",
        'if part in ("", ".", ".."):',
        'if part in (".", ".."):',
        (f"{_HOSTILE}::test_bad_name",),
    ),
    Mutant(
        "backslash",
        "formats/names.py",
        '[\\x00-\\x1f\\x7f<>:"|?*\\\\]',
        '[\\x00-\\x1f\\x7f<>:"|?*]',
        (f"{_HOSTILE}::test_bad_name",),
    ),
    Mutant("case", "formats/names.py", ".casefold())", ")", (f"{_HOSTILE}::test_colliding_names",)),
    Mutant(
        "below a file",
        "formats/names.py",
        "if parent in seen and not seen[parent][1]:",
        "if False:",
        (f"{_HOSTILE}::test_colliding_names",),
    ),
    Mutant("links may climb out", "formats/names.py", "if climb > len(folder):", "if False:", (f"{_HOSTILE}::test_bad_link",)),
    Mutant(
        "links on disk are followed",
        "formats/atomic.py",
        "if at.is_symlink() or not at.is_dir():",
        "if not at.is_dir():",
        (f"{_HOSTILE}::test_nothing_is_written_through_a_link_on_disk",),
    ),
    Mutant(
        "partial link is followed",
        "formats/atomic.py",
        'getattr(os, "O_NOFOLLOW", 0)',
        "0",
        (f"{_HOSTILE}::test_partial_file_that_is_a_link_is_not_followed",),
    ),
    Mutant(
        "rename replaces",
        "formats/atomic.py",
        "        if self.force:\n            os.replace",
        "        if True:\n            os.replace",
        (_RACE,),
    ),
    Mutant(
        "no look before the rename",
        "formats/atomic.py",
        "            if os.path.lexists(self.target):",
        "            if False:",
        (_RACE,),
    ),
    Mutant("no fsync of the file", "formats/atomic.py", "        os.fsync(self.file.fileno())\n", "", (_ORDER,)),
    Mutant("no fsync of the folder", "formats/atomic.py", "        sync_folder(self.target.parent)\n", "", (_ORDER,)),
    Mutant(
        "no lock",
        "formats/atomic.py",
        "if not _lock(self.file):",
        "if False:",
        (f"{_FAULTS}::test_partial_file_that_another_process_holds",),
    ),
    Mutant(
        "second name is written into",
        "formats/atomic.py",
        "if held.st_nlink == 1:",
        "if True:",
        (f"{_FAULTS}::test_killed_between_link_and_unlink",),
    ),
    Mutant(
        "partial file is left",
        "formats/atomic.py",
        "            if not self.keep:",
        "            if False:",
        (f"{_FAULTS}::test_callback_or_output_that_raises",),
    ),
    Mutant(
        "changes are not seen",
        "packing.py",
        "if item.stamp and item.stamp() != stamp:",
        "if False:",
        (f"{_FAULTS}::test_input_that_changes_meanwhile",),
    ),
    Mutant(
        "chunks are not proven",
        "packing.py",
        "if not same_bytes(decoded, raw):",
        "if False:",
        (f"{_FAULTS}::test_chunk_that_does_not_decode_to_its_source_is_never_written",),
    ),
    Mutant(
        "SHA-256 is not compared",
        "archive.py",
        "if known and hasher.digest()",
        "if False and hasher.digest()",
        (f"{_LIES}[sha]",),
    ),
    Mutant("newer version is read", "formats/layout.py", "if version > VERSION:", "if False:", (f"{_HOSTILE}::test_headers",)),
    Mutant(
        "must-understand is ignored",
        "formats/layout.py",
        "        if must:\n",
        "        if False:\n",
        (f"{_HOSTILE}::test_headers",),
    ),
]
QUICK = ("no decoded sum", "overlapping chunks", "rename replaces", "no fsync of the file")
