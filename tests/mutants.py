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
_CHUNKS = "test_chunks.py"
_DELTAS = f"{_CHUNKS}::test_flawed_transform_headers_are_refused"
_HEADERS = "test_transforms.py::test_forged_headers_of_deltas_are_refused"
_TABLES = "test_coders.py::test_faulty_rans_tables_are_refused"
_AT_ONCE = (
    f"{_CHUNKS}::test_flawed_blocks_are_refused",
    f"{_CHUNKS}::test_every_flipped_bit_behind_a_right_check_is_judged_alike",
    f"{_CHUNKS}::test_without_sums_random_damage_is_judged_alike",
)
_RULE = "test_format.py::test_a_broken_rule_is_refused"
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
    # The kernel that decodes a record at once must refuse what the steps refuse: they then say what is wrong.
    *(
        Mutant(f"at once: {name}", "coders/record_decoder.py", old, new, _AT_ONCE)
        for name, old, new in (
            ("no stored check", "if sum_of(buffer[16:length], sum_keys, stripe) != check:", "if False:"),
            ("no decoded sum", "raw, sum_keys, stripe) == decoded else 1", "raw, sum_keys, stripe) == decoded else 0"),
            ("reserved fields of entries", "if buffer[e + 14] | buffer[e + 15]:", "if False:"),
            ("joined bits of keys", "or buffer[e + 1] != joined or buffer[e + 3] > 1", "or buffer[e + 3] > 1"),
            ("joined bits of rests", "if buffer[e + 1] != (joined if in_head else 0) or", "if"),
            ("segments", "if segment > 131072 or (segments - 1) * segment >= m or", "if"),
            ("values of raw planes", " or escapes or _read32(buffer, e + 12)", " or escapes"),
            ("sizes of raw planes", " or stored != wanted:", ":"),
            ("payloads past the end", "if stops[i] > length:", "if False:"),
            ("rubbish between payloads", "for k in range(at, starts[i]):", "for k in range(0):"),
            ("rubbish at the end", "for k in range(at, length):", "for k in range(0):"),
            ("tables that do not exist", "elif not have:", "elif False:"),
            ("symbols out of range", "if value != 0 or highest >> key_bits:", "if value != 0:"),
            ("windows out of range", "or (value + highest) >> key_bits:", ":"),
            ("words left over", "if left[k] != 0 or place[k] != places[2, k]:", "if False:"),
            ("lanes that end in any state", "if states[k] != np.uint32(32768):", "if False:"),
            ("streams that end anywhere", "if used != stop:", "if used > stop:"),
        )
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
        '        if head.length < at:\n            raise TruncatedError("a chunk record ends within the header',
        '        if False:\n            raise TruncatedError("a chunk record ends within the header',
        ("test_chunks.py::test_records_that_end_within_a_transform_header",),
    ),
    Mutant(
        "class sizes beyond the record",
        "chunks.py",
        '        if head.length < at:\n            raise TruncatedError("a chunk record ends within the sizes',
        '        if False:\n            raise TruncatedError("a chunk record ends within the sizes',
        ("test_chunks.py::test_records_that_end_within_a_transform_header",),
    ),
    Mutant(
        "any number of inputs",
        "chunks.py",
        "    if head.inputs > 1:\n",
        "    if False:\n",
        (f"{_CHUNKS}::test_more_inputs_than_there_are_yet_are_unsupported",),
    ),
    Mutant(
        "inputs without a delta",
        "chunks.py",
        "if (head.inputs == 1) != (head.transform == transforms.DELTA):",
        "if head.inputs == 0 and head.transform == transforms.DELTA:",
        (f"{_CHUNKS}::test_an_input_and_class_sizes_make_no_delta",),
    ),
    Mutant(
        "a delta without inputs",
        "chunks.py",
        "if (head.inputs == 1) != (head.transform == transforms.DELTA):",
        "if head.inputs == 1 and head.transform != transforms.DELTA:",
        (f"{_CHUNKS}::test_deltas_without_a_change_have_no_blocks",),
    ),
    Mutant(
        "classes that do not add up",
        "chunks.py",
        "if int(classes.sum()) != elements or ",
        "if ",
        (f"{_CHUNKS}::test_class_sizes_are_proven_before_anything_is_decoded",),
    ),
    Mutant(
        "deltas of any split",
        "chunks.py",
        " or split is not PLANES:",
        ":",
        (_DELTAS, f"{_CHUNKS}::test_deltas_without_a_change_have_no_blocks"),
    ),
    Mutant(
        "a base of another size",
        "chunks.py",
        "if base.size != out.size:",
        "if False:",
        (f"{_CHUNKS}::test_a_base_of_another_size_is_refused",),
    ),
    Mutant(
        "a delta from nothing",
        "chunks.py",
        "    if base is None:\n",
        "    if False:\n",
        (f"{_CHUNKS}::test_a_base_of_another_size_is_refused",),
    ),
    Mutant("deltas: a", "coders/transforms.py", "head.a > delta.PLAIN or ", "", (_DELTAS,)),
    Mutant("deltas: bits", "coders/transforms.py", "not 1 <= bits <= 11 or ", "", (_HEADERS,)),
    Mutant("deltas: no bits", "coders/transforms.py", "not 1 <= bits <= 11 or ", "bits > 11 or ", (_HEADERS,)),
    Mutant("deltas: shift", "coders/transforms.py", " or shift + bits > 8 * width:", ":", (_HEADERS,)),
    Mutant("deltas: b", "coders/transforms.py", "if head.b >> bits or ", "if ", (_HEADERS,)),
    Mutant("deltas: size of the mask", "coders/transforms.py", "head.size_a not in (0, -(-n // 8)) or ", "", (_DELTAS,)),
    Mutant("deltas: v", "coders/transforms.py", ' or not _unnamed(head, "a", "size_a", "b", "c"):', ":", (_HEADERS,)),
    Mutant("deltas: inner width", "coders/transforms.py", "head.inner_width != width or head.a >", "head.a >", (_HEADERS,)),
    Mutant(
        "deltas: m without a mask",
        "coders/transforms.py",
        "return head.inner in (0, n) if not head.size_a else",
        "return True if not head.size_a else",
        (_HEADERS,),
    ),
    Mutant("deltas: a mask of nothing", "coders/transforms.py", "else 1 <= head.inner < n", "else head.inner < n", (_HEADERS,)),
    Mutant("deltas: a mask of all", "coders/transforms.py", "else 1 <= head.inner < n", "else 1 <= head.inner", (_HEADERS,)),
    Mutant(
        "deltas: masks are not proven",
        "coders/transforms.py",
        "elif kind == SPARSE or (kind == DELTA and side_a.size):",
        "elif kind == SPARSE:",
        (f"{_CHUNKS}::test_unused_bits_of_the_mask_of_a_delta",),
    ),
    Mutant(
        "deltas: another base",
        "coders/transforms.py",
        "if not np.array_equal(delta.class_counts(classes), counts):",
        "if False:",
        (f"{_CHUNKS}::test_another_base_is_seen_before_the_sums_by_its_classes",),
    ),
    Mutant("rANS tables without hi", "coders/rans.py", " or freq[hi] == 0):", "):", (_TABLES,)),
    Mutant("rANS tables of one byte", "coders/rans.py", "used < 2 or ", "", (_TABLES,)),
    Mutant("rubbish behind short tables", "coders/rans.py", "if (payload[i >> 3] >> (i & 7)) & 1:", "if False:", (_TABLES,)),
    Mutant(
        "short tables that end early",
        "coders/rans.py",
        "    if 8 * size > end:\n",
        "    if False:\n",
        (
            "test_coders.py::test_all_forms_of_tables_of_rans_are_read",
            "test_coders.py::test_short_tables_cut_or_changed_anywhere_are_judged_alike",
        ),
    ),
    Mutant(
        "reserved count",
        "formats/catalogue.py",
        "        if reserved:\n",
        "        if False:\n",
        (f"{_RULE}[tzip-the reserved count of the index]",),
    ),
    Mutant(
        "r_inputs that do not add up",
        "formats/catalogue.py",
        'if int(counts.sum(dtype=np.uint64)) != self["i_kind"].size:',
        'if counts.sum(dtype=np.uint32) != self["i_kind"].size:',
        (f"{_RULE}[tzip-inputs: numbers that wrap to the right one]",),
    ),
    Mutant(
        "inputs leave their run",
        "formats/catalogue.py",
        "if (end > size[run]).any() or (start[1:]",
        "if (start[1:]",
        (f"{_RULE}[tzip-inputs: past its run]",),
    ),
    Mutant(
        "inputs overlap",
        "formats/catalogue.py",
        " or (start[1:] < end[:-1])[follows].any():",
        ":",
        (f"{_RULE}[tzip-inputs: overlap by a byte]",),
    ),
    Mutant(
        "inputs of different runs overlap",
        "formats/catalogue.py",
        "(start[1:] < end[:-1])[follows].any()",
        "(start[1:] < end[:-1]).any()",
        (f"{_HOSTILE}::test_deltas_are_read_where_their_base_is",),
    ),
    Mutant(
        "inputs of any size",
        "formats/catalogue.py",
        "if int(offset.max()) >= _BIG or not 1 <= int(length.min()) <= int(length.max()) < _BIG:",
        "if False:",
        (f"{_RULE}[tzip-inputs: at 2^64 - 1]",),
    ),
    Mutant(
        "inputs without bytes",
        "formats/catalogue.py",
        "not 1 <= int(length.min())",
        "not 0 <= int(length.min())",
        (f"{_RULE}[tzip-inputs: without bytes]",),
    ),
    Mutant(
        "inputs from nowhere",
        "formats/catalogue.py",
        'if not (self["i_archive"].any(axis=1) | self["i_file"].any(axis=1)).all():',
        "if False:",
        (f"{_RULE}[tzip-inputs: from nowhere]",),
    ),
    Mutant(
        "inputs need not be those of the index",
        "formats/reader.py",
        'same = same and local.input_names == index.input_names[first : first + local["i_kind"].size]',
        "same = bool(same)",
        (f"{_RULE}[tzip-another name of an input in the index]",),
    ),
    Mutant(
        "inputs of any kind",
        "archive.py",
        'if int(index["i_kind"][i]) != AT_SAME_PLACE:',
        "if False:",
        (f"{_HOSTILE}::test_lying_inputs[another kind]",),
    ),
    Mutant(
        "bases that are too short",
        "archive.py",
        "if length > base.nbytes:",
        "if False:",
        (f"{_HOSTILE}::test_lying_inputs[past the base]",),
    ),
    Mutant(
        "any file of that tensor is a base",
        "bases.py",
        "if not file.origin().fits(wanted):",
        "if False:",
        (f"{_HOSTILE}::test_lying_inputs[another file]",),
    ),
    Mutant(
        "any member of the archive is a base",
        "bases.py",
        "if self.sha256 != _NONE and other.sha256 != _NONE:",
        "if False:",
        ("test_format.py::test_of_two_members_with_such_a_tensor_the_sum_of_the_file_says_which",),
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
        "(total != 4096 or ",
        "(",
        ("test_coders.py",),
    ),
    Mutant(
        "incomplete Huffman code",
        "coders/huffman.py",
        "kraft == 2048 and ",
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
